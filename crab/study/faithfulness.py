"""Are right answers given for the right reasons? Explicit answers checked against the scene graph.

An answer is right if its primary score says so (`is_right`). Its reasons are right if it states something and every
statement is true of what the prompt shows and plays (`crab.world.verify`). Whether the statements are enough to
derive the answer is not checked. Only generated data have a scene graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from crab import tasks
from crab.study.compare import bootstrap_means, interval
from crab.world import verify

RIGHT, LUCKY, WRONG = SHARES = ("right for right reasons", "right for wrong reasons", "wrong")
TRUE, UNREADABLE, COUNT = "statements true", "statements unreadable", "statements"
MEASURES = (*SHARES, TRUE, UNREADABLE, COUNT)
#: Statements of one answer: true, unreadable and all of them; and how many are true of another sample's scene.
COUNTS = ["true", "unreadable", "stated", "true_by_chance"]
COLUMNS = ["family", "slot", "measure", "value", "low", "high", "chance", "n", "seeds"]

#: Primary metrics that grade an answer between 0 and 1.
GRADED = ("segment_accuracy", "segment_type_av", "J")


def is_right(slot: str | tasks.Slot, scores: Sequence[float]) -> np.ndarray:
    """Whether each answer counts as right, bool [samples], from its primary score.

    If the metric grades answers (`GRADED`), a right answer has at least 0.5. With the other metrics a wrong answer has
    0, and a right one has 1 or its share of weighted F1.
    """
    scores = np.asarray(scores, float)
    return scores >= 0.5 if tasks.get_slot(slot).metric in GRADED else scores > 0


def statement_counts(
    dataset: str | Path, slot: str, records: Sequence[Mapping], texts: Mapping[str, str]
) -> list[list[int]]:
    """`COUNTS` of the answer to each record.

    Args:
        dataset: root that holds ``AVUIE_2``.
        records: all test records of the slot.
        texts: answer by sample id.

    Returns:
        One row per record; an empty list if the data were not generated.

    Raises:
        RecordError: a record is not what the generator makes today.
    """
    if not verify.known(dataset):
        return []
    shown = verify.read_evidence(dataset, slot, "test", records)
    half = len(shown) // 2  # half a turn away no record shares its clip
    rows = []
    for record, own, other in zip(records, shown, [*shown[half:], *shown[:half]], strict=True):
        text = texts[record["id"]]
        verdicts, by_chance = ([v.verdict for v in verify.verify_answer(slot, text, scene)] for scene in (own, other))
        true, unreadable = (verdicts.count(verdict) for verdict in (verify.TRUE, verify.UNREADABLE))
        rows.append([true, unreadable, len(verdicts), by_chance.count(verify.TRUE)])
    return rows


def faithfulness(samples: pd.DataFrame, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """How often answers are right for right reasons.

    Args:
        samples: columns family, seed, slot, id, score and `COUNTS`. Rows without counts are left out.

    Returns:
        `COLUMNS`, one row per family, slot and measure (`MEASURES`), with 95 % intervals over samples and seeds: three
        shares of the samples, which sum to 1; the shares of all statements that are true and that are unreadable (NaN
        if there is no statement); and the mean number of statements. ``chance`` of the true share is the share that
        is true of another sample's scene.

    Raises:
        ValueError: the seeds of a family were tested on different samples.
    """
    rows = []
    for (slot, family), part in samples.dropna(subset=COUNTS).groupby(["slot", "family"], sort=False):
        tables = {name: part.pivot(index="seed", columns="id", values=name) for name in ("score", *COUNTS)}
        missing = tables["score"].columns[tables["score"].isna().any()]
        if len(missing):
            raise ValueError(
                f"faithfulness: {family}, {slot}: {len(missing)} samples lack the score of a seed, e.g. {missing[0]}; "
                "run the evaluate stage again"
            )
        score, *counts = (table.to_numpy() for table in tables.values())  # [seeds, samples]
        measured = measures(is_right(slot, score), *counts, resamples=resamples, seed=seed)
        rows += [{"family": family, "slot": slot, **row} for row in measured]
    return pd.DataFrame(rows, columns=COLUMNS)


def measures(right: np.ndarray, true, unreadable, stated, true_by_chance, resamples: int, seed: int) -> list[dict]:
    """One row per measure; all arrays are [seeds, samples]."""
    reasons = (stated > 0) & (true == stated)
    one = np.ones(right.shape)
    ratios = {
        RIGHT: (right & reasons, one),
        LUCKY: (right & ~reasons, one),
        WRONG: (~right, one),
        TRUE: (true, stated),
        UNREADABLE: (unreadable, stated),
        COUNT: (stated, one),
    }
    rows = []
    for name, (above, below) in ratios.items():
        # equal shapes and seeds draw the same samples, so this is the ratio within each draw
        draws = [bootstrap_means(part, resamples, seed) for part in (above, below)]
        usable = draws[1] > 0
        low, high = interval(draws[0][usable] / draws[1][usable]) if usable.any() else (np.nan, np.nan)
        row = {"measure": name, "value": _ratio(above, below), "low": low, "high": high}
        row["chance"] = _ratio(true_by_chance, stated) if name == TRUE else np.nan
        rows.append({**row, "n": right.shape[1], "seeds": len(right)})
    return rows


def _ratio(above: np.ndarray, below: np.ndarray) -> float:
    return float(above.sum() / below.sum()) if below.sum() else float("nan")


def judged(dataset: str | Path, slot: str, records: Sequence[Mapping], texts: Mapping[str, str]) -> pd.DataFrame:
    """One row per statement of the answers to the first test records, with its verdict; empty without scene graphs.

    Args:
        records: the first records of the slot's test split, as many as are wanted.
        texts: answer by sample id.
    """
    shown = verify.read_evidence(dataset, slot, "test", records) if verify.known(dataset) else []
    rows = [
        {"slot": slot, "id": record["id"], "statement": statement, "verdict": verdict}
        for record, scene in zip(records, shown, strict=False)
        for statement, verdict in verify.verify_answer(slot, texts[record["id"]], scene)
    ]
    return pd.DataFrame(rows, columns=["slot", "id", "statement", "verdict"])
