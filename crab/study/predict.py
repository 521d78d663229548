"""Answers of trained adapters to the test samples: batched greedy generation, one JSON line a sample."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers.utils.logging import disable_progress_bar

import crab.ilora  # noqa: F401  makes I-LoRA known to PEFT
from crab import tasks
from crab.data.files import atomic_file, file_digest, read_json, write_json
from crab.models import omni
from crab.study.dataset import Sample, batch, load_base, read_slot
from crab.study.instruction import instruction_shown
from crab.study.keys import base_digest, code_digest, key_of
from crab.study.pool import run_pool
from crab.study.runs import Run

WEIGHTS = "adapter_model.safetensors"
#: Modules that decide which answer an adapter gives.
ANSWERING = "import crab.study.predict"
ANSWERED = "answered.json"  # beside a run's answers: what decided them


def load_adapter(model, folder: str | Path) -> PeftModel:
    """Put a saved adapter on a base, for inference.

    Raises:
        ValueError: when it is missing or damaged, or does not fit the base: PEFT itself only warns
            about weights that are not there, and goes on with random ones.
    """
    folder = Path(folder)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        PeftConfig.from_pretrained(folder)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{folder}: missing or damaged adapter ({error}); run the train stage again") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks by the old name
            peft_model = PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: this adapter does not fit the base ({_short(error)}); train it on this base") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(peft_model, save_embedding_layers=False).items()}
    if stored != wanted:
        odd = sorted(name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name))
        raise ValueError(
            f"{folder}: this adapter does not fit the base: {len(odd)} weights differ, e.g. {odd[0]} is "
            f"{stored.get(odd[0])} in the file and {wanted.get(odd[0])} in the model; train it on this base"
        )
    return peft_model.eval()


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@torch.no_grad()
def answer(model, tokenizer, samples: Sequence[Sample], batch_size: int, max_new_tokens: int) -> list[str]:
    """Greedy answers in the order of ``samples``; batches hold samples of like length, so that little is padding."""
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["input_ids"]))
    texts = [""] * len(samples)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        made = batch(model, tokenizer, [samples[i] for i in part])
        with instruction_shown(model, made):
            found = omni.generate(model, tokenizer, made, max_new_tokens)
        for i, text in zip(part, found, strict=True):
            texts[i] = text
    return texts


def predict_run(
    run: Run,
    adapter: str | Path,
    encoded: str | Path,
    base: str | Path,
    out: str | Path,
    slots: Sequence[str],
    batch_size: int = 32,
    max_new_tokens: int = 96,
    held_out: int = 0,
) -> None:
    """Predict the test split of each of the run's slots into ``<out>/<run>/<slot>.jsonl``.

    Args:
        held_out: predict the last so many training samples in its place, which a run with the same ``held_out``
            was not trained on; 0 for the test split.
    """
    disable_progress_bar()  # a bar for each model loaded would bury the one of the runs
    model, processor = load_base(base)
    peft_model = load_adapter(model, adapter)
    for slot in run.slots(slots):
        data = read_slot(encoded, slot, "train" if held_out else "test")
        ids, samples = data.ids[-held_out:], data.samples[-held_out:]  # all of them where it is 0
        texts = answer(peft_model, processor.tokenizer, samples, batch_size, max_new_tokens)
        with atomic_file(Path(out) / run.name / f"{slot}.jsonl") as path, path.open("w") as file:
            for name, text in zip(ids, texts, strict=True):
                file.write(json.dumps({"id": name, "slot": slot, "text": text}) + "\n")


def find_runs(folders: Mapping[str, str | Path]) -> dict[Run, Path]:
    """Trained runs and their folders: by method as given, single runs before joint ones, then by name.

    Args:
        folders: by method, the folder its adapters lie in.

    Raises:
        ValueError: when a method has none.
    """
    found = {}
    for method, folder in folders.items():
        runs = {Run.parse(path.parent.name): path.parent for path in Path(folder).glob("[!.]*/run.json")}
        if not runs:
            raise ValueError(f"{folder}: no trained run of {method}; run the train stage")
        found |= {run: runs[run] for run in sorted(runs, key=lambda run: (run.setting == "joint", run.name))}
    return found


def predict_all(
    runs: Mapping[Run, Path],
    encoded: str | Path,
    base: str | Path,
    out: str | Path,
    slots: Sequence[str],
    batch_size: int = 32,
    max_new_tokens: int = 96,
    workers: int = 2,
) -> None:
    """Predict all runs (run -> adapter folder) in worker processes, the longest first.

    Answers in ``out`` that this adapter, base, data and code gave before stay, so that one killed goes on with the runs that
    are not finished, and where only scoring has changed nothing is predicted; answers of runs that are no more are deleted.
    """
    out = Path(out)
    digest = cache(lambda slot: read_slot(encoded, slot, "test").digest)
    how = [base_digest(base), code_digest(ANSWERING), batch_size, max_new_tokens]
    jobs = []
    for run, folder in sorted(runs.items(), key=lambda item: -len(item[0].slots(slots))):
        of_run = run.slots(slots)
        adapter = [file_digest(Path(folder) / name) for name in (WEIGHTS, "adapter_config.json")]
        key = key_of([*how, adapter, [(slot, digest(slot)) for slot in of_run]])
        marker = out / run.name / ANSWERED
        if not marker.is_file() or read_json(marker) != {"key": key}:
            jobs.append((run.name, partial(_predict_marked, key, run, folder, encoded, base, out, of_run, batch_size, max_new_tokens)))
    names = {run.name for run in runs}
    for folder in out.iterdir() if out.is_dir() else ():
        if folder.is_dir() and folder.name not in names:
            shutil.rmtree(folder)
    run_pool(jobs, workers, "predict")


def _predict_marked(key: str, run: Run, adapter: Path, encoded: Any, base: Any, out: Path, *how: Any) -> None:
    """`predict_run`, and the mark that its answers are whole."""
    marker = out / run.name / ANSWERED
    marker.unlink(missing_ok=True)
    predict_run(run, adapter, encoded, base, out, *how)
    write_json(marker, {"key": key})


def slots_of(found: Mapping[Run, Path]) -> list[str]:
    """Benchmarks the runs were trained on, in the order of the first run that has them; slots without a test are left out."""
    slots: dict[str, None] = {}
    for run in sorted(found, key=lambda run: run.setting):  # joint before single
        slots |= dict.fromkeys(read_json(found[run] / "run.json")["slots"])
    return [slot for slot in slots if tasks.get_slot(slot).test]


def joint_run(found: Mapping[Run, Path], form: str) -> Run:
    """The joint run of lowest seed, of this form of answer where there is one.

    Raises:
        ValueError: when none of the runs is joint.
    """
    joint = [run for run in found if run.setting == "joint"]
    if not joint:
        raise ValueError(f"no joint run among {[run.name for run in found]}; add one to the method's runs")
    return min(joint, key=lambda run: (run.form != form, run.seed))
