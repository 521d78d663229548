"""What I-LoRA costs in the whole model, beside LoRA of its rank, and what a sample costs before the model sees it."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from crab import tasks
from crab.analyses.timing import Step, formats, interleaved, quartiles, ratio
from crab.data import media, records
from crab.models.batches import answer_loss, batch
from crab.models.checkpoint import load_base, load_processor
from crab.models.protocol import model_of
from crab.samples.inputs import load_media, prepared
from crab.study.train import adapted

PYAV, DECODE, PREPARE, BOTH = "PyAV, every frame", "decode", "prepare", "decode and prepare"


def model_costs(
    base: str | Path, root: str | Path, slot: str, batch_size: int, new_tokens: int, rank: int, heads: int,
    dtypes: Sequence[str], seconds: float,
) -> pd.DataFrame:  # fmt: skip
    """Time a training step (AdamW) and greedy decoding with LoRA and I-LoRA, on the first training samples of a slot.

    Args:
        root: holds ``AVUIE_2``. new_tokens: decoded for each sample; none ends earlier.
        dtypes: ``bfloat16`` is autocast; left out if it is emulated.

    Returns:
        One row per number format and part (forward, backward, optimizer, decoding, and training step): seconds of both
        methods, and their ratio with its 95% interval.
    """
    model, processor = load_base(base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = records.read(root, slot, "train")[:batch_size]
    frames = tasks.get_slot(slot).frames
    module = model_of(model)
    prompts = [module.prepare(processor, load_media(row, frames), tasks.instruction(slot, row)) for row in rows]
    samples = module.encode(model, prompts)
    answers = [tasks.target(slot, row, "bare") for row in rows]
    learned, asked = batch(model, processor.tokenizer, samples, answers), batch(model, processor.tokenizer, samples)
    options = {"r": rank, "lora_alpha": 2 * rank}
    models = {"LoRA": ("lora", options), "I-LoRA": ("ilora", {**options, "num_heads": heads})}
    for name, (method, config) in models.items():  # frozen weights are shared: a large base lies in memory once
        shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        models[name] = adapted(copy.deepcopy(model, shared), method, config)
        models[name].generation_config.eos_token_id = None  # both write as many tokens as they may

    def train(model, precision: torch.dtype) -> Step:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step(_: int) -> Iterator[None]:
            model.train()
            with torch.autocast(device, precision, enabled=precision != torch.float32):
                loss, _ = answer_loss(model, learned)
            yield
            loss.backward()
            yield
            optimizer.step()
            optimizer.zero_grad()
            yield

        return step

    def decode(model, precision: torch.dtype, _: int) -> Iterator[None]:
        model.eval()
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            module.generate(model, processor.tokenizer, asked, new_tokens)
        yield

    table = []
    for dtype in formats(dtypes, device):
        precision = getattr(torch, dtype)
        if precision == torch.float32 != model.dtype:
            continue
        trained = interleaved({name: train(m, precision) for name, m in models.items()}, seconds, device)
        decoded = interleaved({name: partial(decode, m, precision) for name, m in models.items()}, seconds, device)
        parts = {
            part: {name: trained[name][i] for name in models}
            for i, part in enumerate(("forward", "backward", "optimizer"))
        }
        parts["training step"] = {name: trained[name].sum(0) for name in models}
        parts["decoding"] = {name: decoded[name][0] for name in models}
        for part, times in parts.items():
            medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
            row = {"device": device, "dtype": dtype, "part": part, **medians}
            table.append(row | ratio(times["I-LoRA"], times["LoRA"]))
    return pd.DataFrame(table)


def decode_alone(record: Mapping) -> int:
    """Decode every frame and all sound of a record's media by PyAV, in one thread; returns the number of frames."""
    count = 0
    for item in record["media"]:
        with media.open_container(item.path, item.kind) as streams:
            stream = getattr(streams, item.kind)  # which decodes in one thread
            count += sum(1 for _ in streams.container.decode(stream))
    return count


def prepare_alone(slot: str, processor, record: Mapping) -> int:
    """Decode and prepare a record: patches, mel features and tokens; returns the number of tokens."""
    prompt = prepared(processor, record, tasks.get_slot(slot).frames, tasks.instruction(slot, record))
    return prompt["input_ids"].shape[-1]


def filmed(folder: str | Path, record: Mapping, fps: int, width: int, height: int, seconds: int = 10) -> dict:
    """The record with other media: a panned and grainy clip as cameras make them, and noise at 16 kHz."""
    draw = np.random.default_rng(0)
    scene = draw.integers(256, size=(12, 20, 3), dtype=np.uint8)
    scene = cv2.resize(scene, (width, height), interpolation=cv2.INTER_CUBIC)
    grain = draw.integers(12, size=(height, width, 3), dtype=np.uint8)
    shifts = range(fps * seconds)
    frames = (cv2.add(np.roll(scene, 2 * i, 1), np.roll(grain, (7 * i, 11 * i), (0, 1))) for i in shifts)
    paths = {"video": Path(folder) / "clip.mp4", "audio": Path(folder) / "clip.wav"}
    media.write_video(paths["video"], frames, fps)
    media.write_audio(paths["audio"], draw.uniform(-0.5, 0.5, media.RATE * seconds))
    return {**record, "media": [item._replace(path=str(paths[item.kind])) for item in record["media"]]}


def data_costs(
    base: str | Path, root: str | Path, slot: str, samples: int, clip: Mapping[str, int], workers: Sequence[int],
    seconds: float,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Time the first training samples of a slot of one video and one sound, one by one and through DataLoader workers.

    Args:
        clip: fps, width and height of a clip as cameras make them. workers: numbers of processes to compare.

    Returns:
        Costs: one row per kind of clip, part and number of workers, seconds of one sample with quartiles; and ratios
        with 95% intervals.

    Raises:
        ValueError: the slot has too few samples.
    """
    rows = records.read(root, slot, "train")[:samples]
    if len(rows) < max(samples, 2):
        raise ValueError(
            f"benchmark.samples: {slot}/train has {len(rows)} records, {max(samples, 2)} are wanted; lower it"
        )
    processor = load_processor(base)
    module = model_of(processor)
    frames = tasks.get_slot(slot).frames

    def alone(records: Sequence[Mapping], n: int) -> Iterator[None]:
        decode_alone(records[n % len(records)])
        yield

    def ours(records: Sequence[Mapping], n: int) -> Iterator[None]:
        record = records[n % len(records)]
        items = load_media(record, frames)
        yield
        module.prepare(processor, items, tasks.instruction(slot, record))
        yield

    def epoch(work: Callable, count: int) -> Step:
        loader = DataLoader(rows, batch_size=None, collate_fn=work, num_workers=count, persistent_workers=True)

        def step(_: int) -> Iterator[None]:
            for _ in loader:
                pass
            yield

        return step

    costs, ratios = [], []
    with TemporaryDirectory() as folder:
        film = filmed(folder, rows[0], **clip)
        kinds = {f"{slot}, as in the data": rows, "{width} x {height}, {fps} frames/s".format_map(clip): [film]}
        for kind, part in kinds.items():
            steps = {PYAV: partial(alone, part), "ours": partial(ours, part)}
            times = interleaved(steps, seconds, least=max(5, len(part)))
            decode, prepare = times["ours"]
            parts = {PYAV: times[PYAV][0], DECODE: decode, PREPARE: prepare, BOTH: decode + prepare}
            costs += [{"clips": kind, "part": name, "workers": 0, **quartiles(t)} for name, t in parts.items()]
            for above, below in ((PREPARE, DECODE), (DECODE, PYAV), (BOTH, PYAV)):
                ratios.append({"clips": kind, "ratio": f"{above} / {below}", **ratio(parts[above], parts[below])})
    kind, works = next(iter(kinds)), {PYAV: decode_alone, BOTH: partial(prepare_alone, slot, processor)}
    steps = {(name, count): epoch(work, count) for name, work in works.items() for count in workers}
    times = {key: t[0] / len(rows) for key, t in interleaved(steps, seconds, least=3, by_wall=True).items()}
    costs += [{"clips": kind, "part": name, "workers": count, **quartiles(t)} for (name, count), t in times.items()]
    few = min(workers)
    for name in works:
        for many in sorted(set(workers) - {few}):
            title = f"{name}: {few} worker / {many}"
            ratios.append({"clips": kind, "ratio": title, **ratio(times[name, few], times[name, many])})
    return pd.DataFrame(costs), pd.DataFrame(ratios)
