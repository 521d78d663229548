"""Many runs side by side: train, answer and score a list of settings, each kept under a hash of what decides it.

A cell works in ``<work>/<key>``. Its raw answers stay there once it is trained, and its scores beside them: a cell
found there is not trained again, and where only the code that scores has changed it is only scored again. Killed,
a grid goes on in the cells it was in, from their last checkpoints.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from crab import tasks
from crab.data import records
from crab.data.files import read_json, write_json
from crab.study import code as sources
from crab.study.dataset import read_slot
from crab.study.keys import code_digest, key_of
from crab.study.pool import run_pool
from crab.study.predict import ANSWERING, predict_run
from crab.study.runs import Run
from crab.study.score import SAMPLE_COLUMNS, SCORING, masks_of, read_predictions, truth_digest
from crab.study.train import adapter_config, run_key, run_options, train_run, warn_of_emulation

EVALUATE = {"batch_size": 32, "max_new_tokens": 96, "segmenter": "grabcut"}
ANSWERED = "run.json"  # the run's record in a cell's folder, written when its answers are whole
COLUMNS = ["cell", *SAMPLE_COLUMNS]
CELL_COLUMNS = [
    "cell", "run", "key", "learning_rate", "passes", "held_out", "trainable_parameters", "samples", "steps", "seconds", "last_loss",
    "unparsable",
]  # fmt: skip


def is_rate(value: Any) -> bool:
    """Whether a value is a learning rate: a number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Args:
        name: unique in the grid.
        run: what is trained; its method says which adapter (``lora...`` or ``ilora...``).
        settings: the PEFT config's parameters (``r``, ``lora_alpha``, ...) and ``learning_rate``.
        passes: over every slot's training samples.
        slots: that a joint run trains on, those without a test split too; of a single run they say nothing.
        held_out: 0 trains on all training samples and scores on the test split; else the last so many training
            samples of each slot are not trained on, and are what is scored.
        samples: train on no more than the first so many of what is left of each slot; None for all.

    Raises:
        ValueError: naming the cell, on what cannot be trained.
    """

    name: str
    run: Run
    settings: Mapping[str, Any]
    passes: int
    slots: tuple[str, ...] = ()
    held_out: int = 0
    samples: int | None = None

    def __post_init__(self) -> None:
        rate = self.settings.get("learning_rate")
        if not is_rate(rate):
            raise ValueError(f"cell {self.name}: learning_rate is {rate!r}; give a number above 0")
        for field, least in (("passes", 1), ("held_out", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"cell {self.name}: {field} is {value!r}; give a whole number of at least {least}")
        if not self.scored_slots:
            raise ValueError(f"cell {self.name}: none of its slots {self.trained_slots} has a test split, so nothing can be scored")
        adapter_config(self.run.method, self.settings)

    @property
    def trained_slots(self) -> list[str]:
        return self.run.slots(self.slots)

    @property
    def scored_slots(self) -> list[str]:
        """Benchmarks among the slots it is trained on."""
        return [slot for slot in self.trained_slots if tasks.get_slot(slot).test]


@dataclass(frozen=True)
class _Place:
    """Where a grid finds and leaves things; picklable, for the workers."""

    encoded: Path
    dataset: Path
    base: Path
    work: Path
    batch_size: int
    precision: str
    evaluate: Mapping[str, Any]


def run_grid(
    cells: Sequence[Cell],
    encoded: str | Path,
    dataset: str | Path,
    base: str | Path,
    work: str | Path,
    *,
    batch_size: int,
    precision: str = "fp32",
    evaluate: Mapping[str, Any] = EVALUATE,
    workers: int = 2,
    label: str = "grid",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train, answer and score every cell that is not yet finished, the longest first.

    Args:
        encoded, dataset, base: of the encode, build and base stages; ``dataset`` holds ``AVUIE_2`` and gives the truths.
        work: where cells are kept, without their adapters. Safe to delete; grids may share it, but not at the same time.
        batch_size: samples a training step. precision: see `crab.study.train.train_run`.
        evaluate: ``batch_size``, ``max_new_tokens`` and ``segmenter``, as the evaluate stage takes them.

    Returns:
        A row a cell and sample (`COLUMNS`): its primary score; the mean over a slot's samples is the slot's metric.
        A row a cell (`CELL_COLUMNS`): its key, size, cost (of its last session) and answers that could not be read.

    Raises:
        ValueError: on two cells of one name, or an unknown parameter of ``evaluate``.
        RuntimeError: naming the cell that failed, with the worker's error as its cause.
    """
    names = [cell.name for cell in cells]
    if len(set(names)) != len(names):
        raise ValueError(f"{label}: two cells have one name: {sorted(n for n in set(names) if names.count(n) > 1)}")
    if set(evaluate) != set(EVALUATE):
        raise ValueError(f"{label}: evaluate holds {sorted(evaluate)}; it must hold {', '.join(EVALUATE)}")
    warn_of_emulation(precision)
    place = _Place(Path(encoded), Path(dataset), Path(base), Path(work), batch_size, precision, dict(evaluate))

    digest = cache(lambda slot, split: read_slot(encoded, slot, split).digest)
    keys = {cell.name: _cell_key(cell, place, digest) for cell in cells}
    truth = cache(lambda slot, split: truth_digest(slot, split, dataset))
    score_keys = {cell.name: _score_key(cell, place, truth) for cell in cells}
    waiting = {keys[cell.name]: cell for cell in cells if not _finished(cell, keys, score_keys, place)}  # equal cells once
    size = cache(lambda slot: len(read_json(Path(encoded) / slot / "train.json")["ids"]))
    jobs = [
        (cell.name, partial(run_cell, cell, key, score_keys[cell.name], place))
        for key, cell in sorted(waiting.items(), key=lambda item: -item[1].passes * sum(map(size, item[1].trained_slots)))
    ]
    if jobs:
        run_pool(jobs, workers, label)

    rows, summaries = [], []
    for cell in cells:
        folder = Path(work) / keys[cell.name]
        run, scores = read_json(folder / ANSWERED), read_json(folder / "scores.json")["slots"]
        head = [cell.name, cell.run.name, cell.run.family, cell.run.seed]
        rows += [[*head, slot, *pair] for slot, found in scores.items() for pair in zip(found["ids"], found["scores"], strict=True)]
        unparsable = sum(found["unparsable"] for found in scores.values())
        summary = {"cell": cell.name, "key": keys[cell.name], "unparsable": unparsable}
        summaries.append({**run, **summary, "run": cell.run.name, "last_loss": run["loss"][-1][1] if run["loss"] else None})
    return pd.DataFrame(rows, columns=COLUMNS), pd.DataFrame(summaries, columns=CELL_COLUMNS)


def run_cell(cell: Cell, key: str, score_key: str, place: _Place) -> None:
    """Do what is missing of one cell: train, answer, score. Run in a worker."""
    folder = place.work / key
    scored_slots = cell.scored_slots
    if not (folder / ANSWERED).exists():
        final = train_run(
            cell.run, cell.settings, place.encoded, place.base, folder / "train", cell.slots, cell.passes, place.batch_size,
            precision=place.precision, held_out=cell.held_out, samples=cell.samples,
        )  # fmt: skip
        predict_run(
            cell.run, final, place.encoded, place.base, folder / "answers", scored_slots, place.evaluate["batch_size"],
            place.evaluate["max_new_tokens"], cell.held_out,
        )  # fmt: skip
        write_json(folder / ANSWERED, read_json(final / "run.json"))
        shutil.rmtree(folder / "train")
    slots = {slot: scored(cell, slot, folder / "answers", place) for slot in scored_slots}
    write_json(folder / "scores.json", {"key": score_key, "slots": slots})


def _finished(cell: Cell, keys: Mapping[str, str], score_keys: Mapping[str, str], place: _Place) -> bool:
    folder = place.work / keys[cell.name]
    path = folder / "scores.json"
    return (folder / ANSWERED).exists() and path.exists() and read_json(path)["key"] == score_keys[cell.name]


def split_of(cell: Cell) -> str:
    """The split on disk that the cell's scored samples lie in."""
    return "train" if cell.held_out else "test"


def truths(dataset: str | Path, slot: str, split: str, ids: Sequence[str]) -> list[dict]:
    """Records of ``ids``, in that order, as the test records that `crab.tasks.score` takes.

    Raises:
        ValueError: when one is not among the records on disk.
    """
    found = {record["id"]: record for record in records.read(dataset, slot, split)}
    if missing := [name for name in ids if name not in found]:
        raise ValueError(f"{Path(dataset) / tasks.json_path(slot, split)}: no record {missing[0]!r}, which was encoded; "
                         "run the encode stage again")
    kept = [found[name] for name in ids]
    if split == "train" and "split" in tasks.get_slot(slot).fields("test"):
        # Ref-AVS test records say whether the thing is there; of training records the answer says it
        kept = [{**r, "split": "test_n" if tasks.truth(slot, r) == tasks.NULL else "test_s"} for r in kept]
    return kept


def scored(cell: Cell, slot: str, answers: Path, place: _Place) -> dict[str, Any]:
    """Primary scores of one slot's samples, by what `predict_run` wrote to ``answers``."""
    ids = read_json(place.encoded / slot / f"{split_of(cell)}.json")["ids"][-cell.held_out :]
    texts = read_predictions(answers / cell.run.name / f"{slot}.jsonl", slot)
    test = truths(place.dataset, slot, split_of(cell), ids)
    result = tasks.score(slot, test, texts, **masks_of(slot, place.evaluate["segmenter"]))
    return {"ids": result["ids"], "scores": [float(v) for v in result["per_sample"]], "unparsable": result["n_unparsable"]}


def chances(
    dataset: str | Path, encoded: str | Path, slots: Sequence[str], held_out: int = 0, segmenter: str = EVALUATE["segmenter"]
) -> dict[str, float]:
    """Score of the best constant answer on what cells with this ``held_out`` are scored on, by slot (benchmarks only)."""
    found, split = {}, "train" if held_out else "test"
    for slot in slots:
        if tasks.get_slot(slot).test:
            ids = read_json(Path(encoded) / slot / f"{split}.json")["ids"][-held_out:]
            found[slot] = float(tasks.chance(slot, truths(dataset, slot, split, ids), **masks_of(slot, segmenter)))
    return found


def _cell_key(cell: Cell, place: _Place, digest) -> str:
    """Hash of all that decides the cell's answers. Not of its name."""
    options = run_options(
        cell.run, cell.settings, cell.passes, place.batch_size, precision=place.precision, held_out=cell.held_out,
        samples=cell.samples,
    )  # fmt: skip
    trained = run_key(cell.run, options, [digest(slot, "train") for slot in cell.trained_slots], place.base)
    return key_of({
        "trained": trained,
        "answered": [(slot, digest(slot, split_of(cell))) for slot in cell.scored_slots],
        "evaluate": [place.evaluate["batch_size"], place.evaluate["max_new_tokens"]],
        "code": code_digest(ANSWERING),
    })  # fmt: skip


def _score_key(cell: Cell, place: _Place, digest) -> str:
    """Hash of all that decides the scores, given the answers."""
    return key_of({
        "truths": [digest(slot, split_of(cell)) for slot in cell.scored_slots],
        "segmenter": place.evaluate["segmenter"],
        "code": [code_digest(SCORING), sources.plain(inspect.getsource(truths)), sources.plain(inspect.getsource(scored))],
    })  # fmt: skip
