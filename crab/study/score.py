"""Scores from prediction files and the test records alone: no model, no torch.

Predictions lie at ``<predictions>/<run>/<slot>.jsonl``, one ``{"id", "slot", "text"}`` a line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from crab import tasks
from crab.data import media, records
from crab.data.files import atomic_file, file_digest, read_json, write_json
from crab.study.keys import code_digest, key_of
from crab.study.pool import run_pool
from crab.study.resample import bootstrap_means, interval
from crab.study.runs import Run
from crab.tasks.segmentation import bounding_box, points_inside

COLUMNS = [
    "run", "family", "seed", "slot", "metric", "primary", "value", "low", "high", "chance",
    "n_expected", "n_found", "n_scored", "n_unparsable",
]  # fmt: skip
SAMPLE_COLUMNS = ["run", "family", "seed", "slot", "id", "score"]
#: The files of the two tables; that of all samples, whose lines are much alike, is packed to a hundredth, to be kept in git.
SCORES, SAMPLES = "scores.csv", "samples.csv.xz"
#: Modules that decide what an answer is worth.
SCORING = "import crab.study.score, crab.models.segment"
ORACLE_COLUMNS = ["segmenter", "slot", "metric", "primary", "value", "low", "high", "n_expected"]


def read_predictions(path: str | Path, slot: str) -> dict[str, str]:
    """Answers by sample id.

    Raises:
        ValueError: naming file and line when the file is missing, a line malformed, an id given twice,
            or a line belongs to another slot.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such prediction file; run the evaluate stage for this run and slot")
    texts: dict[str, str] = {}
    # Lines of bytes end at line feeds alone; those of a text also at U+2028 and the like, which an answer may hold.
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            sample, owner, text = str(row["id"]), row["slot"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number}: expected an object with id, slot and text ({error!r}); predict again"
            ) from None
        if owner != slot:
            raise ValueError(f"{path}:{number}: a line of slot {owner!r} in a file of {slot!r}; predict again")
        if sample in texts:
            raise ValueError(f"{path}:{number}: id {sample!r} appears twice; predict again")
        texts[sample] = text
    return texts


def _true_mask(record: Mapping) -> Any:
    return media.read_mask(record["mask"])


def _cut_mask(segmenter: str, record: Mapping, box, points) -> Any:
    from crab.models import segment  # OpenCV is loaded only where a slot needs a mask

    (image,) = (item for item in record["media"] if item.kind == "image")
    return segment.segmenter(segmenter)(media.read_image(image.path), box, points)


def masks_of(slot: str, segmenter: str = "grabcut") -> dict[str, tasks.Masks]:
    """Keyword arguments that `crab.tasks.score` needs for a slot: ``masks`` for the pixel-level ones, else none.

    Args:
        segmenter: what cuts predicted masks, see `crab.models.segment.segmenter`.
    """
    return {"masks": tasks.Masks(_true_mask, partial(_cut_mask, segmenter))} if tasks.get_slot(slot).masks else {}


def score_run(
    run: Run,
    slot: str,
    test: Sequence[Mapping],
    texts: Mapping[str, str],
    chance: float,
    masks: Mapping[str, tasks.Masks] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[list[dict], list[dict]]:
    """Scores of one run on one slot.

    Args:
        test: the slot's test records, all of them. texts: raw answers by sample id.
        chance: score of the best constant answer. masks: see `masks_of`.

    Returns:
        Rows of the score table, one a metric (`COLUMNS`; chance and the 95 % bootstrap interval over
        samples only for the primary one), and one row a sample (`SAMPLE_COLUMNS`).

    Raises:
        ValueError: when a prediction is missing, or one is of no record.
    """
    try:
        result = tasks.score(slot, test, texts, **(masks or {}))
    except ValueError as error:
        raise ValueError(f"{run.name}: {error}; predict again") from error
    low, high = interval(bootstrap_means(result["per_sample"], resamples, seed))
    head = {"run": run.name, "family": run.family, "seed": run.seed, "slot": slot}
    counts = {name: result[name] for name in COLUMNS if name.startswith("n_")}
    rows = []
    for metric, value in result["metrics"].items():
        first = metric == tasks.get_slot(slot).metric
        extra = {"low": float(low), "high": float(high), "chance": float(chance)} if first else {}
        rows.append({**head, "metric": metric, "primary": first, "value": float(value), **extra, **counts})
    samples = [
        {**head, "id": name, "score": float(value)}
        for name, value in zip(result["ids"], result["per_sample"], strict=True)
    ]
    return rows, samples


def score_all(
    runs: Sequence[Run],
    slots: Sequence[str],
    data: str | Path,
    predictions: str | Path,
    out: str | Path,
    resamples: int = 2000,
    seed: int = 0,
    segmenter: str = "grabcut",
    workers: int = 1,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score every run on its slots.

    Cutting masks is nearly all of the time: about a tenth of a second each with GrabCut. So the scores of a run and slot stay
    beside its answers, in ``<slot>.scores.json``, and while answers, records and code are the same they are taken from there.

    Args:
        runs: what must be there.
        slots: test slots of the joint runs.
        data: root that holds ``AVUIE_2``.
        out: folder for the two tables, which `load` reads, and for ``metrics.json``, the nested `summary` for ``dvc metrics show``.
        segmenter: what cuts predicted masks, see `crab.models.segment.segmenter`.
        workers: processes that share the work.

    Returns:
        Score table (`COLUMNS`) and per-sample scores (`SAMPLE_COLUMNS`).

    Raises:
        RuntimeError: naming run and slot, on predictions that are missing or malformed.
    """
    truths = {slot: truth_digest(slot, "test", data) for slot in slots}
    pairs = [(run, slot) for slot in slots for run in runs if slot in run.slots(slots)]
    jobs = [
        (f"{run.name} {slot}", partial(_score_file, run, slot, data, truths[slot], predictions, resamples, seed, segmenter))
        for run, slot in sorted(pairs, key=lambda pair: not tasks.get_slot(pair[1]).masks)  # the slow ones first
    ]
    found = run_pool(jobs, workers, "score")
    scored = [found[f"{run.name} {slot}"] for run, slot in pairs]
    rows, samples = [row for part, _ in scored for row in part], [row for _, part in scored for row in part]
    table, tidy = pd.DataFrame(rows, columns=COLUMNS), pd.DataFrame(samples, columns=SAMPLE_COLUMNS)
    for name, frame in ((SCORES, table), (SAMPLES, tidy)):
        with atomic_file(Path(out) / name) as path:
            frame.to_csv(path, index=False, float_format="%.6g")
    write_json(Path(out) / "metrics.json", summary(table, tidy, resamples, seed))
    return table, tidy


def truth_digest(slot: str, split: str, data: str | Path) -> str:
    """Of a split's records, and of the pictures and masks that predicted masks are cut from and held against."""
    files = [Path(data) / tasks.json_path(slot, split)]
    if tasks.get_slot(slot).masks:
        files += [path for r in records.read(data, slot, split) for path in (r["mask"], *(item.path for item in r["media"]))]
    return key_of([file_digest(path) for path in files])


@cache
def _asked(slot: str, data: str | Path, truth: str, segmenter: str) -> tuple[list[dict], dict, float]:
    """Test records of a slot, what `crab.tasks.score` needs beside them, and the score of chance: once in each worker."""
    test, masks = records.read(data, slot, "test"), masks_of(slot, segmenter)
    return test, masks, tasks.chance(slot, test, **masks)


def _score_file(
    run: Run, slot: str, data, truth: str, predictions, resamples: int, seed: int, segmenter: str
) -> tuple[list[dict], list[dict]]:
    """`score_run` of the answers in a file, where it has not been done before. Run in a worker."""
    answers = Path(predictions) / run.name / f"{slot}.jsonl"
    kept = answers.with_suffix(".scores.json")
    key = key_of([file_digest(answers), truth, resamples, seed, segmenter, code_digest(SCORING)])
    found = read_json(kept) if kept.is_file() else {}
    if found.get("key") != key:
        test, masks, chance = _asked(slot, data, truth, segmenter)
        rows, samples = score_run(run, slot, test, read_predictions(answers, slot), chance, masks, resamples, seed)
        found = {"key": key, "rows": rows, "samples": samples}
        write_json(kept, found)
    return found["rows"], found["samples"]


def oracle(
    data: str | Path, slots: Sequence[str], segmenter: str = "grabcut", resamples: int = 2000, seed: int = 0, workers: int = 1
) -> pd.DataFrame:
    """Scores of the true answers to the pixel-level slots: masks cut from the true boxes and points.

    What these lack of 1 is the segmenter's own cost, and the best that a model which answers rightly can reach.

    Args:
        data: root that holds ``AVUIE_2``.
        slots: test slots; those not scored on masks are passed over.
        segmenter: see `crab.models.segment.segmenter`.
        workers: processes that share the work.

    Returns:
        One row a slot and metric (`ORACLE_COLUMNS`; the 95 % bootstrap interval only for the primary one).
    """
    jobs = [
        (slot, partial(_oracle_of, slot, data, segmenter, resamples, seed)) for slot in slots if tasks.get_slot(slot).masks
    ]
    rows = [row for part in run_pool(jobs, workers, "oracle").values() for row in part]
    return pd.DataFrame(rows, columns=ORACLE_COLUMNS)


def _oracle_of(name: str, data, segmenter: str, resamples: int, seed: int) -> list[dict]:
    """Rows of one slot. Run in a worker."""
    slot, test = tasks.get_slot(name), records.read(data, name, "test")
    result = tasks.score(name, test, {r["id"]: true_answer(name, r) for r in test}, **masks_of(name, segmenter))
    low, high = interval(bootstrap_means(result["per_sample"], resamples, seed))
    rows = []
    for metric, value in result["metrics"].items():
        first = metric == slot.metric
        row = {"segmenter": segmenter, "slot": name, "metric": metric, "primary": first, "value": float(value)}
        rows.append({**row, **({"low": low, "high": high} if first else {}), "n_expected": result["n_expected"]})
    return rows


def true_answer(slot: str, record: Mapping) -> str:
    """The bare answer to a record of a pixel-level slot.

    From its answer where it has one, which published test records do not; else from its mask. A mask of fewer than
    three pixels has no box and points: the answer is empty, and scored as one that cannot be read.
    """
    entry = tasks.get_slot(slot)
    if entry.answer_field in record or record.get("split") == "test_n":
        return tasks.answer(slot, tasks.truth(slot, record))
    mask = _true_mask(record)
    return tasks.answer(slot, (bounding_box(mask), points_inside(mask))) if mask.sum() >= 3 else ""


def load(folder: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two tables `score_all` wrote to ``folder``; a missing one is a ValueError."""
    frames = []
    for name, columns in ((SCORES, COLUMNS), (SAMPLES, SAMPLE_COLUMNS)):
        path = Path(folder) / name
        if not path.is_file():
            raise ValueError(f"{path}: no such file; run the evaluate stage")
        frame = pd.read_csv(path)
        if list(frame.columns) != columns:
            raise ValueError(f"{path}: columns {list(frame.columns)} are not {columns}; run the evaluate stage again")
        frames.append(frame)
    return frames[0], frames[1]


def summary(table: pd.DataFrame, samples: pd.DataFrame, resamples: int = 2000, seed: int = 0) -> dict:
    """Nested metrics, ``{family: {slot: {score, low, high, chance, expected, unparsable}, mean}}``, over the seeds of a family.

    The 95 % interval is over samples and, of several seeds, over these too (`crab.study.resample.bootstrap_means`): the mean
    of the intervals of single runs would not know how far apart these lie.

    Args:
        table: scores (`COLUMNS`). samples: the same a sample (`SAMPLE_COLUMNS`).
    """
    first = table[table["primary"].astype(bool)]
    of_samples = dict(list(samples.groupby(["family", "slot"], sort=False)))
    nested: dict[str, dict] = {}
    for (family, slot), part in first.groupby(["family", "slot"], sort=False):
        grid = of_samples[family, slot].pivot(index="seed", columns="id", values="score").to_numpy()
        low, high = interval(bootstrap_means(grid, resamples, seed, slot))
        nested.setdefault(family, {})[slot] = {
            "score": round(float(part["value"].mean()), 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "chance": round(float(part["chance"].mean()), 4),
            "expected": int(part["n_expected"].sum()),
            "unparsable": int(part["n_unparsable"].sum()),
        }
    for values in nested.values():
        values["mean"] = round(sum(v["score"] for v in values.values()) / len(values), 4)
    return nested


def finding(metrics: Mapping[str, Mapping]) -> str:
    """Of each family of runs the mean score and on how many slots its interval lies above chance: a Markdown list.

    Args:
        metrics: of `summary`.
    """
    lines = []
    for family, values in metrics.items():
        slots = {slot: v for slot, v in values.items() if slot != "mean"}
        above = [slot for slot, v in slots.items() if v["low"] > v["chance"]]
        rest = ", ".join(slot for slot in slots if slot not in above)
        unread, asked = (sum(v[count] for v in slots.values()) for count in ("unparsable", "expected"))
        lines.append(
            f"- `{family}`: {values['mean']:.3f} on average, clearly above chance on {len(above)} of {len(slots)} slots"
            + (f" (not on {rest})" if rest else "") + f"; {unread:,} of {asked:,} answers could not be read."
        )  # fmt: skip
    return "\n".join(lines)


def score_grid(table: pd.DataFrame, ceiling: pd.DataFrame | None = None) -> pd.DataFrame:
    """Primary scores, a row a slot and a column a family of runs (mean over seeds), chance beside them.

    Args:
        table: score table (`COLUMNS`).
        ceiling: rows of `oracle`, for a column of their own.
    """
    first = table[table["primary"].astype(bool)]
    slots, families = list(dict.fromkeys(first["slot"])), list(dict.fromkeys(first["family"]))
    grid = first.pivot_table(index="slot", columns="family", values="value").reindex(index=slots, columns=families)
    if ceiling is not None:
        grid.insert(0, "oracle", ceiling[ceiling["primary"].astype(bool)].groupby("slot")["value"].first())
    grid.insert(0, "chance", first.groupby("slot")["chance"].first())
    grid.insert(0, "metric", first.groupby("slot")["metric"].first())
    return grid.rename_axis(columns=None).round(3)


def examples(data: str | Path, predictions: str | Path, run: Run, slots: Sequence[str], each: int = 1) -> pd.DataFrame:
    """The first answers of a run beside what they were asked and the truth."""
    rows = []
    for slot in slots:
        texts = read_predictions(Path(predictions) / run.name / f"{slot}.jsonl", slot)
        for record in records.read(data, slot, "test")[:each]:
            truth = "the mask" if "mask" in record else str(tasks.truth(slot, record))
            rows.append({"slot": slot, "asked": tasks.instruction(slot, record), "truth": truth, "answer": texts[record["id"]]})
    return pd.DataFrame(rows)
