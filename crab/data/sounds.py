"""Sound, read: files of sound by libsndfile, all others by FFmpeg, both by one convention.

What a model gets is the mean of the channels in [-1, 1], 16 kHz. Sound in a container begins where its time stamps say;
time 0 is where a player begins, so picture and sound agree. Holes are silent.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from crab.data.containers import (
    AGAIN,
    LONGEST_GAP,
    RATE,
    MediaError,
    Streams,
    decoding,
    existing,
    indexed,
    open_container,
    packets,
    truncated,
)

LEAST = 0.1  # seconds, the shortest sound that any encoder can hear
_JITTER = 0.04  # seconds by which a time stamp may differ from the end of the sound before it: many are rounded
_BACK = 1.0  # seconds of sound that two pieces may share; more is damage, or two files joined without new stamps
_SPIKE = 1.03  # what mp3 of the generated world add at their peaks at most; they stay as earlier runs heard them
_MISSING = 0.5  # seconds of its end that a sound may lack: many headers are a few frames off


def read_audio(path: str | os.PathLike, start: float | None = None, end: float | None = None) -> np.ndarray:
    """Sound between ``start`` and ``end`` seconds (by default all of it): float32 [samples], mono, 16 kHz, in [-1, 1].

    Channels are averaged. Files of floats may go beyond 1: they are scaled down as a whole, to a peak of 1. What lossy
    decoders and filters add beyond 1 is clipped; only a lossy file of 16 kHz may keep up to 3% of it. Other rates are
    resampled by a polyphase filter. A window past the end is cut there. Sound in a container is placed by its time
    stamps: before it begins, and in holes, there is silence. MediaError if the file is missing, empty, truncated or
    undecodable, or if the window lies outside the sound.
    """
    path = existing(path)
    mono, rate, floats = _decoded(path)
    if not len(mono):
        raise MediaError(path, "holds no sound (zero length)", "record or build it again", "no sound")
    seconds = len(mono) / rate
    low, high = start or 0.0, seconds if end is None else min(end, seconds)
    if not 0 <= low < high:
        fault = f"has no sound between {low} s and {end} s, it lasts {seconds:.2f} s"
        raise MediaError(path, fault, "ask for a window inside the sound", "no such second")
    peak = max(float(mono.max()), -float(mono.min()))
    if not math.isfinite(peak):
        raise MediaError(path, "holds values that are not numbers", "record or build it again")
    mono = mono[round(low * rate) : max(round(high * rate), round(low * rate) + 1)]
    if peak > 1 and floats:
        mono = mono / np.float32(peak)
    if rate != RATE:
        common = math.gcd(rate, RATE)
        mono = resample_poly(mono, RATE // common, rate // common)
    if rate != RATE or peak > _SPIKE:
        mono = np.clip(mono, -1, 1)
    return np.ascontiguousarray(mono, dtype=np.float32)


def sound_seconds(path: str | os.PathLike) -> tuple[float, str]:
    """Length of a sound in seconds, and its format as libsndfile or FFmpeg names it. Decodes only the first piece.

    MediaError as for `read_audio`, except for damage inside.
    """
    path = existing(path)
    try:
        with soundfile.SoundFile(path) as sound:
            if not sound.frames:
                raise MediaError(path, "holds no sound (zero length)", "record or build it again", "no sound")
            sound.read(min(sound.frames, 1024))
            last = max(0, sound.frames - int(_MISSING * sound.samplerate) - 1)
            sound.seek(last)
            rest = len(sound.read())
            there = last + rest if rest else 0
            _check_end(path, sound, there)
            form = sound.format.lower()
            # FFmpeg uses the name mpeg for a kind of video
            return there / sound.samplerate, "mp3" if form == "mpeg" else form
    except soundfile.LibsndfileError as fault:
        with decoding(path, "sound", f"{fault}; "), open_container(path, "audio") as streams:
            return _stamped_seconds(streams), streams.container.format.name.split(",")[0]


def _decoded(path: Path) -> tuple[np.ndarray, int, bool]:
    """The whole sound of a file: the mean of its channels, float32 [samples], its rate, and whether it holds floats."""
    with decoding(path, "sound"):
        try:
            with soundfile.SoundFile(path) as sound:
                if sound.seekable():
                    sound.seek(0)  # as soundfile.read does; without it mpg123 rounds in another way
                wave = sound.read(dtype="float32", always_2d=True)
                _check_end(path, sound, len(wave))
                mono = wave[:, 0] if sound.channels == 1 else wave.mean(axis=1)
                return mono, sound.samplerate, sound.subtype in ("FLOAT", "DOUBLE")
        except soundfile.LibsndfileError as fault:
            with decoding(path, "sound", f"{fault}; "), open_container(path, "audio") as streams:
                return *_placed(streams), streams.audio.codec_context.name.startswith("pcm_f")


def _check_end(path: Path, sound: soundfile.SoundFile, there: int) -> None:
    """MediaError if a file of sound, of which ``there`` samples could be read, promises more."""
    promised = sound.frames / sound.samplerate * (1 + _riff_missing(path))
    if promised - there / sound.samplerate >= _MISSING:
        raise truncated(path, f"it ends before the {promised:.1f} s that it promises")


def _riff_missing(path: Path) -> float:
    """The part of a wav that its header promises and that is missing, as a fraction of the part that is there.

    libsndfile reads such a file as a shorter sound.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
    promised = int.from_bytes(head[4:8], "little") + 8
    whole = head[:4] != b"RIFF" or promised >= 0x7FFFF000  # a writer that cannot seek leaves the size open
    return 0.0 if whole else max(0, promised - size) / size


# ---------------------------------------------------------------- containers


def _place(path: Path, begin: float | None, end: float) -> float:
    """Where a piece of sound goes that is stamped ``begin``, behind sound that ends at ``end``, in seconds.

    The first piece goes where its stamp says, the others follow on unless their stamps clearly say otherwise.
    """
    if begin is None or end and abs(begin - end) <= _JITTER:
        return end
    if not -_BACK <= begin - end <= LONGEST_GAP:
        fault = f"has time stamps of sound that jump by {begin - end:.0f} s after {end:.1f} s"
        raise MediaError(path, fault, "write its sound to a file of its own")
    return begin


def _placed(streams: Streams) -> tuple[np.ndarray, int]:
    """The sound of a container at its time stamps, float32 [samples], and its rate (of its first piece)."""
    zero, rate, end, parts, frame = streams.zero, 0, 0, [], None
    for frame in streams.container.decode(streams.audio):
        piece, rate = _mono(frame), rate or frame.sample_rate
        if frame.sample_rate != rate:
            piece = resample_poly(piece, rate, frame.sample_rate)
        zero = frame.time if zero is None else zero
        begin = None if frame.time is None else frame.time - zero
        gap = round(_place(streams.path, begin, end / rate) * rate) - end
        parts += [np.zeros(max(gap, 0), np.float32), piece[max(-gap, 0) :]]
        end += len(parts[-2]) + len(parts[-1])
    if frame is None:
        raise MediaError(streams.path, "has a sound stream without sound that decodes", AGAIN, "no sound")
    last = float((frame.duration or 0) * frame.time_base)
    if 0 < last < frame.samples / rate - 0.001:  # the container says how much of the last piece is padding
        parts[-1] = parts[-1][: round(last * rate)]
    return np.concatenate(parts), rate


def _mono(frame) -> np.ndarray:
    """The mean of the channels of a decoded piece, float32 [samples]. Whole numbers are scaled to [-1, 1]."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    mean = values.mean(axis=0, dtype=np.float64)
    if values.dtype.kind != "f":
        mean = mean / 2.0 ** (8 * values.dtype.itemsize - 1) - (values.dtype.kind == "u")
    return mean.astype(np.float32)


def _stamps(streams: Streams) -> Iterator[tuple[float | None, float]]:
    """Begin and length of each packet of sound that is heard, in seconds; the length is 0 if it is not known."""
    container, stream = streams.container, streams.audio
    index = [entry for entry in stream.index_entries if not entry.is_discard]
    if indexed(container, stream) and len(index) > 2:  # no packet need be read
        stamps = [entry.timestamp for entry in index]
        step = sorted(b - a for a, b in pairwise(stamps))[len(stamps) // 2 - 1]
        last = min(step, (stream.start_time or 0) + (stream.duration or math.inf) - stamps[-1])
        for stamp, length in zip(stamps, [*[step] * (len(stamps) - 1), last], strict=True):
            yield float(stamp * stream.time_base), float(length * stream.time_base)
        return
    for packet in packets(container, stream):
        if not packet.hidden:
            length = float(packet.duration * stream.time_base) - packet.skipped / stream.rate
            yield None if packet.stamp is None else float(packet.stamp * stream.time_base), length


def _stamped_seconds(streams: Streams) -> float:
    """Length of the sound of a container, by its time stamps. If packets do not say their length it is decoded."""
    stamps, zero, end = list(_stamps(streams)), streams.zero, 0.0
    if any(length <= 0 for _, length in stamps):
        mono, rate = _placed(streams)
        return len(mono) / rate
    if not stamps or next(streams.container.decode(streams.audio), None) is None:
        raise MediaError(streams.path, "has a sound stream without sound that decodes", AGAIN, "no sound")
    zero = stamps[0][0] if zero is None else zero
    for begin, length in stamps:
        begin = _place(streams.path, None if begin is None else begin - (zero or 0.0), end)
        end = max(end, begin + length)
    return end
