"""Temporal localization: the events of a clip and their seconds (AVE, UnAV-100, LLP)."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .answers import Kind, Scores, clean, integers, spans
from .fields import Record, describe, required, whole
from .registry import Slot

SEGMENTS = 10


class EventRange(NamedTuple):
    """An event and the seconds [start, end) in which it is both seen and heard."""

    event: str
    start: int | float
    end: int | float


class ModalEvent(NamedTuple):
    """An event that is heard (modality "audio") or seen ("visual") during the seconds [start, end)."""

    modality: str
    event: str
    start: int
    end: int


class OneEvent(Kind):
    """AVE: ``<event>bell</event> <range>2,6</range>``, in either order.

    A clip has ten one-second segments. Each is the event or background. The metric is the share of segments with the
    right label, background included (Tian et al., "Audio-Visual Event Localization in Unconstrained Videos", 2018).
    """

    tags = ("event", "range")

    def answer(self, truth: EventRange) -> str:
        event, start, end = truth
        return f"<event>{event}</event> <range>{start},{end}</range>"

    def parse(self, text: str) -> EventRange | None:
        pieces = spans(text, self.tags) or ()
        inside = {piece.tag: piece.inside for piece in pieces}
        if len(pieces) != 2 or len(inside) != 2:
            return None
        event, seconds = clean(inside["event"]), integers(inside["range"], "# , #")
        return EventRange(event, *seconds) if event and seconds and seconds[0] < seconds[1] <= SEGMENTS else None

    def truth(self, slot: Slot, record: Record) -> EventRange:
        event, *seconds = values = [required(slot, record, field) for field in slot.truth_fields]
        event, start, end = clean(event), *map(whole, seconds)
        if not event or not 0 <= start < end <= SEGMENTS:
            raise ValueError(
                f"{describe(slot, record)}: fields {', '.join(slot.truth_fields)} must be a label and whole seconds "
                f"0 <= start < end <= {SEGMENTS}, not {', '.join(f'{value!r:.40}' for value in values)}"
            )
        return EventRange(event, start, end)

    def measure(self, slot: Slot, records: Sequence[Record], answers: Sequence, masks=None) -> Scores:
        """Segment accuracy, and the accuracy of the event alone."""
        scores, events = [], 0
        for record, answer in zip(records, answers, strict=True):
            truth, answer = self.truth(slot, record), answer or EventRange("", 0, 0)
            right = sum(t == a for t, a in zip(_segments(truth), _segments(answer), strict=True))
            scores.append(right / SEGMENTS if answer.event else 0.0)
            events += truth.event == answer.event
        return {"segment_accuracy": sum(scores) / len(scores), "event_accuracy": events / len(scores)}, scores

    def chance(self, slot: Slot, records: Sequence[Record], masks=None) -> float:
        """Every true event is tried with every range."""
        rows = np.array([_segments(self.truth(slot, record)) for record in records], object)
        background = (rows == "").sum(0)
        ranges = [(start, end) for start in range(SEGMENTS) for end in range(start + 1, SEGMENTS + 1)]
        gains = [(rows == event).sum(0) - background for event in {*rows.ravel()} - {""}]
        return (int(background.sum()) + max(int(gain[a:b].sum()) for gain in gains for a, b in ranges)) / rows.size


def _segments(value: EventRange) -> list[str]:
    """The label of each segment, "" for background."""
    return [value.event if value.start <= second < value.end else "" for second in range(SEGMENTS)]


class Events(Kind):
    """UnAV-100, train only: several events that may overlap, each followed by its range.

    The clips are untrimmed: a range may end after ten seconds, and its seconds may have decimals.
    """

    tags = OneEvent.tags
    example = "events such as <event>bell</event> <range>2,6</range>, start before end"

    def answer(self, truth: Sequence[EventRange]) -> str:
        return " ".join(OneEvent().answer(event) for event in truth)

    def parse(self, text: str) -> tuple[EventRange, ...] | None:
        pieces = spans(text, self.tags)
        if not pieces or [piece.tag for piece in pieces] != [*self.tags] * (len(pieces) // 2):
            return None
        events = [self._event(a.inside, b.inside) for a, b in zip(pieces[::2], pieces[1::2], strict=True)]
        return None if None in events else tuple(events)

    def _event(self, name: str, seconds: str) -> EventRange | None:
        number = r"\s*([0-9]{1,4}(?:\.[0-9]{1,3})?)\s*"
        match = re.fullmatch(f"{number},{number}", seconds)
        start, end = (float(v) if "." in v else int(v) for v in match.groups()) if match else (0, 0)
        return EventRange(clean(name), start, end) if clean(name) and start < end else None


class Parsing(Kind):
    """LLP, audio-visual video parsing: ``<audio>bell,(2 6)</audio> <visual>bell,(2 8)</visual>``, any number of each.

    The metrics are those of Tian, Li, Xu, "Unified Multisensory Perception: Weakly-Supervised Audio-Visual Video
    Parsing", ECCV 2020. Segment level counts segments as TP, FP and FN. Event level counts maximal runs: an answered
    run is a TP if its IoU with some true run is at least 0.5, else an FP. A true run without such a match is an FN.

    A is for heard events, V for seen events, AV for segments in which a class is both. F = 2TP / (2TP + FP + FN) is
    averaged over the classes in the truth or the answer of a clip (1 if there are none), then over clips. Type@AV is
    the mean of A, V and AV. Event@AV adds the counts of A and V before F. An unreadable answer scores 0 everywhere.
    """

    tags = ("audio", "visual")
    example = f"events such as <audio>bell,(2 6)</audio>, whole seconds 0 <= start < end <= {SEGMENTS}"
    metrics = [f"{level}_{kind}" for level in ("segment", "event") for kind in ("a", "v", "av", "type_av", "event_av")]

    def answer(self, truth: Sequence[ModalEvent]) -> str:
        return " ".join(f"<{modality}>{event},({start} {end})</{modality}>" for modality, event, start, end in truth)

    def parse(self, text: str) -> tuple[ModalEvent, ...] | None:
        events = [self._event(piece.tag, piece.inside) for piece in spans(text, self.tags) or ()]
        return tuple(events) if events and None not in events else None

    def _event(self, modality: str, inside: str) -> ModalEvent | None:
        # The last bracket opens the interval, because a label may hold brackets and commas. The two numbers need a
        # separator: "26" is not "2 6". A second interval is an error, but "frying_(food)" is a label.
        head, _, tail = inside.rpartition("(")
        name, comma, rest = head.rpartition(",")
        event, interval = clean(name), re.fullmatch(r"\s*([0-9]{1,4})(?:\s*,\s*|\s+)([0-9]{1,4})\s*\)\s*", tail)
        if not event or not comma or rest.strip() or not interval or re.search(r"\(\s*\d+[\s,]+\d+\s*\)", event):
            return None
        start, end = map(int, interval.groups())
        return ModalEvent(modality, event, start, end) if start < end <= SEGMENTS else None

    def truth(self, slot: Slot, record: Record) -> tuple[ModalEvent, ...]:
        """The true events, from the answer, or from a field `event` that holds the tags."""
        events = self.parse(record.get(slot.answer_field, "")) or self.parse(record.get("event", ""))
        return events or super().truth(slot, record)

    def measure(self, slot: Slot, records: Sequence[Record], answers: Sequence, masks=None) -> Scores:
        """Ten F; per sample the segment-level Type@AV."""
        rows = []
        for record, events in zip(records, answers, strict=True):
            truth = self.truth(slot, record)
            if events is None:
                rows.append([0.0] * len(self.metrics))
                continue
            classes = sorted({event.event for event in (*truth, *events)})
            grids = _grid(truth, classes), _grid(events, classes)
            rows.append(_clip_scores(_segment_counts(*grids)) + _clip_scores(_run_counts(*grids)))
        table = np.array(rows)
        primary = table[:, self.metrics.index(slot.metric)]
        return dict(zip(self.metrics, map(float, table.mean(0)), strict=True)), primary.tolist()

    def chance(self, slot: Slot, records: Sequence[Record], masks=None) -> float:
        """A greedy search adds the event that helps most, heard, seen or both, until none helps.

        It tries the whole clip and the three most frequent true intervals.
        """
        truths = [self.truth(slot, record) for record in records]
        classes = sorted({event.event for events in truths for event in events})
        true = np.stack([_grid(events, classes) for events in truths])
        frequent = Counter((event.start, event.end) for events in truths for event in events).most_common(3)
        intervals = sorted({(0, SEGMENTS), *(interval for interval, _ in frequent)})
        additions = [
            (c, _grid([ModalEvent(modality, name, *interval) for modality in modalities], classes)[:, c])
            for c, name in enumerate(classes)
            for interval in intervals
            for modalities in (self.tags[:1], self.tags[1:], self.tags)
        ]
        answer, best = _grid((), classes), 0.0
        while True:
            # An addition changes one class. The share of the other classes in the mean of a clip stays the same.
            f, present = _class_f(_segment_counts(true, np.broadcast_to(answer, true.shape)))
            other_f, other_present = f.sum(-1, keepdims=True) - f, present.sum(-1, keepdims=True) - present
            tried = []
            for c, addition in additions:
                row = answer[:, c] | addition
                row[2] = row[0] & row[1]
                f, present = _class_f(_segment_counts(true[:, :, c], np.broadcast_to(row, true[:, :, c].shape)))
                value = _average(other_f[..., c] + f, other_present[..., c] + present).mean()
                tried.append((float(value), c, row))
            value, c, row = max(tried, key=lambda trial: trial[0])
            if value <= best + 1e-12:
                return best
            best, answer[:, c] = value, row


def _grid(events: Sequence[ModalEvent], classes: Sequence[str]) -> np.ndarray:
    """Events as a bool array [3 (audio, visual, both), classes, segments]."""
    grid = np.zeros((3, len(classes), SEGMENTS), bool)
    rows = {name: row for row, name in enumerate(classes)}
    for modality, event, start, end in events:
        grid[Parsing.tags.index(modality), rows[event], start:end] = True
    grid[2] = grid[0] & grid[1]
    return grid


def _segment_counts(true: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Counts [3 (TP, FP, FN), ...] of segments, the last axis of [..., segments]."""
    return np.stack([(true & answer).sum(-1), (~true & answer).sum(-1), (true & ~answer).sum(-1)])


def _run_counts(true: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Counts [3 (TP, FP, FN), ...] of runs along the last axis of [..., segments]."""
    counts = np.zeros((3, *true.shape[:-1]), int)
    for index in np.ndindex(true.shape[:-1]):
        truths, answers = _runs(true[index]), _runs(answer[index])
        hits = sum(any(2 * len(a & t) >= len(a | t) for t in truths) for a in answers)
        missed = sum(not any(2 * len(a & t) >= len(a | t) for a in answers) for t in truths)
        counts[(slice(None), *index)] = hits, len(answers) - hits, missed
    return counts


def _runs(row: np.ndarray) -> list[set[int]]:
    """Maximal runs of true segments."""
    edges = np.flatnonzero(np.diff(row, prepend=False, append=False)).tolist()
    return [set(range(start, end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _clip_scores(counts: np.ndarray) -> list[float]:
    """A, V, AV, Type@AV and Event@AV of a clip, from counts [3 (TP, FP, FN), 3 (a, v, av), classes]."""
    f, present = _class_f(np.concatenate([counts, counts[:, :1] + counts[:, 1:2]], 1))
    a, v, av, event = _average(f.sum(-1), present.sum(-1))
    return [a, v, av, (a + v + av) / 3, event]


def _class_f(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F from counts [3, ...], 0 if there is nothing to count, and whether there is something."""
    tp, fp, fn = counts
    total = 2 * tp + fp + fn
    return 2 * tp / np.maximum(total, 1), total > 0


def _average(total: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The mean over the classes that are present; 1 if there are none."""
    return np.where(present > 0, total / np.maximum(present, 1), 1.0)
