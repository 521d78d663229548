"""The media of a sample, small enough to lie in git beside a page that plays them: H.264, AAC and JPEG.

Pictures and sounds are what the model gets. Only the moving clip, which is for people, has more frames than that.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from crab import tasks
from crab.core.files import atomic_file
from crab.data import media

FPS = 8  # frames per second of a clip, at most
SOUND_BITS = 24_000  # per second of AAC
FRAME = 128  # pixels of each frame of a strip
_JPEG = {"quality": 85, "optimize": True}
_SUFFIX = {"video": ".mp4", "audio": ".m4a", "image": ".jpg"}
#: No dates and versions in the file; its index comes first, so that a browser can begin.
_CONTAINER = {"fflags": "+bitexact", "movflags": "+faststart"}
_SAME = 1e-6  # ticks; rounding may part equal times by this much


def write_media(
    folder: Path, name: str, loaded: Sequence[tuple[tasks.MediaItem, Any]], height: int, crf: int
) -> list[tuple[str, str]]:
    """Write the media of one sample as ``<name>...`` into ``folder``.

    A video and its sound become one clip. Where there are several videos or sounds, each is a file of its own. Beside
    each clip lies its middle frame (`poster`).

    Args:
        loaded: each item with what `crab.data.records.load` gives for it.
        height: of clips, in pixels; narrower ones stay as they are. crf: quality of H.264, 0 (lossless) to 51.

    Returns:
        Kind (``video``, ``image`` or ``audio``) and name of each file, in the order of the prompt.
    """
    kinds = [item.kind for item, _ in loaded]
    wave = None
    if sorted(kinds) == ["audio", "video"]:  # one clip
        (wave,) = (data for item, data in loaded if item.kind == "audio")
        loaded = [pair for pair in loaded if pair[0].kind == "video"]
    written = []
    for number, (item, data) in enumerate(loaded):
        several = f"-{kinds[:number].count(item.kind) + 1}" if kinds.count(item.kind) > 1 else ""
        path = folder / (name + several + _SUFFIX[item.kind])
        if item.kind == "video":
            write_clip(path, item.path, wave, height, crf)
            write_picture(folder / poster(path.name), data[0][len(data[0]) // 2])
        elif item.kind == "audio":
            write_clip(path, None, data, height, crf)
        else:
            write_picture(path, data)
        written.append((item.kind, path.name))
    return written


def poster(name: str) -> str:
    """Name of the picture that stands for a clip before it plays."""
    return name.replace(".mp4", "-poster.jpg")


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write uint8 [H, W, 3] RGB as a small JPEG."""
    with atomic_file(path) as part:
        Image.fromarray(picture).save(part, "JPEG", **_JPEG)


def write_strip(path: Path, frames: np.ndarray) -> None:
    """Write frames, uint8 [N, H, W, 3], side by side as one JPEG, each `FRAME` pixels wide and high."""
    small = [np.array(Image.fromarray(frame).resize((FRAME, FRAME), Image.Resampling.LANCZOS)) for frame in frames]
    for picture in small[:-1]:
        picture[:, -2:] = 0  # a line between two frames
    write_picture(path, np.concatenate(small, axis=1))


def write_clip(path: Path, video: str | Path | None, wave: np.ndarray | None, height: int, crf: int) -> None:
    """Write a video file's pictures and a sound (float [samples] at `crab.data.media.RATE`), either may be None.

    Pictures keep their shape, are at most ``height`` pixels high and come at most `FPS` times per second. The same
    input gives the same bytes.
    """
    with (
        atomic_file(path) as part,
        av.open(str(part), "w", format="mp4", options=_CONTAINER) as container,
        nullcontext() if video is None else media.open_container(video, "video") as source,
    ):
        tracks = []
        if video is not None:
            tracks.append(_pictures(container, source.container, source.video, height, crf))
        if wave is not None:
            tracks.append(_sound(container, wave))
        container.mux(chain(*tracks))


def _pictures(container, source, stream, height: int, crf: int) -> Iterator:
    """Add a track of the pictures in a stream of ``source``; returns its packets."""
    rate = min(Fraction(FPS), Fraction(stream.average_rate or FPS)).limit_denominator(1001)
    options = {"crf": str(crf), "preset": "slow", "threads": "1"}
    track = container.add_stream("libx264", rate=rate, options=options)
    scale = min(1.0, height / stream.codec_context.height)
    sides = (stream.codec_context.height, stream.codec_context.width)
    track.height, track.width = (max(2, 2 * round(side * scale / 2)) for side in sides)
    track.pix_fmt = "yuv420p"
    track.codec_context.thread_count = 1

    def packets() -> Iterator:
        number = 0
        for frame, end in _timed(source.decode(stream), rate):
            while number < end * rate - _SAME:  # the picture on display at each tick
                small = frame.reformat(track.width, track.height, "yuv420p")
                small.pts, small.time_base, number = number, 1 / rate, number + 1
                yield from track.encode(small)
        yield from track.encode()

    return packets()


def _timed(frames: Iterable, rate: Fraction) -> Iterator[tuple[Any, float]]:
    """Each frame, and the second in which the next one begins, or its own would end at this rate."""
    first = last = None
    for frame in frames:
        if first is None:
            first, last = frame.time or 0.0, frame
            continue
        yield last, (frame.time or 0.0) - first
        last = frame
    if last is not None:
        yield last, (last.time or 0.0) - first + float(last.duration * last.time_base if last.duration else 1 / rate)


def _sound(container, wave: np.ndarray) -> Iterator:
    """Add a track of sound; returns its packets."""
    track = container.add_stream("aac", rate=media.RATE, layout="mono")
    track.bit_rate = SOUND_BITS
    pcm = np.clip(np.asarray(wave, dtype=np.float32), -1, 1)[None]

    def packets() -> Iterator:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = media.RATE, 0, Fraction(1, media.RATE)
        yield from track.encode(frame)
        yield from track.encode()

    return packets()


def outline(wave: np.ndarray, bins: int = 160) -> list[tuple[float, float]]:
    """Lowest and highest value of a sound in each of at most ``bins`` equal parts, for a drawing of it."""
    return [(float(part.min()), float(part.max())) for part in np.array_split(wave, min(bins, len(wave)))]


def contours(mask: np.ndarray) -> list[list[tuple[float, float]]]:
    """The outlines of a bool mask [H, W], holes among them, as points (x, y). Pixel (0, 0) has its centre at .5, .5."""
    import cv2

    lines, _ = cv2.findContours(np.ascontiguousarray(mask, np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [[(x + 0.5, y + 0.5) for x, y in line[:, 0].tolist()] for line in lines]
