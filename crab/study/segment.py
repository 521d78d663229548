"""From a predicted box and points to a mask, by a promptable segmenter without weights.

GrabCut (Rother, Kolmogorov and Blake, 2004) models the colours inside and outside the box by
Gaussian mixtures and cuts between them; the points are held to be foreground.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

Box = tuple[int, int, int, int]


def grabcut(
    image: np.ndarray, box: Sequence[int], points: Sequence[Sequence[int]] = (), iterations: int = 3
) -> np.ndarray:
    """Mask of the object that ``box`` and ``points`` prompt for.

    Args:
        image: uint8 [H, W, 3], RGB.
        box: x1, y1, x2, y2 in pixels, x2 and y2 exclusive; clipped to the image.
        points: x, y in pixels, on the object; those outside the box are ignored.
        iterations: rounds of model fitting and cutting.

    Returns:
        bool [H, W]. The whole box where GrabCut finds no foreground, or where the box leaves no
        background to model; all False where the box has no area inside the image.
    """
    image = np.ascontiguousarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    x1, x2 = (int(np.clip(v, 0, width)) for v in (box[0], box[2]))
    y1, y2 = (int(np.clip(v, 0, height)) for v in (box[1], box[3]))
    mask = np.zeros((height, width), bool)
    if x2 <= x1 or y2 <= y1:
        return mask
    mask[y1:y2, x1:x2] = True
    if mask.all():
        return mask

    labels = np.where(mask, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
    for x, y in points:
        if x1 <= x < x2 and y1 <= y < y2:
            cv2.circle(labels, (int(x), int(y)), 2, cv2.GC_FGD, -1)
    labels[~mask] = cv2.GC_BGD
    cv2.setRNGSeed(0)  # the mixtures start from k-means, which draws from OpenCV's own generator
    try:
        cv2.grabCut(image, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), iterations, cv2.GC_INIT_WITH_MASK)
    except cv2.error:
        return mask  # too few pixels of one side for a mixture of five
    found = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    return found if found.any() else mask
