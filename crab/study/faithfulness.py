"""Are right answers given for right reasons? Chains of explicit answers checked against the scene graph.

An answer is *right* when its primary score says so (`is_right`), and its reasons are right when it states something
and every statement of its chain is true of what the prompt shows and plays (`crab.world.verify`). Whether true
statements suffice for the answer is not asked. Everything follows from prediction files, per-sample scores and the
test records; scene graphs are known of generated data only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from crab import tasks
from crab.data import records
from crab.world import verify
from crab.data.files import atomic_file
from crab.study.resample import bootstrap_means, interval
from crab.study.runs import Run
from crab.study.score import read_predictions

RIGHT, LUCKY, WRONG = SHARES = ("right by right reasons", "right by wrong reasons", "wrong")
TRUE, UNREADABLE, COUNT = "statements true", "statements unreadable", "statements"
MEASURES = (*SHARES, TRUE, UNREADABLE, COUNT)
COLUMNS = ["family", "slot", "measure", "value", "low", "high", "chance", "n", "seeds"]

#: Primary metrics that grade an answer between 0 and 1.
GRADED = ("segment_accuracy", "segment_type_av", "J")


def is_right(slot: str | tasks.Slot, scores: Sequence[float]) -> np.ndarray:
    """Whether each answer counts as right, bool [samples].

    Args:
        scores: per-sample primary scores. Where the metric grades answers (`GRADED`) a right one has at
            least 0.5; elsewhere a wrong one has 0, and a right one 1 or its share of weighted F1.
    """
    scores = np.asarray(scores, float)
    return scores >= 0.5 if tasks.get_slot(slot).metric in GRADED else scores > 0


def counts(slot: str, texts: Sequence[str], shown: Sequence[verify.Evidence]) -> np.ndarray:
    """Statements of each answer that are true, unreadable, and all of them: int [samples, 3]."""
    verdicts = [[v.verdict for v in verify.verify_answer(slot, t, e)] for t, e in zip(texts, shown, strict=True)]
    return np.array([(v.count(verify.TRUE), v.count(verify.UNREADABLE), len(v)) for v in verdicts], int).reshape(-1, 3)


def measures(right: np.ndarray, found: np.ndarray, by_chance: np.ndarray, resamples: int, seed: int) -> list[dict]:
    """One row a measure: value, its 95 % interval over samples and seeds (`bootstrap_means`), and chance where that is known.

    Args:
        right: bool [seeds, samples]. found: of `counts`, [seeds, samples, 3].
        by_chance: the same of the same chains, each checked against another sample's scene.
    """
    true, unreadable, stated = np.moveaxis(found, -1, 0)
    reasons = (stated > 0) & (true == stated)
    one = np.ones(right.shape)
    ratios = {
        RIGHT: (right & reasons, one), LUCKY: (right & ~reasons, one), WRONG: (~right, one),
        TRUE: (true, stated), UNREADABLE: (unreadable, stated), COUNT: (stated, one),
    }  # fmt: skip
    rows = []
    for name, (above, below) in ratios.items():
        # equal shape and seed draw the same samples, so this is the ratio within each draw
        drawn = [bootstrap_means(part, resamples, seed) for part in (above, below)]
        kept = drawn[1] > 0
        low, high = interval(drawn[0][kept] / drawn[1][kept]) if kept.any() else (np.nan, np.nan)
        row = {"measure": name, "value": _ratio(above, below), "low": low, "high": high, "n": right.shape[1], "seeds": len(right)}
        rows.append({**row, "chance": _ratio(by_chance[..., 0], by_chance[..., 2])} if name == TRUE else row)
    return rows


def _ratio(above: np.ndarray, below: np.ndarray) -> float:
    return float(above.sum() / below.sum()) if below.sum() else float("nan")


def faithfulness(
    runs: Sequence[Run],
    slots: Sequence[str],
    data: str | Path,
    predictions: str | Path,
    samples: pd.DataFrame,
    out: str | Path | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Judge the chains of all explicit runs; others are passed over.

    Args:
        runs: predicted runs. slots: test slots of the joint ones.
        data: root that holds ``AVUIE_2``. predictions: ``<predictions>/<run>/<slot>.jsonl``.
        samples: per-sample scores of these runs, as `crab.study.score.score_all` returns and `load` reads them.
        out: csv to write.

    Returns:
        One row a family of runs, slot and measure (`COLUMNS`, `MEASURES`): three shares of the samples that sum to 1, the
        shares of statements that are true and that cannot be read (a statement weighs the same in every answer; no number
        where nothing is stated), and the mean number of statements. Chance, for the share of true statements, is
        that share when each chain is checked against another sample's scene. Empty where the data were not
        generated, since no scene graph is known then.

    Raises:
        ValueError: when a prediction or score is missing, or the records are not what the views make today.
    """
    explicit = [run for run in runs if run.form == "explicit"] if verify.known(data) else []
    rows = []
    for slot in slots:
        of_slot = [run for run in explicit if slot in run.slots(slots)]
        if not of_slot:
            continue
        test = records.read(data, slot, "test")
        ids, shown = [r["id"] for r in test], verify.read_evidence(data, slot, "test", test)
        # half a turn away, where no record shares its clip
        half = len(ids) // 2
        for family in dict.fromkeys(run.family for run in of_slot):
            right, found, by_chance = [], [], []
            for run in (run for run in of_slot if run.family == family):
                texts = read_predictions(Path(predictions) / run.name / f"{slot}.jsonl", slot)
                texts = _in_order(texts, ids, f"{run.name}, {slot}: prediction")
                part = samples[(samples["run"] == run.name) & (samples["slot"] == slot)]
                right.append(is_right(slot, _in_order(dict(zip(part["id"], part["score"])), ids, f"{run.name}, {slot}: score")))
                found.append(counts(slot, texts, shown))
                by_chance.append(counts(slot, texts, [*shown[half:], *shown[:half]]))
            made = measures(np.array(right), np.array(found), np.array(by_chance), resamples, seed)
            rows += [{"family": family, "slot": slot, **row} for row in made]
    table = pd.DataFrame(rows, columns=COLUMNS)
    if out is not None:
        with atomic_file(out) as path:
            table.to_csv(path, index=False, float_format="%.6g")
    return table


def _in_order(values: dict, ids: Sequence[str], what: str) -> list:
    missing = [i for i in ids if i not in values]
    if missing:
        raise ValueError(f"{what} of {len(missing)} of {len(ids)} samples is missing, e.g. {missing[0]}; run the evaluate stage")
    return [values[i] for i in ids]


def faithfulness_grid(table: pd.DataFrame) -> pd.DataFrame:
    """Values, a row a slot and a column a family of runs and measure, and the mean over slots."""
    slots, families = list(dict.fromkeys(table["slot"])), list(dict.fromkeys(table["family"]))
    grid = table.pivot_table(index="slot", columns=["family", "measure"], values="value", dropna=False)
    grid = grid.reindex(index=slots, columns=pd.MultiIndex.from_product([families, MEASURES]))
    if len(grid):
        grid.loc["mean"] = grid.mean()
    return grid.round(3)


def judged(data: str | Path, predictions: str | Path, run: Run, slots: Sequence[str], each: int = 1) -> pd.DataFrame:
    """The first answers of a run, a row a statement with its verdict."""
    rows = []
    for slot in slots if verify.known(data) else ():
        texts = read_predictions(Path(predictions) / run.name / f"{slot}.jsonl", slot)
        test = records.read(data, slot, "test")[:each]
        for record, shown in zip(test, verify.read_evidence(data, slot, "test", test), strict=True):
            for statement, verdict in verify.verify_answer(slot, texts[record["id"]], shown):
                rows.append({"slot": slot, "id": record["id"], "statement": statement, "verdict": verdict})
    return pd.DataFrame(rows, columns=["slot", "id", "statement", "verdict"])
