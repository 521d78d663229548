"""Pixel-level localization: a box and three points from which a segmenter makes the mask (S4, MS3).

J is the mean IoU of predicted and true mask; F is (1 + b2) P R / (b2 P + R) with b2 = 0.3 on pixels
(Zhou et al., "Audio-Visual Segmentation", ECCV 2022), of the mask as it is: no search over
thresholds. An answer that does not parse and a mask that could not be made score 0 and are counted in
``no_mask``; ``J_answered`` and ``F_answered`` are the means over the others, and no more than a second
reading. The published script leaves such answers out too, but reads answers by a rule of its own: the first
box and the last three points of a text (fewer will do, and three without a box), white space nowhere, and
no coordinate of 224, which is here the far edge. So its numbers are near to these, not the same.

Where a true mask is black, as in some frames of MS3 (nothing in view sounds), an empty mask has J = F = 1 and
any other J = F = 0, as in the published script. AVSBench's own code differs: there J of such a frame is the
share of the image that is left unmarked, which is never less, and F is the mean over the other frames alone.
``empty_truth`` counts such frames, where there are any.

This module reads no files: who scores hands in a :class:`Masks`.
"""

from __future__ import annotations

import re
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import numpy as np

from .registry import Slot, describe
from .spatial import SIZE, Box, constant_boxes, iou, valid
from .text import integers, readable

TAGS: tuple[str, ...] = ()
BETA2 = 0.3

Point = tuple[int, int]


class Prompt(NamedTuple):
    """What a promptable segmenter is given: a box and three points, in pixels of the 224 x 224 image."""

    box: Box
    points: tuple[Point, Point, Point]


class Masks(NamedTuple):
    """Where masks come from.

    Attributes:
        truth: record -> true mask, bool [height, width].
        segment: record, box, points -> predicted mask of the same shape, or None if none can be made.
    """

    truth: Callable[[Mapping[str, Any]], np.ndarray]
    segment: Callable[[Mapping[str, Any], Box, tuple[Point, ...]], np.ndarray | None]


def answer(truth: Prompt) -> str:
    """``[16,24,80,88] [40,48] [48,56] [56,64]``."""
    box, points = truth
    return " ".join("[" + ",".join(map(str, group)) + "]" for group in (box, *points))


def groups(text: str) -> list[str] | None:
    """The bracketed groups of a text, brackets included; None if brackets do not pair up or nest."""
    if not readable(text):
        return None
    found = re.findall(r"\[[^\[\]]*\]", text)
    whole = text.count("[") == len(found) == text.count("]")
    return found if whole else None


def bare(text: str) -> str:
    """The groups of an answer without the words around them."""
    return " ".join(groups(text))


def parse(text: str) -> Prompt | None:
    """A box and exactly three points, all inside the image; None otherwise."""
    found = groups(text)
    if not found or len(found) != 4:
        return None
    box = valid(integers(found[0], "[ # , # , # , # ]"))
    points = [integers(group, "[ # , # ]") for group in found[1:]]
    if box is None or any(p is None or max(p) > SIZE for p in points):
        return None
    return Prompt(box, tuple(points))


def truth(slot: Slot, record: Mapping[str, Any]) -> Prompt:
    """The true box and points of a record, from its answer."""
    prompt = parse(record.get(slot.answer_field, ""))
    if prompt is None:
        raise ValueError(
            f"{describe(slot, record)}: field '{slot.answer_field}' must hold a box and three points, "
            "such as [16,24,80,88] [40,48] [48,56] [56,64]"
        )
    return prompt


def mask_scores(true: np.ndarray, given: np.ndarray) -> tuple[float, float]:
    """(J, F) of two bool masks of one shape; two empty masks agree."""
    shared = int((true & given).sum())
    n_true, n_given = int(true.sum()), int(given.sum())
    if n_true + n_given == 0:
        return 1.0, 1.0
    # With P = shared / given and R = shared / true the published form simplifies to this.
    f = (1 + BETA2) * shared / (BETA2 * n_true + n_given)
    return shared / (n_true + n_given - shared), f


def measure(
    slot: Slot,
    records: Sequence[Mapping[str, Any]],
    answers: Sequence[Prompt | None],
    masks: Masks | None = None,
) -> tuple[dict[str, float], list[float]]:
    """J and F over all samples, and counts of what has no mask and, if there are any, of black true masks; per sample J."""
    masks = needed(slot, masks)
    pairs = [
        None if given is None else scored(slot, masks, record, given)
        for record, given in zip(records, answers, strict=True)
    ]
    table = np.array([p or (0.0, 0.0) for p in pairs])
    made = np.array([p for p in pairs if p is not None] or [(0.0, 0.0)])
    metrics = dict(zip(("J", "F", "J_answered", "F_answered"), map(float, (*table.mean(0), *made.mean(0)))))
    metrics["no_mask"] = sum(p is None for p in pairs)
    if empty := sum(not np.any(masks.truth(record)) for record in records):
        metrics["empty_truth"] = empty
    return metrics, table[:, 0].tolist()


def scored(slot: Slot, masks: Masks, record: Mapping[str, Any], given: Prompt) -> tuple[float, float] | None:
    """(J, F) of an answer, None if no mask can be made of it."""
    mask = masks.segment(record, given.box, given.points)
    if mask is None:
        return None
    true, mask = np.asarray(masks.truth(record), bool), np.asarray(mask, bool)
    if true.shape != mask.shape or true.ndim != 2:
        raise ValueError(
            f"{describe(slot, record)}: true mask is {true.shape}, predicted {mask.shape}; both must be one "
            "[height, width]"
        )
    return mask_scores(true, mask)


def needed(slot: Slot, masks: Masks | None) -> Masks:
    """The masks, or a ValueError where there are none."""
    if masks is None:
        raise ValueError(f"slot {slot.name} is scored on masks: pass masks=Masks(truth, segment)")
    return masks


def chance(slot: Slot, records: Sequence[Mapping[str, Any]], masks: Masks | None = None) -> float:
    """J of the best constant answer (:func:`constant`), through the same segmenter."""
    masks = needed(slot, masks)
    metrics, _ = measure(slot, records, [constant(slot, records, masks)] * len(records), masks)
    return metrics["J"]


def constant(slot: Slot, records: Sequence[Mapping[str, Any]], masks: Masks) -> Prompt:
    """The box and points that suit all records best.

    Of :func:`crab.tasks.spatial.constant_boxes` the one with the highest mean IoU with the true masks'
    boxes is taken; its points lie on its diagonal, at a quarter, half and three quarters.
    """
    found = [bounding_box(np.asarray(masks.truth(r), bool)) for r in records]
    boxes = np.array([b for b in found if b])
    if not len(boxes):
        raise ValueError(f"slot {slot.name}: every true mask is empty")
    best = max(constant_boxes(boxes).tolist(), key=lambda box: float(iou(boxes, box).mean()))
    x1, y1, x2, y2 = best
    points = tuple((x1 + (x2 - x1) * i // 4, y1 + (y2 - y1) * i // 4) for i in (1, 2, 3))
    return Prompt(tuple(best), points)


def bounding_box(mask: np.ndarray) -> Box | None:
    """The box of a bool mask [height, width] in pixels of the 224 x 224 image; None if it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    y, x = SIZE / mask.shape[0], SIZE / mask.shape[1]
    return tuple(int(round(v)) for v in (columns[0] * x, rows[0] * y, (columns[-1] + 1) * x, (rows[-1] + 1) * y))


def points_inside(mask: np.ndarray, count: int = 3, step: int = 8) -> list[Point]:
    """Some (x, y) on a mask, spread from high to low among its lattice points, off its edge where it is wide enough.

    Args:
        mask: bool [224, 224] with at least `count` pixels.
        step: pixels between lattice points; where too few of them lie on the mask, all its pixels are taken.
    """
    deep = mask.copy()
    for axis in (0, 1):
        deep &= np.roll(mask, 2, axis) & np.roll(mask, -2, axis)
    lattice = np.zeros_like(mask)
    lattice[::step, ::step] = True
    for candidates in (deep & lattice, mask & lattice, mask):
        spots = np.argwhere(candidates)
        if len(spots) >= count:
            return [(int(x), int(y)) for y, x in (spots[len(spots) * (2 * n + 1) // (2 * count)] for n in range(count))]
    raise ValueError(f"the mask has {int(mask.sum())} pixels; {count} points need at least as many")
