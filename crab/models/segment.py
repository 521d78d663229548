"""From a predicted box and points to a mask, by a promptable segmenter: GrabCut, which needs no weights, or SAM 2.

Both have one signature, :data:`Segmenter`; :func:`segmenter` gives the one of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import cv2
import numpy as np

GRABCUT = "grabcut"

#: (uint8 RGB image [H, W, 3], box, points) -> bool mask [H, W]. The box is x1, y1, x2, y2 in pixels, x2 and y2
#: exclusive, and is clipped to the image; a box without area inside it gives an empty mask.
Segmenter = Callable[[np.ndarray, Sequence[int], Sequence[Sequence[int]]], np.ndarray]


@cache
def segmenter(name: str = GRABCUT) -> Segmenter:
    """The segmenter of a name: ``"grabcut"``, else a folder or hub name of a SAM 2 checkpoint, loaded once.

    Raises:
        ValueError: when there is no such checkpoint or it is not a whole SAM 2.
    """
    return grabcut if name == GRABCUT else Sam2(name)


def _clipped(image: np.ndarray, box: Sequence[int]) -> tuple[int, int, int, int]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    return tuple(int(np.clip(v, 0, most)) for v, most in zip(box, (width, height) * 2, strict=True))


def grabcut(
    image: np.ndarray, box: Sequence[int], points: Sequence[Sequence[int]] = (), iterations: int = 3
) -> np.ndarray:
    """Mask of the object that ``box`` and ``points`` prompt for, by GrabCut (Rother, Kolmogorov and Blake, 2004).

    The colours inside and outside the box are modelled by Gaussian mixtures, and the image is cut
    between them; the points are held to be foreground.

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
    x1, y1, x2, y2 = _clipped(image, box)
    mask = np.zeros(image.shape[:2], bool)
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


class Sam2:
    """SAM 2 (Ravi et al., 2024) of transformers, as a :data:`Segmenter`; on the GPU where there is one.

    Its own processor needs torchvision; the few lines it does for one image stand here instead.

    Args:
        name: folder or hub name of a checkpoint that `Sam2Model` can load.
    """

    # The normalisation that SAM 2 was trained with: ImageNet's, of values in 0..1.
    MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, name: str) -> None:
        import torch  # loaded only for SAM 2, so that scoring with GrabCut needs no torch
        from safetensors import SafetensorError
        from transformers import Sam2Model

        try:
            model, loaded = Sam2Model.from_pretrained(name, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
            raise ValueError(f"segmenter '{name}': no SAM 2 can be loaded from it ({' '.join(str(error).split())[:200]}); give "
                             f"'{GRABCUT}', or a folder or hub name of a SAM 2 checkpoint") from error
        # transformers goes on with random weights where some are not in the file
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(f"segmenter '{name}': {len(missing)} weights are missing, e.g. {missing[0]}; give a whole "
                             "SAM 2 checkpoint")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.eval().to(self.device)
        self.side: int = model.config.prompt_encoder_config.image_size

    def pixels(self, image: np.ndarray):
        """The image as the model takes it: float32 [1, 3, side, side], resized without regard to its shape, normalised."""
        import torch

        raw = torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None]
        size = (self.side, self.side)
        raw = torch.nn.functional.interpolate(raw, size, mode="bilinear", antialias=True).round().clip(0, 255)
        mean, spread = (torch.tensor(v).view(3, 1, 1) for v in (self.MEAN, self.SPREAD))
        return (raw / 255 - mean) / spread

    def prompt(self, shape: Sequence[int], box: Sequence[int], points: Sequence[Sequence[int]]) -> dict:
        """Box [1, 1, 4] and points [1, 1, n, 2] in pixels of the resized image, all points on the object."""
        import torch

        scale = torch.tensor([self.side / shape[1], self.side / shape[0]])
        made = {"input_boxes": (torch.tensor(box).view(2, 2) * scale).view(1, 1, 4)}
        if len(points):
            made["input_points"] = (torch.tensor(points) * scale)[None, None]
            made["input_labels"] = torch.ones(1, 1, len(points), dtype=torch.int64)
        return made

    def __call__(self, image: np.ndarray, box: Sequence[int], points: Sequence[Sequence[int]] = ()) -> np.ndarray:
        import torch

        box = _clipped(image, box)
        if box[2] <= box[0] or box[3] <= box[1]:
            return np.zeros(image.shape[:2], bool)
        inputs = {"pixel_values": self.pixels(image), **self.prompt(image.shape, box, points)}
        with torch.inference_mode():
            logits = self.model(**{k: v.to(self.device) for k, v in inputs.items()}, multimask_output=False).pred_masks
            logits = torch.nn.functional.interpolate(logits[0].float(), image.shape[:2], mode="bilinear", align_corners=False)
        return (logits[0, 0] > 0).cpu().numpy()
