"""Media files, read and written: the face of the modules that do it, and the reader of clips.

Readers return what the models take: frames and images as uint8 RGB of 224 x 224, masks as bool of 224 x 224, sound as
float32 mono at 16 kHz in [-1, 1]. They raise MediaError. `crab.data.sounds` and `crab.data.pictures` read the rest,
`crab.data.writers` writes, and `crab.data.containers` opens FFmpeg's containers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise, repeat

import numpy as np
from av.video.reformatter import VideoReformatter

from crab.data.containers import (
    AGAIN,
    RATE,
    SIZE,
    MediaError,
    decoding,
    open_container,
    packets,
    picture_seconds,
    picture_stamps,
)
from crab.data.pictures import opened, read_image, read_mask
from crab.data.sounds import read_audio
from crab.data.writers import write_audio, write_image, write_mask, write_video

__all__ = [
    "AGAIN", "RATE", "SIZE", "MediaError", "clip_seconds", "decoding", "open_container", "opened", "packets",
    "read_audio", "read_image", "read_mask", "read_video", "write_audio", "write_image", "write_mask", "write_video",
]  # fmt: skip

_SAME_TIME = 1e-9  # seconds; rounding may part two equal time stamps by this much


def read_video(path: str | os.PathLike, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a clip into ``frames`` equal parts, and take the frame on display in the middle of each.

    Frames that an edit list hides are left out. Pictures that are marked as rotated are turned upright. A clip with too
    few frames repeats some. MediaError if the file is missing, truncated or undecodable, or has no video stream.

    Returns:
        uint8 [frames, 224, 224, 3] RGB, and float64 [frames]: when each frame taken begins, in seconds from the start,
        which is that of `read_audio`. If a file's sound begins first, its first frame also stands for the time before.
    """
    if frames < 1:
        raise ValueError(f"frames is {frames}; ask for at least 1")
    with decoding(path, "a video"):
        for way in ("skip", "own", "counted"):
            if (sample := _sample(path, frames, way)) is not None:
                return sample


def clip_seconds(path: str | os.PathLike) -> float:
    """Length of a clip, over which `read_video` spreads its frames; MediaError for a clip that it cannot read."""
    with decoding(path, "a video"), open_container(path, "video") as streams:
        return picture_seconds(streams)


def _sample(path: str | os.PathLike, frames: int, way: str) -> tuple[np.ndarray, np.ndarray] | None:
    """`read_video` in one of three ways. None if the result cannot be relied on.

    ``skip`` decodes only the frames that are taken and those they depend on, about half of an H.264 clip. This trusts a
    packet to have the time stamp of the frame in it. ``own`` decodes all frames and uses their own time stamps.
    ``counted`` gives the n-th frame the n-th time stamp of the packets: for files whose frames seem to go back in time
    (H.264 in avi).
    """
    with open_container(path, "video") as streams:
        stream = streams.video
        if way == "skip" and stream.codec_context.name != "h264":  # other decoders do not say which frames are needed
            way = "own"
        stamps, end = picture_stamps(streams)
        lead, base = streams.lead(stamps[0]), stream.time_base
        times = np.array([float((stamp - stamps[0]) * base) + lead for stamp in stamps])
        middles = (np.arange(frames) + 0.5) * (float((end - stamps[0]) * base) + lead) / frames
        places = np.maximum(np.searchsorted(times, middles + _SAME_TIME, "right") - 1, 0)
        decoded = _decoded(stream, {stamps[place] for place in places} if way == "skip" else None)
        if way == "counted":
            timed = zip(chain(times, repeat(times[-1])), decoded, strict=False)
        else:
            timed = ((float((f.pts - stamps[0]) * base) + lead, f) for f in decoded if f.pts is not None)
        pictures, seconds, backwards = _on_display(timed, middles)
    if not pictures:
        raise MediaError(streams.path, "has a video stream without frames that decode", AGAIN, "no frames")
    if way == "skip" and not np.allclose(seconds, times[places], atol=_SAME_TIME) or way == "own" and backwards:
        return None
    return np.stack(pictures), np.asarray(seconds, dtype=np.float64)


def _decoded(stream, wanted: set[int] | None) -> Iterator:
    """The frames of a stream. With ``wanted``, only frames of these time stamps and frames that others depend on."""
    for packet in stream.container.demux(stream):
        stream.codec_context.skip_frame = "DEFAULT" if wanted is None or packet.pts in wanted else "NONREF"
        yield from packet.decode()


def _on_display(timed: Iterable[tuple], middles: np.ndarray) -> tuple[list[np.ndarray], list[float], bool]:
    """For each of the ascending ``middles``, picture and second of the last frame that begins at or before it.

    Also returns whether a frame seems to begin before the frame ahead of it.
    """
    pictures, seconds, backwards = [], [], False
    scaler = VideoReformatter()  # one for all frames, with one thread: a new one takes longer to set up than to scale
    for (begin, frame), (end, _) in pairwise(chain(timed, [(math.inf, None)])):
        picture = None
        while len(seconds) < len(middles) and middles[len(seconds)] < end - _SAME_TIME:
            if picture is None:
                picture = scaler.reformat(frame, SIZE, SIZE, "rgb24", threads=1).to_ndarray()
                if quarters := round(frame.rotation / 90) % 4:  # phones mark how they were held
                    picture = np.rot90(picture, quarters)
            pictures.append(picture)
            seconds.append(begin)
        backwards |= end < begin - _SAME_TIME
        if len(seconds) == len(middles):
            break
    return pictures, seconds, backwards
