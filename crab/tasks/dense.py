"""Dense temporal localization (UnAV-100): several events, each seen and heard, that may overlap. Train only.

An answer is pairs of the tags of AVE, the event first. The clips are untrimmed: a range may end later
than ten seconds, and its seconds may have decimals.
"""

from __future__ import annotations

import re
from typing import Any, Mapping, Sequence

from . import temporal
from .registry import Slot, describe
from .temporal import TAGS, EventRange
from .text import clean, spans

__all__ = ["TAGS", "Events", "answer", "parse", "truth"]

Events = tuple[EventRange, ...]

_SECONDS = r"\s*([0-9]{1,4}(?:\.[0-9]{1,3})?)\s*"
_RANGE = re.compile(f"{_SECONDS},{_SECONDS}")


def answer(truth: Sequence[EventRange]) -> str:
    """``<event>bell</event> <range>2,6</range> <event>drum</event> <range>0,4</range>``, in the order given."""
    return " ".join(temporal.answer(event) for event in truth)


def parse(text: str) -> Events | None:
    """All events of an answer in order; None if there is none, if one lacks its range or if any is malformed."""
    found = spans(text, TAGS)
    if not found or [span.tag for span in found] != [*TAGS] * (len(found) // 2):
        return None
    events = [_event(name.inside, times.inside) for name, times in zip(found[::2], found[1::2])]
    return tuple(events) if None not in events else None


def _event(name: str, times: str) -> EventRange | None:
    match = _RANGE.fullmatch(times)
    start, end = (float(v) if "." in v else int(v) for v in match.groups()) if match else (0, 0)
    return EventRange(clean(name), start, end) if clean(name) and start < end else None


def truth(slot: Slot, record: Mapping[str, Any]) -> Events:
    """The true events of a record, from its answer."""
    events = parse(record.get(slot.answer_field, ""))
    if events is None:
        raise ValueError(
            f"{describe(slot, record)}: field '{slot.answer_field}' must hold events such as "
            "<event>bell</event> <range>2,6</range>, start before end"
        )
    return events
