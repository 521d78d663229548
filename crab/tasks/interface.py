"""The unified interface: every slot asked, answered, read and scored through the same functions.

Predictions are scored from their text alone. What cannot be read is wrong and counted; what is
missing is an error, never left out of an average.
"""

from __future__ import annotations

import operator
from collections import Counter
from types import ModuleType
from typing import Any, Iterable, Iterator, Mapping, Sequence

from . import action, captioning, choice, dense, emotion, matching, qa, referring, segmentation, spatial, temporal, video_parsing
from .registry import SLOTS, Slot, describe, get_slot, required
from .segmentation import Masks
from .text import literals, spans

FORMS = ("bare", "explicit")

# One module for each form of answer. Each has TAGS, answer(truth), parse(text) and truth(slot, record); unless it is
# for training only, measure(slot, records, answers) -> (metrics, per-sample scores) and chance(slot, records);
# bare(text), an answer without the words around it, if that is more or less than its tagged pieces; and same(one, other),
# whether two answers are scored as one, if they are so when they are not equal.
MODULES: dict[str, ModuleType] = {
    "temporal": temporal,
    "dense": dense,
    "video_parsing": video_parsing,
    "spatial": spatial,
    "segmentation": segmentation,
    "referring": referring,
    "qa": qa,
    "choice": choice,
    "emotion": emotion,
    "action": action,
    "matching": matching,
    "captioning": captioning,
}

Record = Mapping[str, Any]


def _module(slot: Slot) -> ModuleType:
    return MODULES[slot.module]


def tags() -> list[str]:
    """Every literal tag, ``"<answer>"`` and the like, in a fixed order: tokens of their own."""
    names = dict.fromkeys(tag for module in MODULES.values() for tag in module.TAGS)
    return list(literals(names))


def instruction(slot: str | Slot, record: Record) -> str:
    """What the model is asked about a record."""
    slot = get_slot(slot)
    try:
        return slot.instruction.format_map(_Said(record))
    except KeyError as error:
        raise ValueError(f"{describe(slot, record)}: no field {error} to ask about") from error


class _Said:
    """A record as an instruction quotes it: ``{one|other}`` is the first field it has, a list is "a , b or c"."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def __getitem__(self, names: str) -> Any:
        for name in names.split("|"):
            if name in self._record:
                value = self._record[name]
                if not isinstance(value, (list, tuple)):
                    return value
                words = [str(v) for v in value]
                return " or ".join(part for part in (" , ".join(words[:-1]), *words[-1:]) if part)
        raise KeyError(names)


def corpus(records: Mapping[str, Iterable[Record]] | None = None) -> Iterator[str]:
    """Every different instruction, for a tokenizer's training text.

    Args:
        records: records by slot name; instructions that quote a record (the question of avqa) appear
            for these records only.
    """
    seen: set[str] = set()
    for slot in SLOTS.values():
        fixed = "{" not in slot.instruction
        for record in ({},) if fixed else (records or {}).get(slot.name, ()):
            text = instruction(slot, record)
            if text not in seen:
                seen.add(text)
                yield text


def answer(slot: str | Slot, truth: Any) -> str:
    """The bare answer of a truth, of the type that :func:`parse` returns (tuples will do).

    Raises:
        ValueError: the truth has no readable answer, e.g. a reversed interval or a box off the image.
    """
    slot = get_slot(slot)
    try:
        text = _module(slot).answer(truth)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"slot {slot.name}: {truth!r:.120} is no truth of this slot") from error
    if _module(slot).parse(text) is None:
        raise ValueError(f"slot {slot.name}: {truth!r:.120} has no valid answer, '{text[:120]}' does not read back")
    return text


def parse(slot: str | Slot, text: str) -> Any | None:
    """What an answer says, or None where it says nothing definite. Never raises on any text."""
    return _module(get_slot(slot)).parse(text)


def truth(slot: str | Slot, record: Record) -> Any:
    """The truth of a record, of the type that :func:`parse` returns."""
    slot = get_slot(slot)
    return _module(slot).truth(slot, record)


def agree(slot: str | Slot, one: Any, other: Any) -> bool:
    """Whether two answers, or an answer and a truth, of the type that :func:`parse` returns, say the same to the scorer."""
    return getattr(_module(get_slot(slot)), "same", operator.eq)(one, other)


def target(slot: str | Slot, record: Record, form: str) -> str:
    """The text to be learned for a record.

    Args:
        form: ``"explicit"``, the answer field as it is; ``"bare"``, its tagged pieces and, of boxes and
            points, the bracketed groups alone (a caption, having neither, is kept whole).

    Raises:
        ValueError: unknown form, no answer field, or an answer without its tags.
    """
    slot = get_slot(slot)
    if form not in FORMS:
        raise ValueError(f"unknown answer form '{form}'; choose one of {', '.join(FORMS)}")
    text = required(slot, record, slot.answer_field)
    if parse(slot, text) is None:
        raise ValueError(
            f"{describe(slot, record)}: field '{slot.answer_field}' holds no answer that can be read: {text!r:.120}"
        )
    text = text.strip()
    module = _module(slot)
    if form == "explicit":
        return text
    if hasattr(module, "bare"):
        return module.bare(text)
    return " ".join(text[s.start:s.end] for s in spans(text, module.TAGS))


def sample_id(slot: str | Slot, record: Record, index: int, split: str = "test") -> str:
    """The record's own `id`, else ``slot/split/00012`` from its place in the list."""
    return str(record["id"]) if "id" in record else f"{get_slot(slot).name}/{split}/{index:05d}"


def score(
    slot: str | Slot,
    records: Sequence[Record],
    texts: Mapping[str, str] | Sequence[str],
    *,
    ids: Sequence[str] | None = None,
    masks: Masks | None = None,
) -> dict[str, Any]:
    """Score the predictions of a slot's whole test split.

    Args:
        records: the test records, all of them.
        texts: predicted texts by sample id, or in the order of the records.
        ids: sample ids of the records; :func:`sample_id` if not given.
        masks: for the slots scored on masks, where those come from.

    Returns:
        ``metrics`` (name -> number), ``primary`` (the slot's first metric), ``per_sample`` and ``ids`` in
        record order, and the counts ``n_expected``, ``n_found``, ``n_scored`` and ``n_unparsable`` (scored as
        wrong). The mean of ``per_sample`` is the primary metric; it is 0 for what could not be read, else 0 to 1,
        for weighted F1 up to 2 (:func:`crab.tasks.emotion.f1_shares`).

    Raises:
        ValueError: a prediction is missing, stands for no record, is double or is no text; or a slot that is for
            training only.
    """
    slot = _benchmark(slot)
    ids, texts = _aligned(slot, records, texts, ids)
    module = _module(slot)
    answers = [module.parse(text) for text in texts]
    extra = {"masks": masks} if slot.masks else {}
    metrics, per_sample = module.measure(slot, records, answers, **extra)
    return {
        "metrics": metrics,
        "primary": metrics[slot.metric],
        "per_sample": per_sample,
        "ids": ids,
        "n_expected": len(records),
        "n_found": len(texts),
        "n_scored": len(per_sample),
        "n_unparsable": sum(a is None for a in answers),
    }


def chance(slot: str | Slot, records: Sequence[Record], *, masks: Masks | None = None) -> float:
    """The primary metric of the best constant answer, found with the test truths in hand.

    Raises:
        ValueError: no records, a slot scored on masks without `masks`, or one that is for training only.
    """
    slot = _benchmark(slot)
    if not records:
        raise ValueError(f"slot {slot.name}: no test records")
    module = _module(slot)
    return module.chance(slot, records, **({"masks": masks} if slot.masks else {}))


def _benchmark(slot: str | Slot) -> Slot:
    slot = get_slot(slot)
    if slot.metric is None:
        raise ValueError(f"slot {slot.name} is for training only and has no metric")
    return slot


def _aligned(slot: Slot, records, texts, ids) -> tuple[list[str], list[str]]:
    if not records:
        raise ValueError(f"slot {slot.name}: no test records")
    ids = [sample_id(slot, r, i) for i, r in enumerate(records)] if ids is None else [str(i) for i in ids]
    if len(ids) != len(records):
        raise ValueError(f"slot {slot.name}: {len(ids)} ids for {len(records)} records")
    if len(set(ids)) != len(ids):
        double = _some(i for i, n in Counter(ids).items() if n > 1)
        raise ValueError(f"slot {slot.name}: sample ids are not unique: {double}")
    if not isinstance(texts, Mapping):
        if isinstance(texts, str):
            raise ValueError(f"slot {slot.name}: predictions must be one text for each record, not one text")
        texts = list(texts)
        if len(texts) > len(ids):
            raise ValueError(f"slot {slot.name}: {len(texts)} predictions for {len(ids)} records")
        texts = dict(zip(ids, texts))
    missing = [i for i in ids if texts.get(i) is None]
    if missing:
        raise ValueError(f"slot {slot.name}: {len(missing)} of {len(ids)} predictions are missing: {_some(missing)}")
    known = set(ids)
    unknown = [str(i) for i in texts if i not in known]
    if unknown:
        raise ValueError(f"slot {slot.name}: {len(unknown)} predictions stand for no test record: {_some(unknown)}")
    wrong = [i for i in ids if not isinstance(texts[i], str)]
    if wrong:
        raise ValueError(f"slot {slot.name}: predictions that are no text: {_some(wrong)}")
    return ids, [texts[i] for i in ids]


def _some(names: Iterable[str], most: int = 20) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
