"""Temporal localization of one event that is both seen and heard (AVE).

A clip is ten one-second segments; each is the event or background. The metric is the share of
segments labelled right, background included (Tian et al., "Audio-Visual Event Localization in
Unconstrained Videos", ECCV 2018). A prediction outside its range is background.
"""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from .registry import Slot, describe, required, whole
from .text import clean, integers, spans

TAGS = ("event", "range")
SEGMENTS = 10


class EventRange(NamedTuple):
    """An event and the seconds [start, end) in which it is both seen and heard."""

    event: str
    start: int
    end: int


def answer(truth: EventRange) -> str:
    """``<event>bell</event> <range>2,6</range>``."""
    event, start, end = truth
    return f"<event>{event}</event> <range>{start},{end}</range>"


def parse(text: str) -> EventRange | None:
    """The one event and its range, in either order; None if not one of each with 0 <= start < end <= 10."""
    found = spans(text, TAGS)
    if not found or sorted(s.tag for s in found) != ["event", "range"]:
        return None
    inside = {s.tag: s.inside for s in found}
    seconds = integers(inside["range"], "# , #")
    event = clean(inside["event"])
    if not event or not seconds or not 0 <= seconds[0] < seconds[1] <= SEGMENTS:
        return None
    return EventRange(event, *seconds)


def truth(slot: Slot, record: Mapping[str, Any]) -> EventRange:
    """The true event and range of a record."""
    event, start, end = (required(slot, record, f) for f in slot.truth_fields)
    try:
        start, end = whole(start), whole(end)
    except ValueError:
        start = end = -1
    if not clean(event) or not 0 <= start < end <= SEGMENTS:
        raise ValueError(
            f"{describe(slot, record)}: fields {', '.join(slot.truth_fields)} must be a label and whole seconds "
            f"0 <= start < end <= {SEGMENTS}, not {', '.join(f'{record[f]!r:.40}' for f in slot.truth_fields)}"
        )
    return EventRange(clean(event), start, end)


def segment_labels(value: EventRange) -> list[str | None]:
    """The label of each segment, None for background."""
    return [value.event if value.start <= s < value.end else None for s in range(SEGMENTS)]


def measure(slot: Slot, records: Sequence[Mapping[str, Any]], answers: Sequence[EventRange | None]):
    """Segment accuracy; also, for reading errors, the accuracy of the event label alone."""
    scores, events = [], []
    for record, given in zip(records, answers, strict=True):
        true = truth(slot, record)
        if given is None:
            scores.append(0.0)
            events.append(False)
            continue
        pairs = zip(segment_labels(true), segment_labels(given))
        scores.append(sum(t == g for t, g in pairs) / SEGMENTS)
        events.append(true.event == given.event)
    return {"segment_accuracy": sum(scores) / len(scores), "event_accuracy": sum(events) / len(events)}, scores


def chance(slot: Slot, records: Sequence[Mapping[str, Any]]) -> float:
    """Segment accuracy of the best constant answer: every true label with every range is tried."""
    rows = [segment_labels(truth(slot, r)) for r in records]
    background = np.array([sum(row[s] is None for row in rows) for s in range(SEGMENTS)])
    best = 0
    for event in {label for row in rows for label in row if label is not None}:
        inside = np.array([sum(row[s] == event for row in rows) for s in range(SEGMENTS)])
        for start in range(SEGMENTS):
            for end in range(start + 1, SEGMENTS + 1):
                right = background.sum() + (inside - background)[start:end].sum()
                best = max(best, int(right))
    return best / (SEGMENTS * len(rows))
