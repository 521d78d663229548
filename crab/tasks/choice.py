"""Multiple choice (AVQA): the answer says one of the choices that the question offers.

Scored by accuracy over all, and by what a question relates to (the sound, the view or both) and its
type (Yang et al., "AVQA: A Dataset for Audio-Visual Question Answering on Videos", ACM MM 2022).
Published records hold the answer as its place among the choices, counted from 0.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Mapping, Sequence

from . import labels
from .labels import TAGS, answer, parse
from .registry import Slot, describe, required
from .text import clean

__all__ = ["TAGS", "answer", "chance", "choices", "measure", "parse", "truth"]

GROUPS = {"relation": "question_relation", "type": "question_type"}


def choices(slot: Slot, record: Mapping[str, Any]) -> list[str]:
    """What a record offers, as compared.

    Raises:
        ValueError: the field `multi_choice` is no list of two or more labels.
    """
    value = required(slot, record, "multi_choice")
    offered = [clean(v) for v in value] if isinstance(value, (list, tuple)) else []
    if len(offered) < 2 or not all(offered):
        raise ValueError(f"{describe(slot, record)}: field 'multi_choice' is {value!r:.80}; give a list of labels")
    return offered


def truth(slot: Slot, record: Mapping[str, Any]) -> str:
    """The words of the right choice, whether the record gives them or their place among the choices."""
    offered = choices(slot, record)
    field = slot.truth_fields[0]
    value = required(slot, record, field)
    if clean(value) in offered and isinstance(value, str):
        return clean(value)
    place = str(value)
    if place.isascii() and place.isdigit() and len(place) < 4 and int(place) < len(offered):
        return offered[int(place)]
    raise ValueError(
        f"{describe(slot, record)}: field '{field}' is {value!r:.80}; give one of the choices "
        f"{', '.join(offered):.200}, or its place from 0 to {len(offered) - 1}"
    )


def measure(slot: Slot, records: Sequence[Mapping[str, Any]], answers: Sequence[str | None]):
    """Accuracy over all, by relation (``accuracy/relation/both``) and by type (``accuracy/type/which``)."""
    metrics, hits = labels.accuracy([truth(slot, r) for r in records], answers)
    groups = [[f"{name}/{clean(required(slot, r, field))}" for name, field in GROUPS.items()] for r in records]
    return metrics | labels.accuracy_by(groups, hits), hits


def chance(slot: Slot, records: Sequence[Mapping[str, Any]]) -> float:
    """Accuracy of always taking the same place among the choices, or the same words, whichever is higher."""
    truths = [truth(slot, r) for r in records]
    places = [choices(slot, r).index(t) for r, t in zip(records, truths)]
    return max(max(Counter(values).values()) for values in (truths, places)) / len(records)
