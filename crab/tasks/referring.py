"""Referring localization (Ref-AVS): box and points of the thing that is described, or that it is not there.

J and F are those of :mod:`crab.tasks.segmentation`. Test records belong to one of three splits:
``test_s`` (classes seen in training), ``test_u`` (unseen ones) and ``test_n`` (null: the described thing
is not there, and the true mask is empty). On the null split S is the square root of predicted
foreground over true background, which there is the whole image, as in the data set's own code; 0 is best,
1 worst (Wang et al., "Ref-AVS: Refer and Segment Objects in Audio-Visual Scenes", ECCV 2024). The published
script of Crab+ divides by the background of the prediction instead, so its S is higher and has no bound.

The primary J is over all samples. A null sample counts 1 if the answer is that nothing is there, else
0: the IoU with an empty mask. What does not parse, or gives no mask, has J = F = 0 and S = 1. The
numbers that end in ``_answered`` are the means over the rest, and no more than a second reading: the
published script leaves such answers out too, but reads answers by a rule of its own
(:mod:`crab.tasks.segmentation`). A split without records has no numbers.
"""

from __future__ import annotations

from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from . import segmentation
from .labels import TAGS
from .registry import Slot, describe, required
from .segmentation import Masks, Prompt
from .text import clean, only

__all__ = ["NULL", "SPLITS", "TAGS", "answer", "bare", "chance", "measure", "parse", "truth"]

#: The truth, or answer, that the described thing is not there.
NULL = "null"
SPLITS = {"test_s": "seen", "test_u": "unseen", "test_n": NULL}
# The published answers say true or false; yes and no mean the same.
_THERE = {"true": True, "yes": True, "false": False, "no": False}


def answer(truth: Prompt | str) -> str:
    """``<answer>true</answer> [16,24,80,88] [40,48] [48,56] [56,64]``, or ``<answer>false</answer>`` for NULL."""
    return "<answer>false</answer>" if truth == NULL else f"<answer>true</answer> {segmentation.answer(truth)}"


def bare(text: str) -> str:
    """An answer without the words around it."""
    return " ".join([f"<answer>{only(text, 'answer')}</answer>", *segmentation.groups(text)])


def parse(text: str) -> Prompt | str | None:
    """Box and points, or :data:`NULL`; None where neither or both are said."""
    inside = only(text, "answer")
    there = _THERE.get(clean(inside)) if inside is not None else None
    if there:
        return segmentation.parse(text)
    return NULL if there is False and segmentation.groups(text) == [] else None


def truth(slot: Slot, record: Mapping[str, Any]) -> Prompt | str:
    """The truth of a record: from its answer; null also from the split, for published test records hold no answer."""
    split = _split(slot, record) if "split" in record else None
    if split == NULL and slot.answer_field not in record:
        return NULL
    found = parse(record.get(slot.answer_field, ""))
    if found is None:
        raise ValueError(
            f"{describe(slot, record)}: field '{slot.answer_field}' must hold {answer(NULL)}, or <answer>true</answer> "
            "with a box and three points, such as [16,24,80,88] [40,48] [48,56] [56,64]"
        )
    if split and (split == NULL) != (found == NULL):
        raise ValueError(f"{describe(slot, record)}: fields 'split' and '{slot.answer_field}' disagree on whether it is there")
    return found


def _split(slot: Slot, record: Mapping[str, Any]) -> str:
    value = required(slot, record, "split")
    if not isinstance(value, str) or value not in SPLITS:
        raise ValueError(f"{describe(slot, record)}: field 'split' is {value!r:.80}; give one of {', '.join(SPLITS)}")
    return SPLITS[value]


class _Sample(NamedTuple):
    split: str
    made: bool  # whether the answer could be read and its mask made
    j: float
    f: float
    s: float


def measure(
    slot: Slot,
    records: Sequence[Mapping[str, Any]],
    answers: Sequence[Prompt | str | None],
    masks: Masks | None = None,
) -> tuple[dict[str, float], list[float]]:
    """J over all, J and F on seen and unseen, S on null; per sample J."""
    masks = segmentation.needed(slot, masks)
    samples = [_sample(slot, masks, record, given) for record, given in zip(records, answers, strict=True)]
    metrics = {"J": float(np.mean([s.j for s in samples]))}
    for kind in "", "_answered":
        for split in SPLITS.values():
            part = [s for s in samples if s.split == split]
            if part:
                metrics |= _means(split, kind, [s for s in part if s.made or not kind])
    metrics["no_mask"] = sum(not s.made for s in samples)
    return metrics, [s.j for s in samples]


def _means(split: str, kind: str, samples: Sequence[_Sample]) -> dict[str, float]:
    """The numbers of a split; the worst ones where nothing was answered."""
    if split == NULL:
        return {f"S_null{kind}": float(np.mean([s.s for s in samples])) if samples else 1.0}
    j, f = np.mean([(s.j, s.f) for s in samples], axis=0) if samples else (0.0, 0.0)
    return {f"J_{split}{kind}": float(j), f"F_{split}{kind}": float(f)}


def _sample(slot: Slot, masks: Masks, record: Mapping[str, Any], given: Prompt | str | None) -> _Sample:
    split, failed = _split(slot, record), (0.0, 0.0, 1.0)
    if given is None:
        return _Sample(split, False, *failed)
    if split == NULL:
        if given == NULL:
            return _Sample(split, True, 1.0, 1.0, 0.0)
        mask = masks.segment(record, given.box, given.points)
        return _Sample(split, mask is not None, 0.0, 0.0, 1.0 if mask is None else float(np.asarray(mask, bool).mean() ** 0.5))
    if given == NULL:
        true = np.asarray(masks.truth(record), bool)
        return _Sample(split, True, *segmentation.mask_scores(true, np.zeros_like(true)), 0.0)
    pair = segmentation.scored(slot, masks, record, given)
    return _Sample(split, False, *failed) if pair is None else _Sample(split, True, *pair, 0.0)


def chance(slot: Slot, records: Sequence[Mapping[str, Any]], masks: Masks | None = None) -> float:
    """J of the best constant answer: that nothing is there, or the best box and points of those that are."""
    masks = segmentation.needed(slot, masks)
    tried: list[Prompt | str] = [NULL]
    there = [r for r in records if _split(slot, r) != NULL]
    if there:
        tried.append(segmentation.constant(slot, there, masks))
    return max(measure(slot, records, [given] * len(records), masks)[0]["J"] for given in tried)
