"""Answers that are one label in ``<answer>...</answer>``: question answering, emotion, action, matching.

What these families share: the grammar, the truth taken from a record, accuracy, and the majority
answer as chance.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Iterable, Mapping, Sequence

from .registry import Slot, describe, required
from .text import clean, only

TAGS = ("answer",)


def answer(truth: str) -> str:
    """The tagged answer of a label."""
    return f"<answer>{truth}</answer>"


def parse(text: str) -> str | None:
    """The label of the one answer in a text, as compared; None if there is no such label."""
    inside = only(text, "answer")
    return clean(inside) or None if inside is not None else None


def truth(slot: Slot, record: Mapping[str, Any]) -> str:
    """The true label of a record, as compared."""
    label = clean(required(slot, record, slot.truth_fields[0]))
    if not label:
        raise ValueError(f"{describe(slot, record)}: field '{slot.truth_fields[0]}' is empty; give the true label")
    return label


def accuracy(truths: Sequence[str], answers: Sequence[str | None]) -> tuple[dict[str, float], list[float]]:
    """Share of right labels, and 1 or 0 for each sample; no answer is a wrong one."""
    hits = [float(a is not None and a == t) for t, a in zip(truths, answers, strict=True)]
    return {"accuracy": sum(hits) / len(hits)}, hits


def accuracy_by(groups: Sequence[Iterable[str]], hits: Sequence[float]) -> dict[str, float]:
    """Accuracy within each group, ``accuracy/<group>``, in order of name.

    Args:
        groups: of each sample, the groups it belongs to. hits: of each sample, 1 or 0.
    """
    members: dict[str, list[float]] = {}
    for names, hit in zip(groups, hits, strict=True):
        for name in names:
            members.setdefault(f"accuracy/{name}", []).append(hit)
    return {name: sum(group) / len(group) for name, group in sorted(members.items())}


def measure(slot: Slot, records: Sequence[Mapping[str, Any]], answers: Sequence[str | None]):
    """Metrics and per-sample scores."""
    return accuracy([truth(slot, r) for r in records], answers)


def chance(slot: Slot, records: Sequence[Mapping[str, Any]]) -> float:
    """Accuracy of always giving the most frequent true label."""
    counts = Counter(truth(slot, r) for r in records)
    return max(counts.values()) / len(records)
