"""Images and masks, read by Pillow: 8 bits a channel, upright, and without transparency.

Whole numbers of 16 bits lose their lower 8. Transparent images are laid on white, as the preprocessing of Qwen2.5-Omni
does it. Where a mask is transparent, it is background.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image
from PIL.Image import Transpose

from crab.data.containers import SIZE, MediaError, decoding, existing

#: What turns a picture upright, by its mark (EXIF 2.32, tag Orientation).
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A picture as uint8 [224, 224, 3] RGB, resized bilinearly, and upright if its file says how it was taken.

    MediaError if the file is missing or undecodable, or if it does not say which of its values is white.
    """
    with opened(path) as image:
        turn, (picture, opaque) = _turn(image), _layers(image)
        if picture.mode not in ("1", "L", "RGB"):
            picture = Image.fromarray(_eight_bits(path, np.asarray(picture), image.format))
        picture = picture.convert("RGB")
        if opaque is not None:
            picture = Image.composite(picture, Image.new("RGB", picture.size, "white"), opaque)
        if turn is not None:
            picture = picture.transpose(turn)
        if picture.size != (SIZE, SIZE):
            picture = picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return np.array(picture)


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """A mask as bool [224, 224]: true where any channel is not black (AVSBench paints objects on black).

    Where the file is more than half transparent the mask is false. MediaError if it is missing or undecodable.
    """
    with opened(path) as image:
        values, opaque = _layers(image)
        painted = np.asarray(values) > 0
    painted = painted.any(axis=-1) if painted.ndim == 3 else painted
    if opaque is not None:
        painted &= np.asarray(opaque) >= 128
    if painted.shape != (SIZE, SIZE):
        image = Image.fromarray(painted.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.NEAREST)
        painted = np.asarray(image) > 0
    return painted


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """A decoded image, or MediaError."""
    path = existing(path)
    with decoding(path, "an image"):
        image = Image.open(path)
    with image:
        with decoding(path, "an image"):
            image.load()  # Pillow decodes late: a truncated file would otherwise fail outside this guard
        yield image


def _turn(image: Image.Image) -> Transpose | None:
    """How to turn a picture upright. Malformed marks are ignored."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # struct.error, SyntaxError and more, by the kind of damage; the pixels are fine
        return None


def _layers(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A picture as grey of any depth or as 8-bit RGB, and how opaque it is, 8-bit grey; None if it is everywhere."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        clear = image.info.get("transparency")  # a png may name one value that is transparent
        opaque = np.asarray(image) != clear
        return image, None if clear is None else Image.fromarray(opaque).convert("L")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return layers.convert("RGB"), layers.getchannel("A")
    return image if image.mode in ("1", "L") else image.convert("RGB"), None


def _eight_bits(path: str | os.PathLike, values: np.ndarray, form: str | None) -> np.ndarray:
    """Values of more than 8 bits as uint8. Black is 0; white is 65535 for 16 bits, and 1 or 255 for numbers that float.

    MediaError for other numbers, as of depth or temperature.
    """
    low, high = values.min(), values.max()
    if values.dtype.itemsize == 2 or form == "PPM":  # Pillow gives its 16 bits as 32
        return (values >> 8).astype(np.uint8)
    if values.dtype.kind == "f" and 0 <= low and high <= 1:
        return np.round(values * 255).astype(np.uint8)
    if 0 <= low and high <= 255:
        return np.round(values).astype(np.uint8)
    fault = f"holds values from {low:g} to {high:g}, and does not say which of them is white"
    raise MediaError(path, fault, "save the picture with 8 or 16 whole bits, or with values from 0 to 1")
