"""Media files in and out: H.264 mp4 and MPEG-4 avi clips, wav and mp3 sound, jpg/png images and masks.

Readers give what the models take: frames and images as uint8 RGB resized to 224 x 224, masks as bool
224 x 224, sound as float32 mono at 16 kHz in [-1, 1].  Every reader raises MediaError, which names the
file, what is wrong with it and what to do.  Every writer writes aside and renames, so a file that exists is whole,
and gives the same bytes for the same input (one encoder thread, no dates or version tags in the container).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain, repeat
from pathlib import Path

import av
import numpy as np
import soundfile
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.signal import resample_poly

from crab.data.files import atomic_file

SIZE = 224  # side of every frame, image and mask, pixels
RATE = 16_000  # sample rate of every sound handed to a model, Hz
LEAST = 0.1  # seconds that a sound must last to be heard at all, whatever encoder hears it
_SAME_TIME = 1e-9  # seconds that rounding may part two equal time stamps by

# Measured on 10 s clips of the generated world at 2 frames/s: 9 kB in 20 ms, at the PSNR (37 dB and more) that 4:2:0
# chroma leaves at any preset; veryfast takes 6.6 kB in 26 ms, ultrafast 14 kB in 17 ms.
_H264 = {"crf": "20", "preset": "superfast", "threads": "1"}
# A quantizer held at 4 comes near to that: 37 dB, 15 kB, in little more than half the time.
_MPEG4 = {"qmin": "4", "qmax": "4", "flags": "+bitexact"}
_VIDEO = {".mp4": ("mp4", "libx264", _H264), ".avi": ("avi", "mpeg4", _MPEG4)}
# At 32 kbit/s a 10 s clip takes 40 kB, an eighth of PCM, at a signal-to-noise ratio of about 26 dB.  LAME's fastest
# search, and no bit reservoir, which costs a fifth more time; still two thirds of what writing a clip takes.
_MP3 = {"compression_level": "9", "reservoir": "0"}
_MP3_BITS = 32_000


class MediaError(ValueError):
    """A media file that cannot be used.  The message reads "<path>: <fault>; <mend>"."""

    def __init__(self, path: str | os.PathLike, fault: str, mend: str):
        super().__init__(f"{path}: {fault}; {mend}")
        self.path, self.fault, self.mend = Path(path), fault, mend

    def __reduce__(self):  # the default would call __init__ with the message alone; errors cross process pools
        return type(self), (self.path, self.fault, self.mend)


# ---------------------------------------------------------------- reading

def read_video(path: str | os.PathLike, frames: int, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Sample `frames` frames uniformly: the one on display at the middle of each of `frames` equal parts of the clip.

    Returns (uint8 [frames, 224, 224, 3] RGB, float64 [frames] seconds from the clip's start).  The seconds are the
    presentation times of the frames taken, not the middles asked for.  A clip with fewer frames repeats some.
    What the file says not to show (an edit list) is left out, and pictures that it says to turn are turned.
    Raises MediaError for a missing, truncated or undecodable file, and for one without a video stream.

    Of an H.264 clip what is neither taken nor needed to decode what is taken is skipped: about half of its frames.
    """
    if frames < 1:
        raise ValueError(f"frames is {frames}; ask for at least 1")
    path = _existing(path)
    try:
        for way in ("skip", "own", "counted"):
            found = _sampled(path, frames, threads, way)
            if found is not None:
                return found
    except (av.error.FFmpegError, EOFError) as error:
        raise MediaError(path, f"cannot be decoded as video ({_reason(error)})", "the file is truncated or not a "
                         "video: copy or build it again") from error


def _sampled(path: Path, frames: int, threads: int, way: str) -> tuple[np.ndarray, np.ndarray] | None:
    """`read_video` in one way, or None where that cannot be relied on.

    ``skip``: no frame is decoded that is neither taken nor needed for what is; this trusts packets to have the time stamps of
    the frames they hold. ``own``: all are, and have their own time stamps. ``counted``: all are, and the n-th has the n-th time
    stamp of the packets; it comes last, for files whose frames seem to go back in time (H.264 in avi).
    """
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise MediaError(path, "has no video stream", "give a file with pictures, or read it with read_audio")
        stream = container.streams.video[0]
        if way == "skip" and stream.codec_context.name != "h264":  # others do not say for sure whether a frame is needed
            way = "own"
        stream.codec_context.thread_count = threads
        stamps, end = _stamps(path, container, stream)
        times = np.array([float((stamp - stamps[0]) * stream.time_base) for stamp in stamps])
        middles = (np.arange(frames) + 0.5) * float((end - stamps[0]) * stream.time_base) / frames
        places = np.searchsorted(times, middles + _SAME_TIME, "right") - 1
        decoded = _decoded(container, stream, {stamps[place] for place in places} if way == "skip" else None)
        if way == "counted":
            timed = zip(chain(times, repeat(times[-1])), decoded)
        else:
            timed = ((float((f.pts - stamps[0]) * stream.time_base), f) for f in decoded if f.pts is not None)
        pictures, seconds, backwards = _on_display(path, timed, middles)
    if way == "skip" and not np.allclose(seconds, times[places], atol=_SAME_TIME) or way == "own" and backwards:
        return None
    return pictures, seconds


def span(path: Path, container, stream) -> tuple[float, float]:
    """(time stamp of the first frame, length), both in seconds, from the packets' own time stamps."""
    stamps, end = _stamps(path, container, stream)
    return float(stamps[0] * stream.time_base), float((end - stamps[0]) * stream.time_base)


def _stamps(path: Path, container, stream) -> tuple[list[int], int]:
    """(time stamps of the frames, ascending; when the last one ends), in the stream's ticks, from its packets.

    Headers are not to be trusted with this: mp4 muxers sum up durations in decoding order, avi has no length for a
    stream.  Walking the packets decodes nothing and costs a few percent of decoding.
    """
    packets = [(p.dts if p.pts is None else p.pts, p.duration or 0, p.is_discard) for p in container.demux(stream) if p.size]
    # What an edit list discards (clips cut without encoding them anew begin at a key frame before the cut) is decoded and not shown.
    stamps = sorted((stamp, duration) for stamp, duration, hidden in packets if stamp is not None and not hidden)
    if not stamps:
        raise MediaError(path, "has a video stream without frames", "copy or build it again")
    # An index at the front of the file survives a cut: what it promises must also be there. Avi counts ticks, skipped ones too.
    found = stamps[-1][0] + 1 if container.format.name == "avi" else len(packets)
    # Where an edit list ends before the file does, the last packets are hidden ones and the rest is not even read.
    if stream.frames and found < stream.frames and not packets[-1][2]:
        raise MediaError(path, f"is truncated: {found} of {stream.frames} frames are there",
                         "copy or build it again")
    container.seek(0)
    return [stamp for stamp, _ in stamps], sum(stamps[-1])


def _decoded(container, stream, wanted: set[int] | None) -> Iterator:
    """The stream's frames; but where `wanted` is given, no frame of another time stamp on which no other hangs."""
    for packet in container.demux(stream):
        stream.codec_context.skip_frame = "DEFAULT" if wanted is None or packet.pts in wanted else "NONREF"
        yield from packet.decode()


def _on_display(path, timed, middles) -> tuple[np.ndarray, np.ndarray, bool]:
    """For each of the ascending `middles` the last of the frames (seconds, frame) that begins at or before it.

    Returns pictures, their seconds, and whether any frame's time was before that of the one ahead of it.
    """
    pictures, times, current, began, backwards = [], [], None, 0.0, False
    # One for all frames, and one thread: a frame that is asked itself sets up a scaler and its threads each time, for longer
    # than it scales.
    scaler = VideoReformatter()

    def settle(before: float) -> None:
        """Take the current frame for every middle that ends its display."""
        picture = None
        while len(times) < len(middles) and middles[len(times)] < before:
            if picture is None:
                picture = scaler.reformat(current, SIZE, SIZE, "rgb24", threads=1).to_ndarray()
                if quarters := round(current.rotation / 90) % 4:  # as phones mark how they were held
                    picture = np.rot90(picture, quarters)
            pictures.append(picture)
            times.append(began)

    for second, frame in timed:
        if current is not None:
            settle(second - _SAME_TIME)
            backwards |= second < began - _SAME_TIME
        current, began = frame, second
        if len(times) == len(middles):
            break
    if current is None:
        raise MediaError(path, "has a video stream without frames that decode", "copy or build it again")
    settle(float("inf"))
    return np.stack(pictures), np.asarray(times, dtype=np.float64), backwards


def read_audio(path: str | os.PathLike, start: float | None = None, end: float | None = None) -> np.ndarray:
    """Sound of `path` between `start` and `end` seconds (all of it by default): float32 [samples], mono, 16 kHz.

    Channels are averaged; other rates are resampled by a polyphase filter.  A window that runs past the end is cut
    there.  wav, flac, ogg and mp3 go through libsndfile, anything else (the sound of an mp4, m4a) through FFmpeg.
    Raises MediaError for a missing, empty or undecodable file, and for a window outside the sound.
    """
    path = _existing(path)
    if path.stat().st_size == 0:
        raise MediaError(path, "is empty (0 bytes)", "copy or build it again")
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as fault:
        wave, rate = _audio_of_container(path, fault)
    if not len(wave):
        raise MediaError(path, "holds no sound (zero length)", "record or build it again")
    seconds = len(wave) / rate
    low, high = start or 0.0, seconds if end is None else min(end, seconds)
    if not 0 <= low < high:
        raise MediaError(path, f"has no sound between {low} s and {end} s, it lasts {seconds:.2f} s",
                         "ask for a window inside the sound")
    mono = wave[round(low * rate):max(round(high * rate), round(low * rate) + 1)].mean(axis=1)
    if not np.isfinite(mono).all():
        raise MediaError(path, "holds values that are not numbers", "record or build it again")
    if rate != RATE:
        common = math.gcd(rate, RATE)
        mono = resample_poly(mono, RATE // common, rate // common)
    return np.ascontiguousarray(mono, dtype=np.float32)


def _audio_of_container(path: Path, fault: Exception) -> tuple[np.ndarray, int]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise MediaError(path, "has no sound stream", "give a file with sound")
            stream = container.streams.audio[0]
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=stream.rate)
            parts = [out.to_ndarray()[0] for frame in container.decode(stream) for out in resampler.resample(frame)]
            parts += [out.to_ndarray()[0] for out in resampler.resample(None)]
            wave = np.concatenate(parts) if parts else np.zeros(0, np.float32)
            return wave[:, None], stream.rate
    except (av.error.FFmpegError, EOFError) as error:
        raise MediaError(path, f"cannot be decoded as sound ({fault}; {_reason(error)})", "the file is truncated or "
                         "not sound: copy or build it again") from error


def read_image(path: str | os.PathLike) -> np.ndarray:
    """The picture as uint8 [224, 224, 3] RGB (bilinear when it has to be resized), upright where it is marked how it was taken."""
    with _opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        image = image.convert("RGB")
        if image.size != (SIZE, SIZE):
            image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return np.array(image)


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """The mask as bool [224, 224]: true wherever any channel is not black (AVSBench paints objects on black)."""
    with _opened(path) as image:
        if image.mode not in ("1", "L"):
            image = image.convert("RGB")
        painted = np.asarray(image)
    painted = painted.any(axis=-1) if painted.ndim == 3 else painted > 0
    if painted.shape != (SIZE, SIZE):
        image = Image.fromarray(painted.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.NEAREST)
        painted = np.asarray(image) > 0
    return painted


@contextlib.contextmanager
def _opened(path) -> Iterator[Image.Image]:
    path = _existing(path)
    try:
        with Image.open(path) as image:
            image.load()  # decoding is lazy: a truncated file would fail outside this guard
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # PIL raises SyntaxError on a broken png
        raise MediaError(path, f"cannot be decoded as an image ({_reason(error)})",
                         "the file is truncated or not an image: copy or build it again") from error


def _existing(path) -> Path:
    path = Path(path)
    if not path.is_file():
        fault = "is a folder, not a media file" if path.is_dir() else "does not exist"
        raise MediaError(path, fault, "check the record's path and the data root, or build the data again")
    return path


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ---------------------------------------------------------------- writing

def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float | Fraction) -> None:
    """Write frames (each uint8 [H, W, 3] RGB, H and W even), `fps` a second, yuv420p: .mp4 as H.264, .avi as MPEG-4."""
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


def write_audio(path: str | os.PathLike, wave: np.ndarray, rate: int = RATE) -> None:
    """Write a mono wave (float, [-1, 1]) as 16-bit PCM (.wav) or 32 kbit/s MPEG layer III (.mp3)."""
    wave = np.asarray(wave)
    if wave.ndim != 1 or not len(wave):
        raise ValueError(f"{path}: sound has shape {wave.shape}; give [samples >= 1]")
    pcm = np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16)
    suffix = Path(path).suffix
    if suffix not in (".wav", ".mp3"):
        raise ValueError(f"{path}: sound is written as .wav or .mp3, not {suffix!r}")
    with atomic_file(path) as part:
        if suffix == ".wav":
            soundfile.write(part, pcm, rate, subtype="PCM_16", format="WAV")
        else:
            _write_mp3(part, pcm, rate)


def _write_mp3(path: Path, pcm: np.ndarray, rate: int) -> None:
    # libsndfile can write mp3 too, but hides LAME's speed setting and takes twice as long.
    with av.open(str(path), "w", format="mp3", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libmp3lame", rate=rate, layout="mono", options=dict(_MP3))
        stream.codec_context.format, stream.bit_rate = "s16p", _MP3_BITS
        frame = av.AudioFrame.from_ndarray(pcm[None], format="s16p", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
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
