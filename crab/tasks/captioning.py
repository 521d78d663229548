"""Captioning: free text, for training only. There is no tag: the bare answer is the whole of it."""

from __future__ import annotations

from typing import Any, Mapping

from .registry import Slot, describe, required
from .text import readable

TAGS: tuple[str, ...] = ()


def answer(truth: str) -> str:
    """The caption itself."""
    return " ".join(truth.split())


def bare(text: str) -> str:
    """The caption as it is."""
    return text


def parse(text: str) -> str | None:
    """The caption, white space collapsed; None if there is none."""
    return (" ".join(text.split()) or None) if readable(text) else None


def truth(slot: Slot, record: Mapping[str, Any]) -> str:
    """The caption of a record."""
    caption = parse(required(slot, record, slot.answer_field))
    if caption is None:
        raise ValueError(f"{describe(slot, record)}: field '{slot.answer_field}' holds no caption")
    return caption
