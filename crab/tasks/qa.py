"""Spatio-temporal reasoning: questions with a one-label answer, accuracy also by kind of question.

MUSIC-AVQA records hold ``type``, a JSON list as text, such as ``["Audio-Visual", "Location"]``:
the modality a question needs, then its kind. Every share is over questions, not over groups.
"""

from __future__ import annotations

import json
from typing import Any, Mapping, Sequence

from . import labels
from .labels import TAGS, answer, chance, parse, truth
from .registry import Slot, describe, required
from .text import clean

__all__ = ["TAGS", "answer", "chance", "measure", "parse", "question_type", "truth"]


def question_type(slot: Slot, record: Mapping[str, Any]) -> tuple[str, str]:
    """(modality, kind) of a question, lower case.

    Raises:
        ValueError: the field `type` is not a list of two words.
    """
    value = required(slot, record, "type")
    try:
        value = json.loads(value) if isinstance(value, str) else value
        modality, kind = value
        if not (isinstance(modality, str) and isinstance(kind, str)):
            raise ValueError
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{describe(slot, record)}: field 'type' is {record['type']!r:.80}; "
            'give a list such as ["Audio-Visual", "Location"]'
        ) from error
    return clean(modality), clean(kind)


def measure(slot: Slot, records: Sequence[Mapping[str, Any]], answers: Sequence[str | None]):
    """Accuracy over all, by modality (``accuracy/audio``) and by kind (``accuracy/audio/counting``)."""
    metrics, hits = labels.measure(slot, records, answers)
    kinds = [question_type(slot, record) for record in records]
    return metrics | labels.accuracy_by([(modality, f"{modality}/{kind}") for modality, kind in kinds], hits), hits
