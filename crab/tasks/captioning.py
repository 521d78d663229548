"""Captioning: free text, for training only. There is no tag, and nothing is scored."""

from __future__ import annotations

from typing import Any, Mapping

from .registry import Slot, describe, required
from .text import readable

TAGS: tuple[str, ...] = ()


def answer(truth: str) -> str:
    """The caption itself."""
    return " ".join(truth.split())


def parse(text: str) -> str | None:
    """The caption, white space collapsed; None if there is none."""
    return (" ".join(text.split()) or None) if readable(text) else None


def truth(slot: Slot, record: Mapping[str, Any]) -> str:
    """The caption of a record."""
    caption = parse(required(slot, record, slot.answer_field))
    if caption is None:
        raise ValueError(f"{describe(slot, record)}: field '{slot.answer_field}' holds no caption")
    return caption


def measure(slot: Slot, records, answers):
    """Captions are not scored."""
    raise ValueError(f"slot {slot.name} is for training only and has no metric")


def chance(slot: Slot, records) -> float:
    """Captions are not scored."""
    raise ValueError(f"slot {slot.name} is for training only and has no metric")
