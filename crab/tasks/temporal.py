"""Temporal localization: the events of a clip and their seconds (AVE, UnAV-100, LLP)."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .answers import NUMBER, Kind, Partly, Scores, clean, readable, same, seconds, spans
from .fields import Record, describe, required, whole
from .registry import Slot

SEGMENTS = 10
_INTERVAL = re.compile(rf"\(\s*{NUMBER}(?:\s*,\s*|\s+){NUMBER}\s*\)")
#: What an answer may say if nothing is heard, or nothing is seen.
NOTHING = "none;nothing;no event;no events;nothing is heard;nothing is seen;i hear nothing;i see nothing".split(";")


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

    def parse(self, text: str, record: Record | None = None) -> EventRange | None:
        pieces = {(piece.tag, same(piece.inside)): piece for piece in spans(text, self.tags) or ()}
        if sorted(tag for tag, _ in pieces) != sorted(self.tags):
            return None
        inside = {piece.tag: piece.inside for piece in pieces.values()}
        event, (start, end) = clean(inside["event"]), map(whole, seconds(inside["range"]) or (-1, -1))
        return EventRange(event, start, end) if event and 0 <= start < end <= SEGMENTS else None

    def bare(self, text: str) -> str:
        pieces = {piece.tag: text[piece.start : piece.end] for piece in spans(text, self.tags)}
        return " ".join(pieces.values())

    def compared(self, answer: EventRange | None) -> EventRange | None:
        return answer and answer._replace(event=same(answer.event))

    def truth(self, slot: Slot, record: Record) -> EventRange:
        event, *times = values = [required(slot, record, field) for field in slot.truth_fields]
        event, start, end = clean(event), *map(whole, times)
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
            truth, answer = map(self.compared, (self.truth(slot, record), answer or EventRange("", 0, 0)))
            right = sum(t == a for t, a in zip(_segments(truth), _segments(answer), strict=True))
            scores.append(right / SEGMENTS if answer.event else 0.0)
            events += truth.event == answer.event
        return {"segment_accuracy": sum(scores) / len(scores), "event_accuracy": events / len(scores)}, scores

    def chance(self, slot: Slot, records: Sequence[Record], masks=None) -> float:
        """Every true event is tried with every range."""
        rows = np.array([_segments(self.compared(self.truth(slot, record))) for record in records], object)
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

    def parse(self, text: str, record: Record | None = None) -> tuple[EventRange, ...] | None:
        pieces = spans(text, self.tags)
        if not pieces or [piece.tag for piece in pieces] != [*self.tags] * (len(pieces) // 2):
            return None
        events = [self._event(a.inside, b.inside) for a, b in zip(pieces[::2], pieces[1::2], strict=True)]
        return None if None in events else tuple(events)

    def compared(self, answer: Sequence[NamedTuple] | None) -> Sequence[NamedTuple] | None:
        return answer and tuple(event._replace(event=same(event.event)) for event in answer)

    def _event(self, name: str, inside: str) -> EventRange | None:
        start, end = (int(v) if v % 1 == 0 else v for v in seconds(inside) or (0, 0))
        return EventRange(clean(name), start, end) if clean(name) and start < end else None


class Parsing(Kind):
    """LLP, audio-visual video parsing: ``<audio>bell,(2 6)</audio> <visual>bell,(2 8)</visual>``, any number of each.

    A piece may hold several intervals, ``bell,(2 6),(8 9)``. An empty piece, or the words of :data:`NOTHING`, say that
    nothing is heard or seen. That is a valid answer.

    The metrics are those of Tian, Li, Xu, "Unified Multisensory Perception: Weakly-Supervised Audio-Visual Video
    Parsing", ECCV 2020. Segment level counts segments as TP, FP and FN. Event level counts maximal runs: an answered
    run is a TP if its IoU with some true run is at least 0.5, else an FP. A true run without such a match is an FN.

    A is for heard events, V for seen events, AV for segments in which a class is both. F = 2TP / (2TP + FP + FN) is
    averaged over the classes in the truth or the answer of a clip (1 if there are none), then over clips. Type@AV is
    the mean of A, V and AV. Event@AV adds the counts of A and V before F. An unreadable answer scores 0 everywhere.

    An answer with a piece that cannot be read, such as ``bell,(6 2)``, cannot be read. A script that looks for pieces
    passes over this one and scores the others. If there are such answers, ``partly_read`` counts them, and
    ``<primary>_by_piece`` is the primary metric as such a script computes it.
    """

    tags = ("audio", "visual")
    example = f"events such as <audio>bell,(2 6)</audio>, whole seconds 0 <= start < end <= {SEGMENTS}"
    compared = Events.compared
    metrics = [f"{level}_{kind}" for level in ("segment", "event") for kind in ("a", "v", "av", "type_av", "event_av")]

    def bare(self, text: str) -> str:
        return super().bare(text) or self.answer(())  # the words that say so have no tags

    def answer(self, truth: Sequence[ModalEvent]) -> str:
        pieces = [f"<{modality}>{event},({start} {end})</{modality}>" for modality, event, start, end in truth]
        return " ".join(pieces or (f"<{modality}></{modality}>" for modality in self.tags))

    def parse(self, text: str, record: Record | None = None) -> tuple[ModalEvent, ...] | None:
        pieces = spans(text, self.tags)
        if pieces == []:
            words = {part.strip() for part in re.split(r"[.,;]|\band\b", clean(text))} - {""}
            return () if words and words <= {*NOTHING} else None
        events = [self._events(piece.tag, piece.inside) for piece in pieces or ()]
        return tuple(event for part in events for event in part) if events and None not in events else None

    def scored(self, text: str, record: Record) -> Sequence[ModalEvent] | None:
        """All events of a whole answer, else those of the pieces that can be read; None if there is no such event."""
        events = self.parse(text)
        if events is not None or not readable(text):
            return events
        pieces = re.findall(rf"<({'|'.join(self.tags)})>([^<>]*)</\1>", text)
        return Partly(event for piece in pieces for event in self._events(*piece) or ()) or None

    def _events(self, modality: str, inside: str) -> list[ModalEvent] | None:
        # A label may hold brackets and commas, as in "frying_(food)". The two numbers of an interval need a separator:
        # "26" is not "2 6". A label ends in a comma, and may be left out where it is that of the interval before.
        *parts, rest = _INTERVAL.split(inside)
        if not parts or rest.strip(" .,\n\t"):
            return [] if clean(inside) in ("", *NOTHING) else None
        events, event = [], ""
        for label, start, end in zip(parts[::3], map(float, parts[1::3]), map(float, parts[2::3]), strict=True):
            name, comma, after = label.rpartition(",")
            if label.strip(" ,\n\t") or not event:
                event = clean(name.lstrip(" ,\n\t")) if comma and not after.strip() else ""
            if not event or not start < end <= SEGMENTS or start % 1 or end % 1:
                return None
            events.append(ModalEvent(modality, event, int(start), int(end)))
        return events

    def truth(self, slot: Slot, record: Record) -> tuple[ModalEvent, ...]:
        """The true events, from the answer, or from a field `event` that holds the tags."""
        for field in (slot.answer_field, "event"):
            if (events := self.parse(record.get(field, ""))) is not None:
                return events
        fields = f"field '{slot.answer_field}' or 'event'"
        raise ValueError(f"{describe(slot, record)}: {fields} must hold {self.example}")

    def measure(self, slot: Slot, records: Sequence[Record], answers: Sequence, masks=None) -> Scores:
        """Ten F, and the number by pieces if it differs; per sample the segment-level Type@AV."""
        rows = []
        for record, events in zip(records, answers, strict=True):
            truth, events = self.compared(self.truth(slot, record)), self.compared(events)
            if events is None:
                rows.append([0.0] * len(self.metrics))
                continue
            classes = sorted({event.event for event in (*truth, *events)})
            grids = _grid(truth, classes), _grid(events, classes)
            rows.append(_clip_scores(_segment_counts(*grids)) + _clip_scores(_run_counts(*grids)))
        by_piece, primary = np.array(rows), self.metrics.index(slot.metric)
        partly = np.array([isinstance(events, Partly) for events in answers])
        table = np.where(partly[:, None], 0.0, by_piece)
        metrics = dict(zip(self.metrics, map(float, table.mean(0)), strict=True))
        if partly.any():
            lenient = float(by_piece[:, primary].mean())
            metrics |= {f"{slot.metric}_by_piece": lenient, "partly_read": int(partly.sum())}
        return metrics, table[:, primary].tolist()

    def chance(self, slot: Slot, records: Sequence[Record], masks=None) -> float:
        """A greedy search starts with no event and adds the one that helps most, heard, seen or both, until none helps.

        It tries the whole clip and the three most frequent true intervals.
        """
        truths = [self.compared(self.truth(slot, record)) for record in records]
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
        answer = _grid((), classes)
        f, present = _class_f(_segment_counts(true, answer))
        best = float(_average(f.sum(-1), present.sum(-1)).mean())
        while additions:
            # An addition changes one class. The share of the other classes in the mean of a clip stays the same.
            f, present = _class_f(_segment_counts(true, answer))
            other_f, other_present = f.sum(-1, keepdims=True) - f, present.sum(-1, keepdims=True) - present
            tried = []
            for c, addition in additions:
                row = answer[:, c] | addition
                row[2] = row[0] & row[1]
                f, present = _class_f(_segment_counts(true[:, :, c], row))
                value = _average(other_f[..., c] + f, other_present[..., c] + present).mean()
                tried.append((float(value), c, row))
            value, c, row = max(tried, key=lambda trial: trial[0])
            if value <= best + 1e-12:
                break
            best, answer[:, c] = value, row
        return best


def _grid(events: Sequence[ModalEvent], classes: Sequence[str]) -> np.ndarray:
    """Events as a bool array [3 (audio, visual, both), classes, segments]."""
    grid = np.zeros((3, len(classes), SEGMENTS), bool)
    rows = {name: row for row, name in enumerate(classes)}
    for modality, event, start, end in events:
        grid[Parsing.tags.index(modality), rows[event], start:end] = True
    grid[2] = grid[0] & grid[1]
    return grid


def _segment_counts(true: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Counts [3 (TP, FP, FN), ...] of segments, the last axis of [..., segments]; the shapes broadcast."""
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
