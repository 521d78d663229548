"""Audio-visual matching: which of two videos goes with a sound, which of two sounds with a video.

Records name the right one by number; answers use a word. Both readings of the same choice count as
the same: ``1``, ``one``, ``first``.
"""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from . import labels
from .labels import TAGS, answer
from .registry import Slot, describe

__all__ = ["CHOICES", "TAGS", "answer", "chance", "measure", "parse", "truth"]

CHOICES = ("one", "two")
_SAME = {"1": "one", "first": "one", "2": "two", "second": "two"}


def parse(text: str) -> str | None:
    """``one``, ``two``, or whatever other label was answered; None if there is no one answer."""
    label = labels.parse(text)
    return _SAME.get(label, label)


def truth(slot: Slot, record: Mapping[str, Any]) -> str:
    """``one`` or ``two``."""
    label = labels.truth(slot, record)
    label = _SAME.get(label, label)
    if label not in CHOICES:
        raise ValueError(f"{describe(slot, record)}: field '{slot.truth_fields[0]}' is '{label[:80]}'; give 1 or 2")
    return label


def measure(slot: Slot, records: Sequence[Mapping[str, Any]], answers: Sequence[str | None]):
    """Accuracy and per-sample hits."""
    return labels.accuracy([truth(slot, r) for r in records], answers)


def chance(slot: Slot, records: Sequence[Mapping[str, Any]]) -> float:
    """Accuracy of always choosing the same one."""
    ones = sum(truth(slot, r) == "one" for r in records)
    return max(ones, len(records) - ones) / len(records)
