"""Action recognition: one label, scored by top-1 accuracy.

The published UCF-101 records name a class ("ApplyEyeMakeup") where the answer to be learned may write it in words. So labels
are the same if they differ only in how their words are parted; they are shown and counted as they are written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from . import labels
from .labels import TAGS, answer, parse, truth
from .registry import Slot

__all__ = ["TAGS", "answer", "chance", "measure", "parse", "same", "truth"]


def _joined(label: str | None) -> str | None:
    """A label, as compared, without what parts its words."""
    return None if label is None else re.sub(r"[\s_-]", "", label) or label


def same(one: str, other: str) -> bool:
    """Whether two labels are the same but for the parting of words: "apply eye makeup" and "applyeyemakeup" are."""
    return _joined(one) == _joined(other)


def measure(slot: Slot, records: Sequence[Mapping[str, Any]], answers: Sequence[str | None]):
    """Accuracy and per-sample hits."""
    return labels.accuracy([_joined(truth(slot, r)) for r in records], [_joined(a) for a in answers])


def chance(slot: Slot, records: Sequence[Mapping[str, Any]]) -> float:
    """Accuracy of always giving the most frequent true label."""
    return max(Counter(_joined(truth(slot, r)) for r in records).values()) / len(records)
