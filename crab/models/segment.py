"""From a predicted box and points to a mask: by GrabCut, which needs no weights, or by SAM 2.

torch is imported for SAM 2 alone, so that scoring with GrabCut does not load it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import cv2
import numpy as np

GRABCUT = "grabcut"

#: (uint8 RGB image [H, W, 3], box, points) -> bool mask [H, W]. The box is x1, y1, x2, y2 in pixels, x2 and y2
#: exclusive. It is clipped to the image; a box without area inside the image gives an empty mask.
Segmenter = Callable[[np.ndarray, Sequence[int], Sequence[Sequence[int]]], np.ndarray]


@cache
def segmenter(name: str = GRABCUT) -> Segmenter:
    """``"grabcut"``, or a SAM 2 checkpoint by folder or hub name, loaded once. ValueError if it is no whole SAM 2."""
    return grabcut if name == GRABCUT else Sam2(name)


def _clipped(image: np.ndarray, box: Sequence[int]) -> tuple[int, int, int, int] | None:
    """The part of the box inside the image; None if it has no area."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (int(np.clip(v, 0, most)) for v, most in zip(box, (width, height) * 2, strict=True))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def grabcut(image: np.ndarray, box: Sequence[int], points: Sequence[Sequence[int]] = ()) -> np.ndarray:
    """GrabCut (Rother, Kolmogorov and Blake, 2004), three rounds, as a `Segmenter`. Points in the box are foreground.

    The mask is the whole box if GrabCut finds no foreground, or if the box leaves no background to model.
    """
    image = np.ascontiguousarray(image)
    mask = np.zeros(image.shape[:2], bool)
    if (inside := _clipped(image, box)) is None:
        return mask
    x1, y1, x2, y2 = inside
    mask[y1:y2, x1:x2] = True
    if mask.all():
        return mask
    labels = np.where(mask, cv2.GC_PR_FGD, cv2.GC_BGD).astype(np.uint8)
    for x, y in points:
        if x1 <= x < x2 and y1 <= y < y2:
            cv2.circle(labels, (int(x), int(y)), 2, cv2.GC_FGD, -1)
    labels[~mask] = cv2.GC_BGD
    cv2.setRNGSeed(0)  # the mixtures start from k-means, which draws from the generator of OpenCV
    try:
        cv2.grabCut(image, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_MASK)
    except cv2.error:
        return mask  # one side has too few pixels for a mixture of five
    foreground = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
    return foreground if foreground.any() else mask


class Sam2:
    """SAM 2 (Ravi et al., 2024) of transformers, as a `Segmenter`; on the GPU if there is one.

    The processor of transformers needs torchvision. The few lines that one image needs are here instead.
    """

    # mean and deviation of ImageNet, for values in 0..1, with which SAM 2 was trained
    MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, name: str) -> None:
        import torch
        from safetensors import SafetensorError
        from transformers import Sam2Model

        try:
            model, loaded = Sam2Model.from_pretrained(name, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
            raise ValueError(
                f"segmenter '{name}': no SAM 2 can be loaded from it ({' '.join(str(error).split())[:200]}); use "
                f"'{GRABCUT}', or a folder or hub name of a SAM 2 checkpoint"
            ) from error
        if missing := sorted(loaded["missing_keys"]):  # transformers would leave these weights random
            problem = f"{len(missing)} weights are missing, e.g. {missing[0]}"
            raise ValueError(f"segmenter '{name}': {problem}; use a whole SAM 2 checkpoint")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.eval().to(self.device)
        self.side: int = model.config.prompt_encoder_config.image_size

    def inputs(self, image: np.ndarray, box: Sequence[int], points: Sequence[Sequence[int]]) -> dict:
        """What the model takes: the image, stretched to a square and normalised, and the prompt in its pixels."""
        import torch

        raw = torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None]
        size = (self.side, self.side)
        raw = torch.nn.functional.interpolate(raw, size, mode="bilinear", antialias=True).round().clip(0, 255)
        mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (self.MEAN, self.DEVIATION))
        scale = torch.tensor([self.side / image.shape[1], self.side / image.shape[0]])
        inputs = {"pixel_values": (raw / 255 - mean) / deviation}
        inputs["input_boxes"] = (torch.tensor(box).view(2, 2) * scale).view(1, 1, 4)
        if len(points):
            inputs["input_points"] = (torch.tensor(points) * scale)[None, None]
            inputs["input_labels"] = torch.ones(1, 1, len(points), dtype=torch.int64)  # all lie on the object
        return {name: value.to(self.device) for name, value in inputs.items()}

    def __call__(self, image: np.ndarray, box: Sequence[int], points: Sequence[Sequence[int]] = ()) -> np.ndarray:
        import torch

        if (inside := _clipped(image, box)) is None:
            return np.zeros(image.shape[:2], bool)
        with torch.inference_mode():
            logits = self.model(**self.inputs(image, inside, points), multimask_output=False).pred_masks[0].float()
            logits = torch.nn.functional.interpolate(logits, image.shape[:2], mode="bilinear", align_corners=False)
        return (logits[0, 0] > 0).cpu().numpy()
