"""The unified interface of AV-UIE v2: the same functions ask, answer, read and score each of its 19 slots.

This room needs NumPy and ruamel.yaml, no torch, and nothing else of crab. `registry` names the slots. `prompts` has the
words that the model is asked in. `labels`, `temporal` and `segmentation` hold the kinds of answers: grammar, truth and
metrics together. `answers` has their base class and reads tagged text. `fields` knows what a record holds.

To add a data set, add an entry to `registry._ENTRIES`, and its question to ``prompts.yaml``. Its fields are text unless
`fields.FIELD_TYPES` names them. If no kind of answer fits, write a subclass of `answers.Kind` and add it to
:data:`KINDS`.

To add a metric of labels, write a function of the true and the answered labels, add it to `labels.METRICS`, and name it
in the slot's entry. For another kind, return it from the `measure` of this kind.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .answers import Kind, Partly
from .fields import MediaItem, Record, describe, json_path, mask_path, media_paths, required
from .labels import LABELS
from .prompts import PROMPTS, Prompt, read_prompts
from .registry import BENCHMARKS, FOLDER, SLOTS, SPLITS, Slot, get_slot
from .segmentation import NULL, Masks, OneBox, Pixels, Referred
from .temporal import Events, OneEvent, Parsing

__all__ = [
    "BENCHMARKS", "FOLDER", "FORMS", "KINDS", "NULL", "PROMPTS", "SLOTS", "SPLITS", "Masks", "MediaItem", "Prompt",
    "Slot", "agree", "answer", "chance", "get_slot", "instruction", "json_path", "mask_path", "media_paths", "parse",
    "prompt", "read_prompts", "sample_id", "score", "tags", "target", "truth",
]  # fmt: skip

FORMS = ("bare", "explicit")

#: The kinds of answers, by their name in a slot's entry.
KINDS: dict[str, Kind] = {
    "temporal": OneEvent(),
    "dense": Events(),
    "video_parsing": Parsing(),
    "spatial": OneBox(),
    "segmentation": Pixels(),
    "referring": Referred(),
    **LABELS,
}


def tags() -> list[str]:
    """All tags, "<answer>" and the like, in a fixed order. Each is one token."""
    names = dict.fromkeys(tag for kind in KINDS.values() for tag in kind.tags)
    return [tag for name in names for tag in (f"<{name}>", f"</{name}>")]


def prompt(slot: str | Slot, record: Record, prompts: Mapping[str, Prompt] = PROMPTS) -> Prompt:
    """What is said about a record: its question, and what else stands around its media.

    Args:
        prompts: templates by slot, of :func:`read_prompts`.
    """
    slot = get_slot(slot)
    return prompts[slot.name].filled(slot, record)


def instruction(slot: str | Slot, record: Record) -> str:
    """The question about a record, in the words of this package."""
    return prompt(slot, record).question


def answer(slot: str | Slot, truth: Any) -> str:
    """The bare answer of a truth. ValueError if it cannot be read back, such as a box outside the image."""
    slot = get_slot(slot)
    kind = KINDS[slot.kind]
    try:
        text = kind.answer(truth)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"slot {slot.name}: {truth!r:.120} is no truth of this slot") from error
    if kind.parse(text) is None:
        raise ValueError(f"slot {slot.name}: {truth!r:.120} has no valid answer, '{text[:120]}' does not read back")
    return text


def parse(slot: str | Slot, text: str, record: Record | None = None) -> Any | None:
    """What an answer says, or None if it says nothing definite. No text raises an error.

    `record` is the one that was asked about, if it is known. An answer may give a letter for one of its choices.
    """
    return KINDS[get_slot(slot).kind].parse(text, record)


def truth(slot: str | Slot, record: Record) -> Any:
    """The truth of a record, of the type that :func:`parse` returns. ValueError names the record and the field."""
    slot = get_slot(slot)
    return KINDS[slot.kind].truth(slot, record)


def agree(slot: str | Slot, one: Any, other: Any) -> bool:
    """Whether two answers, or an answer and a truth, say the same, in the same order."""
    kind = KINDS[get_slot(slot).kind]
    return kind.compared(one) == kind.compared(other)


def target(slot: str | Slot, record: Record, form: str) -> str:
    """The text to learn for a record, in one of :data:`FORMS`. ValueError if it cannot be read.

    "explicit" is the answer field as it is; "bare" is its tagged pieces, and the brackets of boxes and points, alone. A
    caption has neither and stays whole.
    """
    slot = get_slot(slot)
    if form not in FORMS:
        raise ValueError(f"unknown answer form '{form}'; choose one of {', '.join(FORMS)}")
    text = required(slot, record, slot.answer_field)
    if parse(slot, text, record) is None:
        field = f"field '{slot.answer_field}' holds no answer that can be read"
        raise ValueError(f"{describe(slot, record)}: {field}: {text!r:.120}")
    return text.strip() if form == "explicit" else KINDS[slot.kind].bare(text.strip())


def sample_id(slot: str | Slot, record: Record, index: int, split: str = "test") -> str:
    """The `id` of the record, else ``slot/split/00012`` from its place in the list."""
    return str(record["id"]) if "id" in record else f"{get_slot(slot).name}/{split}/{index:05d}"


def score(
    slot: str | Slot,
    records: Sequence[Record],
    texts: Mapping[str, str] | Sequence[str],
    *,
    ids: Sequence[str] | None = None,
    masks: Masks | None = None,
) -> dict[str, Any]:
    """Score the predictions for all test records of a slot.

    What cannot be read is wrong. Of an answer to LLP, the pieces that can be read count
    (:class:`crab.tasks.temporal.Parsing`). ValueError if a prediction is missing, unknown, double or no text.

    Args:
        texts: predicted texts by sample id, or in the order of the records.
        ids: sample ids of the records, by default those of :func:`sample_id`.
        masks: the source of masks, for a slot that is scored on masks.

    Returns:
        ``metrics`` (name -> number), ``primary`` (the primary metric), ``per_sample`` and ``ids`` in the order of the
        records, and counts. The mean of ``per_sample`` is the primary metric. A score is 0 if the answer cannot be
        read, else 0 to 1; for weighted F1 up to 2 (:func:`crab.tasks.labels.f1_shares`).
    """
    slot = _benchmark(slot, records, masks)
    ids = [sample_id(slot, record, i) for i, record in enumerate(records)] if ids is None else [str(i) for i in ids]
    texts = _aligned(slot, records, texts, ids)
    kind = KINDS[slot.kind]
    answers = [kind.scored(text, record) for text, record in zip(texts, records, strict=True)]
    metrics, per_sample = kind.measure(slot, records, answers, masks)
    return {
        "metrics": metrics,
        "primary": metrics[slot.metric],
        "per_sample": per_sample,
        "ids": ids,
        "n_expected": len(records),
        "n_found": len(texts),
        "n_scored": len(per_sample),
        "n_unparsable": sum(answer is None or isinstance(answer, Partly) for answer in answers),
    }


def chance(slot: str | Slot, records: Sequence[Record], *, masks: Masks | None = None) -> float:
    """The primary metric of the best constant answer among those that the kind tries, chosen by the test records.

    For labels and for one event these are all; for boxes, masks and LLP others may be a little better.
    """
    slot = _benchmark(slot, records, masks)
    return KINDS[slot.kind].chance(slot, records, masks)


def _benchmark(slot: str | Slot, records: Sequence[Record], masks: Masks | None) -> Slot:
    slot = get_slot(slot)
    if not slot.test:
        raise ValueError(f"slot {slot.name} is for training only and has no metric")
    if not records:
        raise ValueError(f"slot {slot.name}: no test records")
    if slot.masks and masks is None:
        raise ValueError(f"slot {slot.name} is scored on masks: pass masks=Masks(truth, segment)")
    return slot


def _aligned(slot: Slot, records: Sequence[Record], texts: Any, ids: list[str]) -> list[str]:
    """The predicted texts in the order of the records."""
    if isinstance(texts, str):
        raise ValueError(f"slot {slot.name}: predictions must be one text for each record, not one text")
    if not isinstance(texts, Mapping):
        texts = list(texts)
        names = [*ids, *range(len(ids), len(texts))]  # a number names a text for which there is no record
        texts = dict(zip(names, texts, strict=False))
    if len(ids) != len(records):
        raise ValueError(f"slot {slot.name}: {len(ids)} ids for {len(records)} records")
    known = set(ids)
    for problem, names in {
        "sample ids are not unique": [i for i, n in Counter(ids).items() if n > 1],
        "predictions are missing": [i for i in ids if texts.get(i) is None],
        "predictions are for no test record": [str(i) for i in texts if i not in known],
        "predictions are no text": [i for i in ids if not isinstance(texts.get(i), str)],
    }.items():
        if names:
            some = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise ValueError(f"slot {slot.name}: {problem} ({len(names)} of {len(ids)}): {some}")
    return [texts[i] for i in ids]
