"""Media files, written: .mp4 (H.264) and .avi (MPEG-4) clips, .wav and .mp3 sound, .jpg and .png images and masks.

Writers leave a whole file or none, and write the same bytes for the same input: one encoder thread, no dates and no
version tags in the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image

from crab.core.files import atomic_file
from crab.data.containers import RATE

# On 10 s clips of the generated world at 2 frames/s this takes 9 kB and 20 ms, at the PSNR (37 dB and more) that 4:2:0
# chroma leaves at any preset. veryfast takes 6.6 kB and 26 ms, ultrafast 14 kB and 17 ms.
_H264 = {"crf": "20", "preset": "superfast", "threads": "1"}
# A fixed quantizer of 4 comes close: 37 dB, 15 kB, in little more than half the time.
_MPEG4 = {"qmin": "4", "qmax": "4", "flags": "+bitexact"}
_VIDEO = {".mp4": ("mp4", "libx264", _H264), ".avi": ("avi", "mpeg4", _MPEG4)}
# At 32 kbit/s a 10 s sound takes 40 kB, an eighth of PCM, at a signal-to-noise ratio of about 26 dB. This is LAME's
# fastest search, without a bit reservoir, which costs a fifth more time.
_MP3 = {"compression_level": "9", "reservoir": "0"}
_MP3_BITS = 32_000


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float | Fraction) -> None:
    """Write frames (uint8 [H, W, 3] RGB, H and W even), ``fps`` per second, as yuv420p: .mp4 is H.264, .avi MPEG-4."""
    if Path(path).suffix not in _VIDEO:
        raise ValueError(f"{path}: a clip is written as .mp4 or .avi, not {Path(path).suffix!r}")
    form, codec, options = _VIDEO[Path(path).suffix]
    frames = iter(frames)
    first = next(frames, None)
    shape = np.shape(first)
    if len(shape) != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2:
        raise ValueError(f"{path}: the first frame has shape {shape}; give at least one of [even H, even W, 3]")
    with atomic_file(path) as part, av.open(str(part), "w", format=form, options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=dict(options))
        stream.height, stream.width, stream.pix_fmt = *shape[:2], "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in chain([first], frames):
            if picture.shape != shape or picture.dtype != np.uint8:
                raise ValueError(f"{path}: a frame is {picture.dtype} {picture.shape}; all must be uint8 {shape}")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_audio(path: str | os.PathLike, wave: np.ndarray) -> None:
    """Write a mono wave (float [samples] in [-1, 1], 16 kHz) as 16-bit PCM (.wav) or 32 kbit/s mp3."""
    wave, suffix = np.asarray(wave), Path(path).suffix
    if wave.ndim != 1 or not len(wave):
        raise ValueError(f"{path}: sound has shape {wave.shape}; give [samples >= 1]")
    if suffix not in (".wav", ".mp3"):
        raise ValueError(f"{path}: sound is written as .wav or .mp3, not {suffix!r}")
    pcm = np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16)
    with atomic_file(path) as part:
        if suffix == ".wav":
            soundfile.write(part, pcm, RATE, subtype="PCM_16", format="WAV")
            return
        # libsndfile writes mp3 too, but hides LAME's speed setting and takes twice as long
        with av.open(str(part), "w", format="mp3", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("libmp3lame", rate=RATE, layout="mono", options=dict(_MP3))
            stream.codec_context.format, stream.bit_rate = "s16p", _MP3_BITS
            frame = av.AudioFrame.from_ndarray(pcm[None], format="s16p", layout="mono")
            frame.sample_rate, frame.pts = RATE, 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode())


def write_image(path: str | os.PathLike, picture: np.ndarray) -> None:
    """Write uint8 [H, W, 3] RGB as .jpg (quality 92, full chroma) or .png."""
    options = {"quality": 92, "subsampling": 0} if Path(path).suffix in (".jpg", ".jpeg") else {}
    with atomic_file(path) as part:
        Image.fromarray(np.asarray(picture, dtype=np.uint8)).save(part, **options)


def write_mask(path: str | os.PathLike, mask: np.ndarray) -> None:
    """Write bool [H, W] as a black and white .png."""
    with atomic_file(path) as part:
        Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).convert("1").save(part)
