"""Answers in words: a label or a caption. :data:`LABELS` names the kinds, :data:`METRICS` the metrics."""

import re
from collections import Counter
from collections.abc import Sequence

from .answers import Kind, Scores, clean, readable, same, spans
from .fields import Record, field_error, listed, required, whole
from .registry import Slot

CHOICES = ("one", "two")
_CHOICE_OF = {"1": "one", "one": "one", "first": "one", "2": "two", "two": "two", "second": "two"}
_AROUND = {*"the it is a an video audio sound clip number option choice".split()}  # may stand beside a choice
_NUMBERS = "zero one two three four five six seven eight nine ten".split()

Truths, Answers = Sequence[str], Sequence[str | None]


def hits(truths: Truths, answers: Answers) -> list[float]:
    """1 for a right label, else 0."""
    return [float(a == t) for t, a in zip(truths, answers, strict=True)]


def f1_shares(truths: Truths, answers: Answers) -> list[float]:
    """The share of each sample in weighted F1, the sum over classes of (n / N) 2TP / (n + p).

    With n true and p answered samples of its class, a right answer adds 2n / (n + p), always below 2. Resampled shares
    keep n and p. They spread as the metric of resampled answers does, to within a fifth.
    """
    true, predicted = Counter(truths), Counter(answers)
    return [2 * true[t] / (true[t] + predicted[t]) if a == t else 0.0 for t, a in zip(truths, answers, strict=True)]


def uar(truths: Truths, answers: Answers) -> float:
    """Unweighted average recall: the mean recall of the true classes."""
    counts = Counter(truths)
    right = Counter(t for t, a in zip(truths, answers, strict=True) if a == t)
    return sum(right[label] / n for label, n in counts.items()) / len(counts)


#: The metrics of labels: (true labels, answered labels) -> the score of each sample, or one number for all. The mean of
#: the scores is the metric. A primary metric has scores. WAR, the weighted average recall, is accuracy.
METRICS = {"accuracy": hits, "WAR": hits, "weighted_f1": f1_shares, "UAR": uar}


def _mean(scores: float | list[float]) -> float:
    return scores if isinstance(scores, float) else sum(scores) / len(scores)


class Label(Kind):
    """One label: ``<answer>bell</answer>``."""

    tags = ("answer",)

    def answer(self, truth: str) -> str:
        return f"<answer>{truth}</answer>"

    def parse(self, text: str, record: Record | None = None) -> str | None:
        labels = [clean(piece.inside) for piece in spans(text, self.tags) or ()]
        return labels[0] or None if len({self.compared(label) for label in labels}) == 1 else None

    def bare(self, text: str) -> str:
        return f"<answer>{spans(text, self.tags)[0].inside}</answer>"

    def compared(self, label: str | None) -> str | None:
        return label and (same(label) or label)

    def truth(self, slot: Slot, record: Record) -> str:
        field = slot.truth_fields[0]
        if label := clean(required(slot, record, field)):
            return label
        raise field_error(slot, record, field, "give the true label")

    def groups(self, slot: Slot, record: Record) -> tuple[str, ...]:
        """The groups of a record, each with a metric such as ``accuracy/audio``."""
        return ()

    def measure(self, slot: Slot, records: Sequence[Record], answers: Answers, masks=None) -> Scores:
        truths = [self.compared(self.truth(slot, record)) for record in records]
        answers = [self.compared(answer) for answer in answers]
        for name in slot.metrics.split():
            if name not in METRICS:
                fault = f"slot {slot.name} in crab/tasks/registry.py has the metric {name!r}, which there is not"
                raise ValueError(f"{fault}; use one of {', '.join(METRICS)}, or add it to crab/tasks/labels.py")
        scores = {name: METRICS[name](truths, answers) for name in slot.metrics.split()}
        members: dict[str, list[float]] = {}
        for record, hit in zip(records, hits(truths, answers), strict=True):
            for group in self.groups(slot, record):
                members.setdefault(f"accuracy/{group}", []).append(hit)
        metrics = {name: _mean(values) for name, values in (*scores.items(), *sorted(members.items()))}
        return metrics, scores[slot.metric]

    def chance(self, slot: Slot, records: Sequence[Record], masks=None) -> float:
        """The most frequent label is the best one for each of the metrics."""
        truths = [self.compared(self.truth(slot, record)) for record in records]
        best = max(Counter(truths).items(), key=lambda item: item[1])[0]
        return _mean(METRICS[slot.metric](truths, [best] * len(truths)))


class Question(Label):
    """MUSIC-AVQA: accuracy also by the modality and the kind of a question."""

    def groups(self, slot: Slot, record: Record) -> tuple[str, ...]:
        names = listed(required(slot, record, "type"))
        if not isinstance(names, (list, tuple)) or len(names) != 2 or not all(isinstance(name, str) for name in names):
            raise field_error(slot, record, "type", 'give a list such as ["Audio-Visual", "Location"]')
        modality, kind = map(clean, names)
        return modality, f"{modality}/{kind}"

    def compared(self, label: str | None) -> str | None:
        """``2`` and ``two`` mean the same."""
        label = super().compared(label)
        digits = label and label.isascii() and label.isdigit() and len(label) < 3
        return _NUMBERS[int(label)] if digits and int(label) < len(_NUMBERS) else label


class Choice(Label):
    """AVQA: the words of one of the choices. Accuracy also by what a question relates to, and by its type.

    See Yang et al., "AVQA: A Dataset for Audio-Visual Question Answering on Videos", ACM MM 2022. A record gives the
    words of the right choice, or its place, from 0. An answer gives the words, its letter, or both; a letter with the
    words of another choice says nothing. A number is no place: it is not clear whether it counts from 0 or from 1.
    """

    def parse(self, text: str, record: Record | None = None) -> str | None:
        label = super().parse(text, record)
        choices = _choices(record or {})
        names = [self.compared(choice) for choice in choices]
        lettered = re.fullmatch(r"\(?([a-z])(?:[.):]+ *(.*))?", label or "")
        if not lettered or self.compared(label) in names or (place := ord(lettered[1]) - ord("a")) >= len(names):
            return label
        words = self.compared(lettered[2])
        if not words or words == names[place]:
            return choices[place]
        return None if words in names else label

    def groups(self, slot: Slot, record: Record) -> tuple[str, ...]:
        relation, kind = (clean(required(slot, record, f"question_{field}")) for field in ("relation", "type"))
        return f"relation/{relation}", f"type/{kind}"

    def choices(self, slot: Slot, record: Record) -> list[str]:
        required(slot, record, "multi_choice")
        choices = _choices(record)
        if len(choices) < 2 or not all(choices):
            raise field_error(slot, record, "multi_choice", "give a list of labels")
        return choices

    def truth(self, slot: Slot, record: Record) -> str:
        choices, field = self.choices(slot, record), slot.truth_fields[0]
        value = required(slot, record, field)
        if isinstance(value, str) and clean(value) in choices:
            return clean(value)
        if (place := whole(value)) in range(len(choices)):
            return choices[place]
        fix = f"give one of the choices {', '.join(choices):.200}, or its place from 0 to {len(choices) - 1}"
        raise field_error(slot, record, field, fix)

    def chance(self, slot: Slot, records: Sequence[Record], masks=None) -> float:
        """The accuracy of always the same words, or of always the same place."""
        places = Counter(self.choices(slot, record).index(self.truth(slot, record)) for record in records)
        return max(super().chance(slot, records), max(places.values()) / len(records))


def _choices(record: Record) -> list[str]:
    """The choices of a record, as they are shown; none if its field holds no list."""
    value = listed(record.get("multi_choice"))
    return [clean(v) for v in value] if isinstance(value, (list, tuple)) else []


class Action(Label):
    """Labels are the same if only the space between words differs: UCF-101 names a class "ApplyEyeMakeup"."""

    def compared(self, label: str | None) -> str | None:
        return label and (re.sub(r"[\s_-]", "", clean(label)) or label)


class Match(Label):
    """One of two videos or sounds. ``1``, ``one``, ``first`` and ``video one`` mean the same."""

    def parse(self, text: str, record: Record | None = None) -> str | None:
        label = super().parse(text, record)
        words = re.findall(r"\w+", label or "")
        choices = {_CHOICE_OF[word] for word in words if word in _CHOICE_OF}
        if not choices:
            return label
        clear = len(choices) == 1 and all(word in _CHOICE_OF or word in _AROUND for word in words)
        return choices.pop() if clear else None

    def truth(self, slot: Slot, record: Record) -> str:
        label, place = super().truth(slot, record), str(whole(record[slot.truth_fields[0]]))
        if choice := _CHOICE_OF.get(label) or _CHOICE_OF.get(place):
            return choice
        raise field_error(slot, record, slot.truth_fields[0], "give 1 or 2")


class Caption(Kind):
    """Free text without a tag, for training only. The whole text is the answer."""

    example = "a caption"

    def answer(self, truth: str) -> str:
        return " ".join(truth.split())

    def bare(self, text: str) -> str:
        return text

    def parse(self, text: str, record: Record | None = None) -> str | None:
        return (" ".join(text.split()) or None) if readable(text) else None


LABELS: dict[str, Kind] = {
    "qa": Question(),
    "choice": Choice(),
    "emotion": Label(),
    "action": Action(),
    "matching": Match(),
    "captioning": Caption(),
}
