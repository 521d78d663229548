"""Are right answers given for the right reasons? From the scores and the statement counts of explicit answers.

An answer is right if its primary score says so (`is_right`). Its reasons are right if it states something and every
statement is true of what the prompt shows and plays. Whether the statements are enough to derive the answer is not
checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from crab import tasks
from crab.study.compare import bootstrap_means, interval
from crab.study.statements import COUNTS

RIGHT, LUCKY, WRONG = SHARES = ("right for right reasons", "right for wrong reasons", "wrong")
TRUE, UNREADABLE, COUNT = "statements true", "statements unreadable", "statements"
MEASURES = (*SHARES, TRUE, UNREADABLE, COUNT)
COLUMNS = ["family", "slot", "measure", "value", "low", "high", "chance", "n", "seeds"]

#: Primary metrics that grade an answer between 0 and 1.
GRADED = ("segment_accuracy", "segment_type_av", "J")


def is_right(slot: str | tasks.Slot, scores: Sequence[float]) -> np.ndarray:
    """Whether each answer counts as right, a bool per primary score.

    If the metric grades answers (`GRADED`), a right answer has at least 0.5. With the other metrics a wrong answer has
    0, and a right one has 1 or its share of weighted F1.
    """
    scores = np.asarray(scores, float)
    return scores >= 0.5 if tasks.get_slot(slot).metric in GRADED else scores > 0


def faithfulness(samples: pd.DataFrame, resamples: int = 2000) -> pd.DataFrame:
    """How often answers are right for right reasons.

    Args:
        samples: columns family, seed, slot, id, score and `COUNTS`. Rows without counts are left out. ValueError if the
            seeds of a family were scored on different samples.

    Returns `COLUMNS`, one row per family, slot and measure (`MEASURES`), with 95% intervals over samples and seeds:
    three shares of the answers, which sum to 1; the shares of all statements that are true and that are unreadable (NaN
    if there is no statement); and the mean number of statements. ``chance`` of the true share is the share that is true
    of another sample's scene.
    """
    rows = []
    for (slot, family), part in samples.dropna(subset=COUNTS).groupby(["slot", "family"], sort=False):
        tables = [part.pivot(index="seed", columns="id", values=name) for name in ("score", *COUNTS)]
        missing = tables[0].columns[tables[0].isna().any()]
        if len(missing):
            raise ValueError(
                f"faithfulness: {family}, {slot}: a seed lacks scores of {len(missing)} samples, e.g. {missing[0]}; "
                "run the evaluate stage again"
            )
        score, *counts = (table.to_numpy() for table in tables)  # [seeds, samples]
        measured = measures(is_right(slot, score), *counts, resamples)
        rows += [{"family": family, "slot": slot, **row} for row in measured]
    return pd.DataFrame(rows, columns=COLUMNS)


def measures(right, true, unreadable, stated, true_by_chance, resamples: int) -> list[dict]:
    """One row per measure, from arrays [seeds, samples]."""
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
        draws = [bootstrap_means(part, resamples, 0) for part in (above, below)]
        usable = draws[1] > 0
        low, high = interval(draws[0][usable] / draws[1][usable]) if usable.any() else (np.nan, np.nan)
        row = {"measure": name, "value": _ratio(above, below), "low": low, "high": high}
        chance = _ratio(true_by_chance, stated) if name == TRUE else np.nan
        rows.append({**row, "chance": chance, "n": right.shape[1], "seeds": len(right)})
    return rows


def _ratio(above: np.ndarray, below: np.ndarray) -> float:
    return float(above.sum() / below.sum()) if below.sum() else float("nan")
