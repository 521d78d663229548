"""Spatial localization: the box of the thing that sounds (ARIG).

Boxes are (x1, y1, x2, y2) in integer pixels of the 224 x 224 image, right and bottom exclusive.
cIoU is the share of frames whose IoU is at least 0.5; AUC is the area under the curve of that share
over the thresholds 0, 0.05, ..., 1 (Senocak et al., "Learning to Localize Sound Source in Visual
Scenes", CVPR 2018), by the trapezoidal rule. An unparsable answer succeeds at no threshold, not even 0.
"""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy as np

from .registry import Slot, describe, whole
from .text import integers, only

TAGS = ("obj",)
SIZE = 224
THRESHOLDS = tuple(i / 20 for i in range(21))

Box = tuple[int, int, int, int]


def answer(truth: Box) -> str:
    """``<obj>(16,24)(80,88)</obj>``."""
    x1, y1, x2, y2 = truth
    return f"<obj>({x1},{y1})({x2},{y2})</obj>"


def parse(text: str) -> Box | None:
    """The one box of a text; None if there is none, or it is inside out, empty or off the image."""
    inside = only(text, "obj")
    return valid(integers(inside, "( # , # ) ( # , # )")) if inside is not None else None


def valid(box: Sequence[int] | None) -> Box | None:
    """The box if it has an area inside the image, else None."""
    if box is None or len(box) != 4:
        return None
    x1, y1, x2, y2 = box
    return (x1, y1, x2, y2) if 0 <= x1 < x2 <= SIZE and 0 <= y1 < y2 <= SIZE else None


def truth(slot: Slot, record: Mapping[str, Any]) -> Box:
    """The true box: from `top_left` and `bottom_right` where the record has them, else from its answer."""
    box = None
    if slot.truth_fields and all(f in record for f in slot.truth_fields):
        try:
            (x1, y1), (x2, y2) = (map(whole, record[f]) for f in slot.truth_fields)
            box = valid((x1, y1, x2, y2))
        except (TypeError, ValueError):
            box = None
    else:
        box = parse(record.get(slot.answer_field, ""))
    if box is None:
        raise ValueError(
            f"{describe(slot, record)}: {' and '.join(slot.truth_fields)} (or '{slot.answer_field}') must "
            f"give a box in whole pixels, [x1, y1] and [x2, y2], with 0 <= x1 < x2 <= {SIZE} and 0 <= y1 < y2 <= {SIZE}"
        )
    return box


def iou(a, b) -> np.ndarray:
    """Intersection over union of boxes [..., 4] with area; shapes broadcast."""
    a, b = np.asarray(a), np.asarray(b)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.clip(sides, 0, None).prod(-1)
    areas = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    return shared / (areas - shared)


def measure(slot: Slot, records: Sequence[Mapping[str, Any]], answers: Sequence[Box | None]):
    """cIoU, AUC and mean IoU; per sample whether IoU is at least 0.5."""
    # -1 for no box: below every threshold.
    overlaps = np.array([
        -1.0 if given is None else float(iou(truth(slot, record), given))
        for record, given in zip(records, answers, strict=True)
    ])
    success = np.array([(overlaps >= t).mean() for t in THRESHOLDS])
    hits = (overlaps >= 0.5).astype(float)
    auc = float((success[1:] + success[:-1]).sum() / 2 / (len(THRESHOLDS) - 1))
    return {"ciou": float(hits.mean()), "auc": auc, "iou": float(overlaps.clip(0).mean())}, hits.tolist()


def constant_boxes(boxes: np.ndarray) -> np.ndarray:
    """Boxes worth trying as a constant answer: the middle of the image, the median box, every true box.

    Args:
        boxes: true boxes [n, 4].
    """
    middle = [SIZE // 4, SIZE // 4, SIZE - SIZE // 4, SIZE - SIZE // 4]
    median = np.rint(np.median(boxes, 0)).astype(int)
    tried = np.unique(np.vstack([[middle], [median], boxes]), axis=0)
    return tried[(tried[:, 0] < tried[:, 2]) & (tried[:, 1] < tried[:, 3])]


def chance(slot: Slot, records: Sequence[Mapping[str, Any]]) -> float:
    """cIoU of the best constant box among :func:`constant_boxes`."""
    boxes = np.array([truth(slot, r) for r in records])
    return max(float((iou(boxes, box) >= 0.5).mean()) for box in constant_boxes(boxes))
