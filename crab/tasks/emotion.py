"""Emotion recognition: one label, scored by accuracy, by WAR and UAR, or by weighted F1.

Which of them follows from the slot's primary metric. WAR, the weighted average recall, is accuracy;
UAR, the unweighted one, is the mean over the true classes of their recall. Weighted F1 is the mean over
samples of the F1 of their true class, F1 = 2TP / (2TP + FP + FN).
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Mapping, Sequence

from . import labels
from .labels import TAGS, answer, parse, truth
from .registry import Slot

__all__ = ["TAGS", "answer", "chance", "f1_shares", "measure", "parse", "truth", "uar"]


def uar(truths: Sequence[str], answers: Sequence[str | None]) -> float:
    """Mean recall of the true classes."""
    counts = Counter(truths)
    right = Counter(t for t, a in zip(truths, answers, strict=True) if a == t)
    return sum(right[label] / n for label, n in counts.items()) / len(counts)


def f1_shares(truths: Sequence[str], answers: Sequence[str | None]) -> list[float]:
    """What each sample adds to weighted F1, which is the mean of these shares.

    Weighted F1 is a sum over classes of (n / N) 2TP / (n + p), with n true and p predicted samples of the
    class. So a right answer adds 2n / (n + p) and a wrong one 0: above 1 where the class is predicted
    more rarely than it occurs, always below 2. Resampled shares hold each class's n and p fixed;
    they spread as the metric of resampled answers does, to within a fifth.
    """
    true, given = Counter(truths), Counter(answers)
    return [2 * true[t] / (true[t] + given[t]) if a == t else 0.0 for t, a in zip(truths, answers, strict=True)]


def measure(slot: Slot, records: Sequence[Mapping[str, Any]], answers: Sequence[str | None]):
    """The slot's metrics; per sample 1 or 0, for weighted F1 its share of it (:func:`f1_shares`)."""
    truths = [truth(slot, r) for r in records]
    metrics, hits = labels.accuracy(truths, answers)
    if slot.metric == "WAR":
        return {"WAR": metrics["accuracy"], "UAR": uar(truths, answers)}, hits
    if slot.metric == "weighted_f1":
        shares = f1_shares(truths, answers)
        return {"weighted_f1": sum(shares) / len(shares), **metrics}, shares
    return metrics, hits


def chance(slot: Slot, records: Sequence[Mapping[str, Any]]) -> float:
    """The primary metric of the best constant answer: every true label is tried."""
    tried = sorted({truth(slot, r) for r in records})
    return max(measure(slot, records, [label] * len(records))[0][slot.metric] for label in tried)
