"""Audio-visual video parsing (LLP): which events are heard, which are seen, and when.

Metrics follow the definition used with LLP (Tian, Li, Xu, "Unified Multisensory Perception: Weakly-
Supervised Audio-Visual Video Parsing", ECCV 2020). A clip is ten segments. For each class:

* *segment level*: true and false positives and false negatives are counted over segments;
* *event level*: maximal runs of segments are events; a predicted event is a true positive if its
  IoU with some true event is at least 0.5, else a false positive; a true event that no predicted one
  meets so is a false negative (events are not paired one to one).

A is over heard events, V over seen ones, AV over the segments in which a class is both. F =
2TP / (2TP + FP + FN) is averaged over the classes that a clip has in truth or prediction (1 where
there are none at all), then over clips. Type@AV is the mean of A, V and AV; Event@AV pools the counts
of A and V per class before F is taken. An unparsable answer scores 0 throughout, also where
"nothing" would have been right.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from .registry import Slot, describe
from .text import clean, spans

TAGS = ("audio", "visual")
SEGMENTS = 10
KINDS = ("a", "v", "av", "type_av", "event_av")
# Inside a label it is one interval too many of a malformed piece; "frying_(food)" and "horn, small" are labels.
_ANOTHER = re.compile(r"\(\s*\d+[\s,]+\d+\s*\)")
# A separator between the two is a must: "26" must not read as "2 6".
_INTERVAL = re.compile(r"\s*([0-9]{1,4})(?:\s*,\s*|\s+)([0-9]{1,4})\s*\)\s*")
NAMES = tuple(f"{level}_{kind}" for level in ("segment", "event") for kind in KINDS)


class ModalEvent(NamedTuple):
    """An event heard (``modality`` "audio") or seen ("visual") during the seconds [start, end)."""

    modality: str
    event: str
    start: int
    end: int


Parsing = tuple[ModalEvent, ...]


def answer(truth: Sequence[ModalEvent]) -> str:
    """``<audio>bell,(2 6)</audio> <visual>bell,(2 8)</visual>``, in the order given."""
    return " ".join(f"<{m}>{event},({start} {end})</{m}>" for m, event, start, end in truth)


def parse(text: str) -> Parsing | None:
    """All events of an answer in order; None if there is none or if any is malformed or reversed."""
    found = spans(text, TAGS)
    events = [_event(span.tag, span.inside) for span in found or ()]
    return tuple(events) if events and None not in events else None


def _event(modality: str, inside: str) -> ModalEvent | None:
    # The last bracket opens the interval: a label may hold brackets and commas of its own.
    head, bracket, tail = inside.rpartition("(")
    head = head.rstrip()
    if not bracket or not head.endswith(","):
        return None
    event = clean(head[:-1])
    match = _INTERVAL.fullmatch(tail)
    start, end = map(int, match.groups()) if match else (0, 0)
    if not event or _ANOTHER.search(event) or not 0 <= start < end <= SEGMENTS:
        return None
    return ModalEvent(modality, event, start, end)


def truth(slot: Slot, record: Mapping[str, Any]) -> Parsing:
    """The true events: from the answer field, else from `event` where that holds the tags."""
    for field in (slot.answer_field, "event"):
        events = parse(record.get(field, ""))
        if events:
            return events
    raise ValueError(
        f"{describe(slot, record)}: field '{slot.answer_field}' must hold events such as "
        f"<audio>bell,(2 6)</audio>, whole seconds 0 <= start < end <= {SEGMENTS}"
    )


def grid(events: Sequence[ModalEvent], classes: Sequence[str]) -> np.ndarray:
    """Events as a bool array [3 (audio, visual, both), classes, segments]."""
    out = np.zeros((3, len(classes), SEGMENTS), bool)
    row = {c: i for i, c in enumerate(classes)}
    for modality, event, start, end in events:
        out[TAGS.index(modality), row[event], start:end] = True
    out[2] = out[0] & out[1]
    return out


def runs(row: Sequence[bool]) -> list[tuple[int, int]]:
    """Maximal runs of true segments as (start, end)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.asarray(row, int), [0]))))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2])]


def segment_counts(true: np.ndarray, given: np.ndarray) -> np.ndarray:
    """(TP, FP, FN) over the last axis, stacked in front."""
    return np.stack([(true & given).sum(-1), (~true & given).sum(-1), (true & ~given).sum(-1)])


def event_counts(true: np.ndarray, given: np.ndarray) -> np.ndarray:
    """(TP, FP, FN) of runs over the last axis of [3, classes, segments], stacked in front."""
    counts = np.zeros((3, *true.shape[:-1]), int)
    for index in np.ndindex(true.shape[:-1]):
        actual, predicted = runs(true[index]), runs(given[index])
        hit = sum(any(_half(p, a) for a in actual) for p in predicted)
        missed = sum(not any(_half(p, a) for p in predicted) for a in actual)
        counts[(slice(None), *index)] = hit, len(predicted) - hit, missed
    return counts


def _half(a: tuple[int, int], b: tuple[int, int]) -> bool:
    shared = max(0, min(a[1], b[1]) - max(a[0], b[0]))
    return 2 * shared >= (a[1] - a[0]) + (b[1] - b[0]) - shared


def clip_scores(counts: np.ndarray) -> np.ndarray:
    """The five F of :data:`KINDS` from counts [3 (TP, FP, FN), ..., 3 (a, v, av), classes]: [5, ...]."""
    pooled = counts[..., 0, :] + counts[..., 1, :]
    a, v, av, event = (_mean_f(c) for c in (*(counts[..., i, :] for i in range(3)), pooled))
    return np.stack([a, v, av, (a + v + av) / 3, event])


def _mean_f(counts: np.ndarray) -> np.ndarray:
    f, present = _class_f(counts)
    return _average(f.sum(-1), present.sum(-1))


def _class_f(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F from counts [3, ...], 0 where there is nothing, and whether there is something."""
    tp, fp, fn = counts
    below = 2 * tp + fp + fn
    return 2 * tp / np.maximum(below, 1), below > 0


def _average(total: np.ndarray, present: np.ndarray) -> np.ndarray:
    return np.where(present > 0, total / np.maximum(present, 1), 1.0)


def measure(slot: Slot, records: Sequence[Mapping[str, Any]], answers: Sequence[Parsing | None]):
    """The ten F; per sample the segment-level Type@AV."""
    rows = []
    for record, given in zip(records, answers, strict=True):
        actual = truth(slot, record)
        if given is None:
            rows.append(np.zeros(len(NAMES)))
            continue
        classes = sorted({e.event for e in (*actual, *given)})
        t, g = grid(actual, classes), grid(given, classes)
        rows.append(np.concatenate([clip_scores(segment_counts(t, g)), clip_scores(event_counts(t, g))]))
    table = np.array(rows)
    return dict(zip(NAMES, map(float, table.mean(0)))), table[:, NAMES.index("segment_type_av")].tolist()


def chance(slot: Slot, records: Sequence[Mapping[str, Any]]) -> float:
    """Segment-level Type@AV of the best constant answer that a greedy search finds.

    Starting from nothing, the event (or the same event heard and seen) that helps most is added until
    none helps. Ranges tried: the whole clip and the three most frequent true ones.
    """
    truths = [truth(slot, r) for r in records]
    classes = sorted({e.event for events in truths for e in events})
    true = np.stack([grid(events, classes) for events in truths])
    frequent = Counter((e.start, e.end) for events in truths for e in events).most_common(3)
    ranges = {(0, SEGMENTS), *(r for r, _ in frequent)}
    extras = [
        (c, grid([ModalEvent(m, name, *r) for m in modalities], classes)[:, c])
        for c, name in enumerate(classes) for r in sorted(ranges) for modalities in (TAGS[:1], TAGS[1:], TAGS)
    ]
    held = grid((), classes)
    best = 0.0
    while True:
        # An addition changes one class only: the other classes' share of each clip's mean is kept.
        f, present = _class_f(segment_counts(true, np.broadcast_to(held, true.shape)))
        others = f.sum(-1, keepdims=True) - f, present.sum(-1, keepdims=True) - present
        tried = []
        for c, extra in extras:
            row = held[:, c] | extra
            row[2] = row[0] & row[1]
            f, present = _class_f(segment_counts(true[:, :, c], np.broadcast_to(row, true[:, :, c].shape)))
            value = _average(others[0][..., c] + f, others[1][..., c] + present).mean()
            tried.append((float(value), c, row))
        value, c, row = max(tried, key=lambda t: t[0])
        if value <= best + 1e-12:
            return best
        best = value
        held[:, c] = row
