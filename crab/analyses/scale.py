"""Does the path of `full` hold at its size? Many records of camera clips are made from one by hard links.

Memory is what a process holds for itself: pages of mapped files can be dropped at any time and do not count.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments

from crab import tasks
from crab.analyses.model_costs import filmed
from crab.core.files import read_json, write_json
from crab.core.workers import end_with_parent
from crab.data import records
from crab.models.checkpoint import load_base
from crab.models.protocol import IGNORE, model_of
from crab.samples.build import assemble
from crab.samples.encode import Encoder, encode_all
from crab.samples.reading import read_slot
from crab.study.cells import Cell
from crab.study.hardware import Hardware
from crab.study.launch import launch
from crab.study.run import run_cell
from crab.study.store import Store
from crab.study.train import RECORD, train

SLOT = "ks"
OPTIONS = {"slots": [SLOT], "tolerate": ["overlap"], "progress": False}  # of `assemble`, for linked trees
MIB = 2**20
LINKS = 50_000  # names of one file; ext4 allows 65,000


def linked_tree(root: Path, count: int, clip: Mapping[str, int]) -> Path:
    """An AV-UIE v2 tree under ``root``: ``count`` training records and one for testing, each with its own file names.

    All names lead to one clip; ``clip`` is its fps, width, height and seconds.
    """
    folder = root / tasks.FOLDER / SLOT
    names = [f"{number:07d}" for number in range(count + 1)]
    for kind in ("video", "audio"):
        (folder / kind).mkdir(parents=True)
    record = {"media": tasks.media_paths(SLOT, {"video_path": "clip.mp4", "audio_path": "clip.wav"})}
    filmed(root, record, **clip)
    for kind, suffix in (("video", "mp4"), ("audio", "wav")):
        for number, name in enumerate(names):
            path = folder / kind / f"{name}.{suffix}"
            if number % LINKS == 0:
                source = shutil.copy(root / f"clip.{suffix}", path)
            else:
                os.link(source, path)
    rows = [
        {"video_path": f"{name}.mp4", "audio_path": f"{name}.wav", "action": f"action {number % 9}",
         "label": f"<answer>action {number % 9}</answer>"}
        for number, name in enumerate(names)
    ]  # fmt: skip
    write_json(root / tasks.json_path(SLOT, "train"), rows[:-1])
    write_json(root / tasks.json_path(SLOT, "test"), rows[-1:])
    return root


def own_memory() -> float:
    """Memory of this process that belongs to no file, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    return sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem")) / 1024


@contextmanager
def _peak():
    """Yields a list whose member is the highest memory inside the block, over that at its start."""
    start, highest, done = own_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            highest[0] = max(highest[0], own_memory() - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield highest
    finally:
        done.set()
        thread.join()


def alone(work: Callable, *arguments: Any) -> Any:
    """Call a function in a process of its own, so that it begins with fresh memory. It ends with this process."""
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as pool:
        return pool.submit(_childless, work, *arguments).result()


def _childless(work: Callable, *arguments: Any) -> Any:
    """Call a function and end the workers that it leaves: a process waits for its children, and they for more work."""
    try:
        return work(*arguments)
    finally:
        for child in active_children():
            child.terminate()


def encoding_memory(base: Path, data: Path, out: Path, mib: float) -> dict[str, float]:
    """MiB of one shard of about ``mib``, and the peak while it is written, once a first batch has loaded the model."""
    encoder = Encoder(data, base)
    encoder.write(SLOT, "train", out / "first.safetensors", range(16))
    size = min(encoder.shard_size(SLOT, "train", mib), records.read_manifest(data)[f"{SLOT}/train"]["records"])
    with _peak() as peak:
        encoder.write(SLOT, "train", out / "shard.safetensors", range(size))
    return {"shard": (out / "shard.safetensors").stat().st_size / MIB, "peak": peak[0]}


def training_memory(base: Path, encoded: Path, folder: Path, steps: int, loaders: int) -> float:
    """Peak MiB of a training beyond the loaded model. Its samples are spread over all shards."""
    load_base(base)
    with _peak() as peak:
        data = read_slot(encoded, SLOT, "train", base)
        pairs = data[:: max(1, len(data) // (8 * steps))].answered("bare")
        _ours(base, folder, pairs, loaders)
    return peak[0]


def memory(base: Path, folder: Path, counts: Sequence[int], clip: Mapping[str, int], steps: int) -> pd.DataFrame:
    """Peak ``MiB`` beyond the model of trainings in processes of their own, by ``records`` and ``cached`` or not."""
    rows = []
    for count in counts:
        root, data = linked_tree(folder / f"tree{count}", count, clip), folder / f"data{count}"
        assemble(data, "tree", root, cache=folder / "probes.json", **OPTIONS)
        for cached in (False, True):
            out = folder / f"encoded{count}{cached}"
            if cached:
                _repeat(folder / "encoded_one", out, base, data, count)
            else:
                encode_all(data, [SLOT], base, out, cache=False)
            peak = alone(training_memory, base, out, folder / f"run{count}{cached}", steps, 0 if cached else 1)
            rows.append({"records": count, "cached": cached, "MiB": peak})
    return pd.DataFrame(rows)


def _repeat(source: Path, out: Path, base: Path, data: Path, count: int) -> None:
    """Shards for ``count`` records by hard links to one shard, since all records have the same clip."""
    shard = source / SLOT / "train" / "00000.safetensors"
    if not shard.is_file():
        Encoder(data, base).write(SLOT, "train", shard, range(min(count, 64)))
    for number in range(-(-count // 64)):
        target = out / SLOT / "train" / f"{number:05d}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(shard, target)


def listing(base: Path, folder: Path, count: int, clip: Mapping[str, int], workers: int) -> dict[str, float]:
    """Seconds and peak MiB of checking ``count`` records against a warm cache and of listing them in shards."""
    root, data, probes = linked_tree(folder / "tree", count, clip), folder / "data", folder / "probes.json"
    assemble(data, "tree", root, cache=probes, **OPTIONS)  # warms the cache
    with _peak() as peak:
        began = time.perf_counter()
        assemble(data, "tree", root, cache=probes, **OPTIONS)
        checked = time.perf_counter()
        encode_all(data, [SLOT], base, folder / "encoded", workers, cache=False, probes=probes)
        listed = time.perf_counter()
    return {"records": count, "check": checked - began, "list": listed - checked, "peak MiB": peak[0]}


# ---------------------------------------------------------------- the cost of the loop


def _ours(base: Path, folder: Path, pairs: Sequence, loaders: int) -> float:
    shutil.rmtree(folder, ignore_errors=True)
    settings = {"learning_rate": 1e-4, "passes": 1, "batch_size": 8, "seed": 0, "hardware": Hardware(loaders=loaders)}
    adapter = train(pairs, "lora", {"r": 4, "lora_alpha": 8}, base, folder, **settings)
    record = read_json(adapter / RECORD)
    return record["seconds"] / record["steps"]


def _plain(base: Path, folder: Path, pairs: Sequence) -> float:
    """Seconds per step of plain Trainer and PEFT LoRA on prompts that are held in memory."""
    model, processor = load_base(base)
    tokenizer = processor.tokenizer
    items = [(sample["prompt"], tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]) for sample, answer in pairs]

    def collate(items: Sequence[tuple]) -> dict[str, Any]:
        ids = [torch.cat([prompt["input_ids"][0], torch.tensor(answer)]) for prompt, answer in items]
        labels = [torch.cat([torch.full_like(p["input_ids"][0], IGNORE), torch.tensor(a)]) for p, a in items]
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
        names = set(items[0][0]) - {"input_ids", "attention_mask"}
        media = {name: torch.cat([torch.as_tensor(prompt[name]) for prompt, _ in items]) for name in names}
        return {
            "input_ids": pad(ids, padding_value=tokenizer.pad_token_id),
            "labels": pad(labels, padding_value=IGNORE),
            "attention_mask": pad([torch.ones_like(row) for row in ids]),
            "use_audio_in_video": True,
            **media,
        }

    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=8, num_train_epochs=1, learning_rate=1e-4, report_to="none",
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False, logging_strategy="no", label_names=["labels"],
    )  # fmt: skip
    lora = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=model_of(model).TARGETS["language"]))
    trainer = Trainer(model=lora, args=arguments, train_dataset=items, data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    steps = trainer.train().global_step
    return (time.perf_counter() - began) / steps


def loop_costs(base: Path, folder: Path, samples: int, repeats: int, clip: Mapping[str, int]) -> pd.DataFrame:
    """Seconds of a training step of plain Trainer and PEFT LoRA, and of ours, in turn: a row per repetition and way."""
    root, data = linked_tree(folder / "tree", samples, clip), folder / "data"
    assemble(data, "tree", root, **OPTIONS)
    for cached in (True, False):
        encode_all(data, [SLOT], base, folder / f"encoded{cached}", cache=cached)
    folders = (folder / f"encoded{cached}" for cached in (False, True))
    live, cached = (read_slot(encoded, SLOT, "train", base).answered("bare") for encoded in folders)
    held = list(live)
    ways = {
        "plain Trainer, prompts in memory": partial(_plain, base, folder / "plain", held),
        "ours, prompts in memory": partial(_ours, base, folder / "held", held, 0),
        "ours, decoded by one loader": partial(_ours, base, folder / "live", live, 1),
        "ours, features cached": partial(_ours, base, folder / "cached", cached, 0),
    }
    rows = [{"way": name, "seconds": way()} for _ in range(repeats) for name, way in ways.items()]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- several processes


def losses(base: Path, data: Path, encoded: Path, folder: Path, hardware: Hardware) -> pd.DataFrame:
    """Losses of one training on ``hardware``: one row per ``step``. It trains, answers and scores like any cell."""
    answer = {"batch_size": 8, "max_new_tokens": 8, "segmenter": "grabcut"}
    folders = (encoded, data, base, folder / "cells", folder / "ledger", folder / "adapters")
    store = Store(*folders, batch_size=8, precision="fp32", answer=answer, hardware=hardware)
    (cell,) = store.keyed([Cell("scale", "ilora", {"r": 4, "lora_alpha": 8, "num_heads": 3}, 1e-3, (SLOT,), passes=4)])
    (launch if hardware.processes > 1 else run_cell)(store, cell)
    return pd.DataFrame(read_json(store.adapter(cell) / RECORD)["loss"], columns=["step", "loss"])
