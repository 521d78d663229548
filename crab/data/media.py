"""Media files, read and written: mp4 (H.264) and avi (MPEG-4) clips, wav and mp3 sound, jpg and png images and masks.

Readers return what the models take: frames and images as uint8 RGB of 224 x 224, masks as bool of 224 x 224, sound as
float32 mono at 16 kHz in [-1, 1]. They raise MediaError. Writers leave a whole file or none, and write the same bytes
for the same input: one encoder thread, no dates and no version tags in the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, pairwise, repeat
from pathlib import Path

import av
import numpy as np
import soundfile
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy.signal import resample_poly

from crab.data.files import atomic_file

SIZE = 224  # pixels, side of every frame, image and mask
RATE = 16_000  # Hz, sample rate of every sound that a model gets
LEAST = 0.1  # seconds, the shortest sound that any encoder can hear
AGAIN = "copy or build it again"
_SAME_TIME = 1e-9  # seconds; rounding may part two equal time stamps by this much

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


class MediaError(ValueError):
    """A media file that cannot be used. The message reads "<path>: <fault>; <fix>".

    ``problem`` is the kind of fault, one of `crab.data.findings.PROBLEMS`.
    """

    def __init__(self, path: str | os.PathLike, fault: str, fix: str, problem: str = "undecodable"):
        super().__init__(f"{path}: {fault}; {fix}")
        self.path, self.fault, self.fix, self.problem = Path(path), fault, fix, problem

    def __reduce__(self):  # the default passes the message alone to __init__; errors cross process pools
        return type(self), (self.path, self.fault, self.fix, self.problem)


# ---------------------------------------------------------------- clips


def read_video(path: str | os.PathLike, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a clip into ``frames`` equal parts, and take the frame on display in the middle of each.

    Frames that an edit list hides are left out. Pictures that are marked as rotated are turned upright. A clip with too
    few frames repeats some. MediaError if the file is missing, truncated or undecodable, or has no video stream.

    Returns:
        uint8 [frames, 224, 224, 3] RGB, and float64 [frames]: when each frame taken begins, in seconds from the start.
    """
    if frames < 1:
        raise ValueError(f"frames is {frames}; ask for at least 1")
    path = _existing(path)
    with _decoding(path, "video", "a video"):
        for way in ("skip", "own", "counted"):
            if (sample := _sample(path, frames, way)) is not None:
                return sample


def clip_seconds(path: str | os.PathLike) -> float:
    """Length of a clip, over which `read_video` spreads its frames; MediaError for a clip that it cannot read."""
    try:
        with av.open(str(path)) as container:
            return length(path, container, container.streams.video[0])
    except (av.error.FFmpegError, EOFError, IndexError) as error:
        raise MediaError(path, f"has no length that can be read ({error})", AGAIN) from error


def length(path: str | os.PathLike, container, stream) -> float:
    """Seconds from the first frame shown to the end of the last, by the packets' own time stamps."""
    stamps, end = _stamps(path, container, stream)
    return float((end - stamps[0]) * stream.time_base)


def _sample(path: Path, frames: int, way: str) -> tuple[np.ndarray, np.ndarray] | None:
    """`read_video` in one of three ways. None if the result cannot be relied on.

    ``skip`` decodes only the frames that are taken and those they depend on, about half of an H.264 clip. This trusts a
    packet to have the time stamp of the frame in it. ``own`` decodes all frames and uses their own time stamps.
    ``counted`` gives the n-th frame the n-th time stamp of the packets: for files whose frames seem to go back in time
    (H.264 in avi).
    """
    with av.open(str(path)) as container:
        if not container.streams.video:
            fix = "give a file with pictures, or read it with read_audio"
            raise MediaError(path, "has no video stream", fix, "no video")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise MediaError(path, "has a video stream of a kind that FFmpeg does not know", AGAIN)
        if way == "skip" and stream.codec_context.name != "h264":  # other decoders do not say which frames are needed
            way = "own"
        stream.codec_context.thread_count = 1
        stamps, end = _stamps(path, container, stream)
        times = np.array([float((stamp - stamps[0]) * stream.time_base) for stamp in stamps])
        middles = (np.arange(frames) + 0.5) * float((end - stamps[0]) * stream.time_base) / frames
        places = np.searchsorted(times, middles + _SAME_TIME, "right") - 1
        decoded = _decoded(container, stream, {stamps[place] for place in places} if way == "skip" else None)
        if way == "counted":
            timed = zip(chain(times, repeat(times[-1])), decoded, strict=False)
        else:
            timed = ((float((f.pts - stamps[0]) * stream.time_base), f) for f in decoded if f.pts is not None)
        pictures, seconds, backwards = _on_display(timed, middles)
    if not pictures:
        raise MediaError(path, "has a video stream without frames that decode", AGAIN, "no frames")
    if way == "skip" and not np.allclose(seconds, times[places], atol=_SAME_TIME) or way == "own" and backwards:
        return None
    return np.stack(pictures), np.asarray(seconds, dtype=np.float64)


def _stamps(path: str | os.PathLike, container, stream) -> tuple[list[int], int]:
    """Time stamps of the frames shown, ascending, and the end of the last one, in ticks of the stream.

    They come from the packets, since headers cannot be trusted: mp4 muxers add up durations in decoding order, and avi
    has no length for a stream.
    """
    packets = [
        (p.dts if p.pts is None else p.pts, p.duration or 0, p.is_discard) for p in container.demux(stream) if p.size
    ]
    # A clip that was cut without encoding it again begins at a key frame before the cut; an edit list hides the frames.
    stamps = sorted((stamp, duration) for stamp, duration, hidden in packets if stamp is not None and not hidden)
    if not stamps:
        raise MediaError(path, "has a video stream without frames", AGAIN, "no frames")
    # An index at the front of a file survives a cut: the frames it promises must be there. Avi counts ticks, with gaps.
    there = stamps[-1][0] + 1 if container.format.name == "avi" else len(packets)
    # If an edit list ends before the file does, the last packets are hidden and FFmpeg does not read the rest.
    if stream.frames and there < stream.frames and not packets[-1][2]:
        raise MediaError(path, f"is truncated: {there} of {stream.frames} frames are there", AGAIN, "truncated")
    container.seek(0)
    return [stamp for stamp, _ in stamps], sum(stamps[-1])


def _decoded(container, stream, wanted: set[int] | None) -> Iterator:
    """The frames of a stream. With ``wanted``, only frames of these time stamps and frames that others depend on."""
    for packet in container.demux(stream):
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


# ---------------------------------------------------------------- sound and pictures


def read_audio(path: str | os.PathLike, start: float | None = None, end: float | None = None) -> np.ndarray:
    """Sound between ``start`` and ``end`` seconds (by default all of it): float32 [samples], mono, 16 kHz.

    Channels are averaged. Other rates are resampled by a polyphase filter. A window past the end is cut there.
    libsndfile reads wav, flac, ogg and mp3; FFmpeg reads the rest, such as the sound of an mp4. MediaError if the file
    is missing, empty or undecodable, or if the window lies outside the sound.
    """
    path = _existing(path)
    if path.stat().st_size == 0:
        raise MediaError(path, "is empty (0 bytes)", AGAIN, "empty")
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as fault:
        with _decoding(path, "sound", "sound", f"{fault}; "):
            wave, rate = _audio_of_container(path)
    if not len(wave):
        raise MediaError(path, "holds no sound (zero length)", "record or build it again", "no sound")
    seconds = len(wave) / rate
    low, high = start or 0.0, seconds if end is None else min(end, seconds)
    if not 0 <= low < high:
        fault = f"has no sound between {low} s and {end} s, it lasts {seconds:.2f} s"
        raise MediaError(path, fault, "ask for a window inside the sound", "no such second")
    mono = wave[round(low * rate) : max(round(high * rate), round(low * rate) + 1)].mean(axis=1)
    if not np.isfinite(mono).all():
        raise MediaError(path, "holds values that are not numbers", "record or build it again")
    if rate != RATE:
        common = math.gcd(rate, RATE)
        mono = resample_poly(mono, RATE // common, rate // common)
    return np.ascontiguousarray(mono, dtype=np.float32)


def _audio_of_container(path: Path) -> tuple[np.ndarray, int]:
    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise MediaError(path, "has no sound stream", "give a file with sound", "no sound")
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=stream.rate)
        parts = [out.to_ndarray()[0] for frame in container.decode(stream) for out in resampler.resample(frame)]
        parts += [out.to_ndarray()[0] for out in resampler.resample(None)]
        wave = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        return wave[:, None], stream.rate


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A picture as uint8 [224, 224, 3] RGB, resized bilinearly, and upright if its file says how it was taken."""
    with opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        image = image.convert("RGB")
        if image.size != (SIZE, SIZE):
            image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return np.array(image)


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """A mask as bool [224, 224]: true where any channel is not black (AVSBench paints objects on black)."""
    with opened(path) as image:
        if image.mode not in ("1", "L"):
            image = image.convert("RGB")
        painted = np.asarray(image)
    painted = painted.any(axis=-1) if painted.ndim == 3 else painted > 0
    if painted.shape != (SIZE, SIZE):
        image = Image.fromarray(painted.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.NEAREST)
        painted = np.asarray(image) > 0
    return painted


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """A decoded image, or MediaError."""
    path = _existing(path)
    with _decoding(path, "an image", "an image"), Image.open(path) as image:
        image.load()  # Pillow decodes late: a truncated file would otherwise fail outside this guard
        yield image


@contextmanager
def _decoding(path: Path, kind: str, thing: str, before: str = "") -> Iterator[None]:
    """Turn what the decoders raise into a MediaError."""
    try:
        yield
    except (av.error.FFmpegError, EOFError, UnidentifiedImageError, OSError, SyntaxError) as error:
        fault = f"cannot be decoded as {kind} ({before}{reason(error)})"
        raise MediaError(path, fault, f"the file is truncated or not {thing}: {AGAIN}") from error


def reason(error: Exception) -> str:
    """What a decoder's error says."""
    if isinstance(error, UnidentifiedImageError):
        return "no known format"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.is_file():
        return path
    fault, problem = ("is a folder", "not a file") if path.is_dir() else ("does not exist", "missing")
    raise MediaError(path, fault, "check the path in the record and the data root, or build the data again", problem)


# ---------------------------------------------------------------- writing


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


def write_audio(path: str | os.PathLike, wave: np.ndarray, rate: int = RATE) -> None:
    """Write a mono wave (float [samples] in [-1, 1]) as 16-bit PCM (.wav) or 32 kbit/s mp3."""
    wave, suffix = np.asarray(wave), Path(path).suffix
    if wave.ndim != 1 or not len(wave):
        raise ValueError(f"{path}: sound has shape {wave.shape}; give [samples >= 1]")
    if suffix not in (".wav", ".mp3"):
        raise ValueError(f"{path}: sound is written as .wav or .mp3, not {suffix!r}")
    pcm = np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16)
    with atomic_file(path) as part:
        if suffix == ".wav":
            soundfile.write(part, pcm, rate, subtype="PCM_16", format="WAV")
            return
        # libsndfile writes mp3 too, but hides LAME's speed setting and takes twice as long
        with av.open(str(part), "w", format="mp3", options={"fflags": "+bitexact"}) as container:
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
