"""Spatial and pixel-level localization: a box (ARIG), or a box and three points for a segmenter (S4, MS3, Ref-AVS).

Coordinates are whole pixels of the 224 x 224 image, to which decimals are rounded; x2 and y2 of a box are exclusive.
This module reads no files.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .answers import Kind, Scores, clean, decimals, nearest, only, readable
from .fields import Record, describe, field_error, listed, number, required
from .registry import Slot

SIZE = 224
BETA2 = 0.3
NULL = "null"  #: the truth, or the answer, that the described thing is not there
SPLITS = {"test_s": "seen", "test_u": "unseen", "test_n": NULL}
_THERE = {"true": True, "yes": True, "false": False, "no": False}

Box = tuple[int, int, int, int]
Point = tuple[int, int]


class Prompt(NamedTuple):
    """The input of a promptable segmenter, with one to three points."""

    box: Box
    points: tuple[Point, ...]


class Masks(NamedTuple):
    """The source of masks, bool [height, width]. `segment` makes one from a box and points, or None if it cannot."""

    truth: Callable[[Record], np.ndarray]
    segment: Callable[[Record, Box, tuple[Point, ...]], np.ndarray | None]


class OneBox(Kind):
    """ARIG: ``<obj>(16,24)(80,88)</obj>``. There may be a comma between the corners.

    cIoU is the share of frames with an IoU of at least 0.5. AUC is the area under this share over the thresholds 0,
    0.05, ..., 1, by the trapezoidal rule (Senocak et al., "Learning to Localize Sound Source in Visual Scenes", CVPR
    2018). An unreadable answer succeeds at no threshold, not even 0.
    """

    tags = ("obj",)

    def answer(self, truth: Box) -> str:
        x1, y1, x2, y2 = truth
        return f"<obj>({x1},{y1})({x2},{y2})</obj>"

    def parse(self, text: str, record: Record | None = None) -> Box | None:
        return _valid(decimals(only(text, "obj") or "", "( # , # ) ,? ( # , # )"))

    def bare(self, text: str) -> str:
        return f"<obj>{only(text, 'obj')}</obj>"

    def truth(self, slot: Slot, record: Record) -> Box:
        if all(field in record for field in slot.truth_fields):
            try:
                (x1, y1), (x2, y2) = (map(number, listed(record[field])) for field in slot.truth_fields)
                box = _valid((x1, y1, x2, y2))
            except (TypeError, ValueError):
                box = None
        else:
            box = self.parse(record.get(slot.answer_field, ""))
        if box is None:
            fields = f"{' and '.join(slot.truth_fields)} (or '{slot.answer_field}')"
            bounds = f"0 <= x1 < x2 <= {SIZE} and 0 <= y1 < y2 <= {SIZE}"
            fix = f"{fields} must give a box in pixels, [x1, y1] and [x2, y2], with {bounds}"
            raise ValueError(f"{describe(slot, record)}: {fix}")
        return box

    def measure(self, slot: Slot, records: Sequence[Record], answers: Sequence[Box | None], masks=None) -> Scores:
        """cIoU, AUC and mean IoU; per sample whether the IoU is at least 0.5."""
        pairs = zip(records, answers, strict=True)
        overlaps = np.array([-1.0 if box is None else float(iou(self.truth(slot, r), box)) for r, box in pairs])
        success = np.array([(overlaps >= i / 20).mean() for i in range(21)])
        auc = float((success[1:] + success[:-1]).sum() / 2 / 20)
        hits = (overlaps >= 0.5).astype(float)
        return {"ciou": float(hits.mean()), "auc": auc, "iou": float(overlaps.clip(0).mean())}, hits.tolist()

    def chance(self, slot: Slot, records: Sequence[Record], masks=None) -> float:
        """The best box among :func:`constant_boxes`."""
        boxes = np.array([self.truth(slot, record) for record in records])
        return max(float((iou(boxes, box) >= 0.5).mean()) for box in constant_boxes(boxes))


class Pixels(Kind):
    """S4 and MS3: ``[16,24,80,88] [40,48] [48,56] [56,64]``.

    An answer with one or two points is read as well, and so are brackets around the groups: ``[[40,48],[48,56]]``.

    J is the mean IoU of the answered and the true mask. F is (1 + b2) P R / (b2 P + R) on pixels with b2 = 0.3, with no
    search over thresholds (Zhou et al., "Audio-Visual Segmentation", ECCV 2022).

    A failed answer cannot be read, or has no mask. It has J = F = 0 and is counted in ``no_mask``. Metrics that end in
    ``_answered`` leave failed answers out, as the published script does. But that script reads the first box and the
    last three points (fewer points or no box will do), no white space and no coordinate of 224, so its numbers differ.

    If the true mask is black (nothing in view sounds, as in some frames of MS3), an empty mask has J = F = 1 and any
    other J = F = 0, as in the published script. ``empty_truth`` counts such frames. AVSBench's code differs: J is then
    the unmarked share of the image, which is never lower, and F leaves such frames out.
    """

    example = "a box and three points, such as [16,24,80,88] [40,48] [48,56] [56,64]"

    def answer(self, truth: Prompt) -> str:
        box, points = truth
        return " ".join("[" + ",".join(map(str, group)) + "]" for group in (box, *points))

    def bare(self, text: str) -> str:
        return " ".join(_groups(text))

    def parse(self, text: str, record: Record | None = None) -> Prompt | None:
        groups = _groups(text)
        if not groups or not 2 <= len(groups) <= 4:
            return None
        box = _valid(decimals(groups[0], "[ # , # , # , # ]"))
        points = [decimals(group, "[ # , # ]") for group in groups[1:]]
        if not box or not all(point and max(point) <= SIZE for point in points):
            return None
        return Prompt(box, tuple((nearest(x), nearest(y)) for x, y in points))

    def split(self, slot: Slot, record: Record) -> str:
        """The split of a record, "" if the slot has none. Each split has its metrics."""
        return ""

    def measure(self, slot: Slot, records: Sequence[Record], answers: Sequence, masks: Masks) -> Scores:
        """J and F by split, S on null, and counts of failed answers and black true masks; per sample J."""
        splits = [self.split(slot, record) for record in records]
        rows = list(zip(records, answers, splits, strict=True))
        scores = [_score(slot, masks, record, answer, split == NULL) for record, answer, split in rows]
        metrics = {"J": float(np.mean([score.j for score in scores]))}
        for kind in "", "_answered":
            for split in [name for name in ("", *SPLITS.values()) if name in splits]:
                part = [score for score, name in zip(scores, splits, strict=True) if name == split]
                part = [score for score in part if score.answered or not kind]
                j, f = np.mean([(score.j, score.f) for score in part] or [(0.0, 0.0)], axis=0)
                if split == NULL:
                    metrics[f"S_{split}{kind}"] = float(np.mean([score.s for score in part] or [1.0]))
                else:
                    name = f"_{split}{kind}" if split else kind
                    metrics |= {f"J{name}": float(j), f"F{name}": float(f)}
        metrics["no_mask"] = sum(not score.answered for score in scores)
        if empty := sum(not split and not np.any(masks.truth(record)) for record, _, split in rows):
            metrics["empty_truth"] = empty
        return metrics, [score.j for score in scores]

    def chance(self, slot: Slot, records: Sequence[Record], masks: Masks) -> float:
        """J of the best constant answer, with the same segmenter."""
        tried = self.constants(slot, records, masks)
        return max(self.measure(slot, records, [answer] * len(records), masks)[0]["J"] for answer in tried)

    def constants(self, slot: Slot, records: Sequence[Record], masks: Masks) -> list[Prompt | str]:
        """The constant answers to try: the box with the highest mean IoU with the boxes of the true masks.

        Its points lie on its diagonal, at a quarter, a half and three quarters.
        """
        boxes = [bounding_box(np.asarray(masks.truth(record), bool)) for record in records]
        boxes = np.array([box for box in boxes if box])
        if not len(boxes):
            raise ValueError(f"slot {slot.name}: every true mask is empty")
        best = max(constant_boxes(boxes).tolist(), key=lambda box: float(iou(boxes, box).mean()))
        x1, y1, x2, y2 = best
        return [Prompt(tuple(best), tuple((x1 + (x2 - x1) * i // 4, y1 + (y2 - y1) * i // 4) for i in (1, 2, 3)))]


class Referred(Pixels):
    """Ref-AVS: ``<answer>true</answer>`` with box and points, or ``<answer>false</answer>`` for :data:`NULL`.

    A test record is of one split: seen classes, unseen classes, or null (the thing is not there). On null, S is the
    square root of the answered foreground over the true background, the whole image; 0 is best, 1 worst (Wang et al.,
    "Ref-AVS: Refer and Segment Objects in Audio-Visual Scenes", ECCV 2024). The published script of Crab+ divides by
    the answered background, so its S is higher and has no bound. The primary J is over all samples. J of a null sample
    is 1 if the answer is NULL, else 0: the IoU with an empty mask.
    """

    tags = ("answer",)
    example = f"<answer>false</answer>, or <answer>true</answer> with {Pixels.example}"

    def answer(self, truth: Prompt | str) -> str:
        return "<answer>false</answer>" if truth == NULL else f"<answer>true</answer> {super().answer(truth)}"

    def bare(self, text: str) -> str:
        return " ".join([f"<answer>{only(text, 'answer')}</answer>", *_groups(text)])

    def parse(self, text: str, record: Record | None = None) -> Prompt | str | None:
        there = _THERE.get(clean(only(text, "answer")))
        if there:
            return super().parse(text)
        return NULL if there is False and _groups(text) == [] else None

    def truth(self, slot: Slot, record: Record) -> Prompt | str:
        """From the answer. A record of the null split needs none, because published test records have none."""
        split = self.split(slot, record) if "split" in record else None
        if split == NULL and slot.answer_field not in record:
            return NULL
        truth = super().truth(slot, record)
        if split and (split == NULL) != (truth == NULL):
            fields = f"fields 'split' and '{slot.answer_field}'"
            raise ValueError(f"{describe(slot, record)}: {fields} disagree on whether it is there; correct one of them")
        return truth

    def split(self, slot: Slot, record: Record) -> str:
        value = required(slot, record, "split")
        if not isinstance(value, str) or value not in SPLITS:
            raise field_error(slot, record, "split", f"give one of {', '.join(SPLITS)}")
        return SPLITS[value]

    def constants(self, slot: Slot, records: Sequence[Record], masks: Masks) -> list[Prompt | str]:
        """NULL, and the best box and points for the things that are there."""
        there = [record for record in records if self.split(slot, record) != NULL]
        return [NULL, *(super().constants(slot, there, masks) if there else ())]


def _groups(text: str) -> list[str] | None:
    """The bracketed groups of a text, those of an answer that is given twice once.

    None if brackets do not pair up, or nest. Brackets around groups and commas alone do not count.
    """
    if not readable(text):
        return None
    groups, rest = re.findall(r"\[[^\[\]]*\]", text), re.sub(r"\[[^\[\]]*\]", "", text)
    half = len(groups) // 2
    groups = groups[:half] if half > 1 and groups[:half] == groups[half:] else groups
    return None if re.search(r"[\[\]]", re.sub(r"\[[\s,]*\]", "", rest)) else groups


class _Score(NamedTuple):
    """The scores of one answer, by default of a failed one."""

    answered: bool = False
    j: float = 0.0
    f: float = 0.0
    s: float = 1.0


def _score(slot: Slot, masks: Masks, record: Record, answer: Prompt | str | None, null: bool) -> _Score:
    """The scores of an answer. `null`: the thing is not there, and the record has no true mask."""
    if null and answer == NULL:
        return _Score(True, 1.0, 1.0, 0.0)
    mask = masks.segment(record, *answer) if isinstance(answer, Prompt) else None
    if answer is None or (mask is None and answer != NULL):
        return _Score()
    if null:
        return _Score(True, s=float(np.asarray(mask, bool).mean() ** 0.5))
    true = np.asarray(masks.truth(record), bool)
    mask = np.zeros_like(true) if answer == NULL else np.asarray(mask, bool)
    if true.shape != mask.shape or true.ndim != 2:
        shapes = f"true mask is {true.shape}, predicted {mask.shape}"
        raise ValueError(f"{describe(slot, record)}: {shapes}; both must be one [height, width]")
    return _Score(True, *mask_scores(true, mask), 0.0)


def mask_scores(true: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """(J, F) of two bool masks of one shape; (1, 1) if both are empty."""
    shared, n_true, n_mask = (int(pixels.sum()) for pixels in (true & mask, true, mask))
    if n_true + n_mask == 0:
        return 1.0, 1.0
    # With P = shared / mask and R = shared / true the published F becomes this.
    return shared / (n_true + n_mask - shared), (1 + BETA2) * shared / (BETA2 * n_true + n_mask)


def _valid(box: Sequence[float] | None) -> Box | None:
    """The box in whole pixels, if it has an area and lies inside the image; else None."""
    x1, y1, x2, y2 = map(nearest, box or (0, 0, 0, 0))
    return (x1, y1, x2, y2) if 0 <= x1 < x2 <= SIZE and 0 <= y1 < y2 <= SIZE else None


def iou(a, b) -> np.ndarray:
    """Intersection over union of boxes [..., 4]; the shapes broadcast."""
    a, b = np.asarray(a), np.asarray(b)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.clip(sides, 0, None).prod(-1)
    areas = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    return shared / (areas - shared)


def constant_boxes(boxes: np.ndarray) -> np.ndarray:
    """Boxes to try as a constant answer: the middle of the image, the median of the true boxes [n, 4], and these."""
    middle = [SIZE // 4, SIZE // 4, SIZE - SIZE // 4, SIZE - SIZE // 4]
    median = np.rint(np.median(boxes, 0)).astype(int)
    tried = np.unique(np.vstack([[middle], [median], boxes]), axis=0)
    return tried[(tried[:, 0] < tried[:, 2]) & (tried[:, 1] < tried[:, 3])]


def bounding_box(mask: np.ndarray) -> Box | None:
    """The box of a bool mask [height, width], in pixels of the 224 x 224 image; None if the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    y, x = SIZE / mask.shape[0], SIZE / mask.shape[1]
    return tuple(int(round(v)) for v in (columns[0] * x, rows[0] * y, (columns[-1] + 1) * x, (rows[-1] + 1) * y))


def points_inside(mask: np.ndarray, count: int = 3, step: int = 8) -> list[Point]:
    """Points (x, y) on a bool mask [224, 224], spread from top to bottom, off its edge if it is wide enough.

    They lie on a lattice of `step` pixels, or anywhere if too few lattice points lie on the mask.
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
