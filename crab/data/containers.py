"""What all readers of media share: their error, and FFmpeg's containers of clips and sounds.

A container is opened, its streams are chosen and its time stamps are read here and nowhere else, for the readers
(`crab.data.media`) and for the probe (`crab.data.probe`) alike.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
from av.stream import Disposition
from PIL import UnidentifiedImageError

SIZE = 224  # pixels, side of every frame, image and mask
RATE = 16_000  # Hz, sample rate of every sound that a model gets
AGAIN = "copy or build it again"
LONGEST_GAP = 600  # seconds that time stamps may leave empty; longer ones are damage, and would fill the memory

# FFmpeg opens these alone: it also reads play lists, which can send it to any file or address.
_DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpegts,mpeg,flv,asf,wav,mp3,aac,flac,ogg,"
    "ac3,aiff,amr,caf,dv,eac3,gif,mxf,nut,rm,w64"
)
_OPEN = {
    "options": {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"},
    "metadata_errors": "replace",  # tags need not be UTF-8
}
_BOXES = b"ftyp moov mdat free skip wide uuid moof mfra sidx styp udta meta".split()
_STILL = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
_SECOND = Disposition.dub | Disposition.comment | Disposition.karaoke | Disposition.hearing_impaired
_SECOND |= Disposition.visual_impaired | Disposition.dependent


class MediaError(ValueError):
    """A media file that cannot be used. The message reads "<path>: <fault>; <fix>".

    ``problem`` is the kind of fault, one of `crab.data.findings.PROBLEMS`.
    """

    def __init__(self, path: str | os.PathLike, fault: str, fix: str, problem: str = "undecodable"):
        super().__init__(f"{path}: {fault}; {fix}")
        self.path, self.fault, self.fix, self.problem = Path(path), fault, fix, problem

    def __reduce__(self):  # the default passes the message alone to __init__; errors cross process pools
        return type(self), (self.path, self.fault, self.fix, self.problem)


def truncated(path: str | os.PathLike, what: str) -> MediaError:
    """The error for a file whose end is missing."""
    return MediaError(path, f"is truncated: {what}", AGAIN, "truncated")


def existing(path: str | os.PathLike) -> Path:
    """The path of a file that is there and not empty, or MediaError."""
    path = Path(path)
    if not path.is_file():
        fault, problem = ("is a folder", "not a file") if path.is_dir() else ("does not exist", "missing")
        fix = "check the path in the record and the data root, or build the data again"
        raise MediaError(path, fault, fix, problem)
    if not path.stat().st_size:
        raise MediaError(path, "is empty (0 bytes)", AGAIN, "empty")
    return path


@contextmanager
def decoding(path: str | os.PathLike, thing: str, before: str = "") -> Iterator[None]:
    """Turn whatever the decoders raise into a MediaError: the file is not a ``thing``."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:  # FFmpegError and OSError, and for malformed fields struct.error, ValueError and more
        words = reason(error).replace(str(path), "").strip(": ")[:200]
        fault = f"cannot be decoded as {thing} ({before}{words})"
        raise MediaError(path, fault, f"the file is truncated or not {thing}: {AGAIN}") from error


def reason(error: Exception) -> str:
    """What a decoder's error says."""
    if isinstance(error, UnidentifiedImageError):
        return "no known format"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# ---------------------------------------------------------------- containers and their streams


class Streams(NamedTuple):
    """An open container, and its streams that are shown and heard; None if there is none."""

    path: Path
    container: av.container.InputContainer
    video: av.VideoStream | None
    audio: av.AudioStream | None

    @property
    def zero(self) -> float | None:
        """Time 0 of the container by its own stamps, in seconds: picture or sound begins, as in a player.

        None if one of the two is missing: then the other begins at 0.
        """
        both = (self.video, self.audio)
        begins = [None if s is None or s.start_time is None else float(s.start_time * s.time_base) for s in both]
        return None if None in begins else min(begins)

    def lead(self, first: int) -> float:
        """Seconds before the first picture, which is shown at a time stamp. MediaError if above `LONGEST_GAP`."""
        lead = 0.0 if self.zero is None else max(0.0, float(first * self.video.time_base) - self.zero)
        if lead > LONGEST_GAP:
            raise MediaError(self.path, f"has sound that begins {lead:.0f} s before its picture", AGAIN)
        return lead


@contextmanager
def open_container(path: str | os.PathLike, kind: str) -> Iterator[Streams]:
    """Open a container of FFmpeg that has a stream of this kind, "video" or "audio".

    MediaError if there is no such file or stream, or if the file or, by its index, the stream ends early.
    """
    path = existing(path)
    if _box_cut(path):
        raise truncated(path, "its last part would end after the file does")
    with av.open(f"file:{path}", **_OPEN) as container:  # "file:", since names may have a colon
        streams = Streams(path, container, *_chosen(container))
        _check(streams, kind)
        yield streams


class Packet(NamedTuple):
    """What the container says of one packet."""

    stream: int
    stamp: int | None  # of its frame, in ticks of the stream
    duration: int  # ticks, 0 if it is not known
    hidden: bool  # by an edit list
    skipped: int  # samples at its end that are not heard


def packets(container, *streams) -> list[Packet]:
    """All packets of some streams. The container stays at its beginning, to be decoded.

    So most files are opened again: there is no way back that is exact in all formats.
    """
    alone = len(container.streams) == 1 and container.format.name.startswith(("mov", "avi"))
    with nullcontext(container) if alone else av.open(container.name, **_OPEN) as other:
        all_packets = [
            Packet(
                packet.stream_index,
                packet.dts if packet.pts is None else packet.pts,
                packet.duration or 0,
                packet.is_discard,
                _skipped(packet),
            )
            for packet in other.demux([other.streams[stream.index] for stream in streams])
            if packet.size
        ]
    if alone and all_packets:
        container.seek(0)
    return all_packets


def _skipped(packet) -> int:
    if packet.stream.type != "audio" or not packet.has_sidedata("skip_samples"):
        return 0
    return struct.unpack_from("<II", packet.get_sidedata("skip_samples"))[1]


def _chosen(container) -> list:
    """The video and the audio stream of a container, or None. All that shows or hears a file takes these.

    Covers, other stills and streams without a decoder do not count. Of several streams one is taken that has as many
    packets as a film (a still has one), then one that is not made for the deaf, as a comment and so on, then one that
    is marked as the default, then the first.
    """
    known = [s for s in container.streams if s.type in ("video", "audio") and s.codec_context is not None]
    known = [s for s in known if not s.disposition & _STILL]
    kinds = [[s for s in known if s.type == kind] for kind in ("video", "audio")]
    if max(map(len, kinds)) < 2:
        return [streams[0] if streams else None for streams in kinds]
    counts = Counter(packet.stream for packet in packets(container, *known) if not packet.hidden)

    def rank(stream) -> tuple:
        count, most = counts[stream.index], max(counts[s.index] for s in known if s.type == stream.type)
        whole = count == most or count > 1 and 10 * count >= most  # not a still, nor a picture every few seconds
        return whole, not stream.disposition & _SECOND, bool(stream.disposition & Disposition.default), -stream.index

    return [max(streams, key=rank, default=None) for streams in kinds]


def _check(streams: Streams, kind: str) -> None:
    """MediaError unless there is a stream of this kind that is whole as far as its index says."""
    path, stream, thing = streams.path, getattr(streams, kind), {"video": "video", "audio": "sound"}[kind]
    if stream is None:
        every = getattr(streams.container.streams, kind)
        if every and all(s.codec_context is None for s in every):
            raise MediaError(path, f"has a {thing} stream of a kind that FFmpeg does not know", AGAIN)
        fix = "give a file with moving pictures" if kind == "video" else "give a file with sound"
        raise MediaError(path, f"has no {thing} stream", fix, f"no {thing}")
    stream.codec_context.thread_count = 1
    index, size = stream.index_entries, os.path.getsize(path)
    there = sum(entry.pos + entry.size <= size for entry in index)
    if there < len(index):
        raise truncated(path, f"{there} of {len(index)} {'frames' if kind == 'video' else 'pieces of sound'} are there")


def _box_cut(path: str | os.PathLike) -> bool:
    """Whether an outermost box of an mp4 (ISO 14496-12) reaches beyond the end of the file. False for other formats."""
    size, at = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while at + 8 <= size:
            file.seek(at)
            head = file.read(16)
            length, name = int.from_bytes(head[:4], "big"), head[4:8]
            if name not in _BOXES or length == 0:  # another format, junk at the end, or a box that ends with the file
                return False
            if length == 1 and len(head) < 16:  # the file ends inside the long form of a length
                return True
            at += max(int.from_bytes(head[8:], "big") if length == 1 else length, 8)
    return at > size


# ---------------------------------------------------------------- time stamps of pictures


def indexed(container, stream) -> bool:
    """Whether a container lists all packets of a stream that can be read from it. (Damaged parts of an avi cannot.)"""
    return container.format.name.startswith("mov") and 0 < stream.frames <= len(stream.index_entries)


def picture_stamps(streams: Streams) -> tuple[list[int], int]:
    """Time stamps of the frames shown, ascending, and the end of the last one, in ticks of the stream.

    They come from the packets, since headers cannot be trusted: mp4 muxers add up durations in decoding order.
    """
    path, container, stream = streams.path, streams.container, streams.video
    every = packets(container, stream)
    # A clip that was cut without encoding it again begins at a key frame before the cut; an edit list hides the frames.
    shown = [(p.stamp, p.duration) for p in every if p.stamp is not None and not p.hidden]
    if not shown:
        raise MediaError(path, "has a video stream without frames", AGAIN, "no frames")
    stamps = sorted(shown)
    ticks = [stamp for stamp, _ in stamps]
    steps = [b - a for a, b in pairwise(ticks)]
    # asf does not say how long a frame lasts: as long as the others
    end = ticks[-1] + (stamps[-1][1] or round(sum(steps) / max(len(steps), 1)))
    if container.format.name == "avi":
        # its header counts ticks, of which a frame may take several: 10 frames/s at 30 ticks/s
        if end < stream.frames and _riff_cut(path):
            raise truncated(path, f"{end} of {stream.frames} ticks of the clip are there")
        end = max(end, min(stream.frames, ticks[-1] + max(steps, default=0)))
    # An index at the front of a file survives a cut: the frames it promises must be there. If an edit list ends before
    # the file does, the last packets are hidden and FFmpeg does not read the rest.
    elif len(every) < stream.frames and not every[-1].hidden:
        raise truncated(path, f"{len(every)} of {stream.frames} frames are there")
    return ticks, end


def picture_seconds(streams: Streams, quick: bool = False) -> float:
    """Length of a clip in seconds: from its beginning to the end of the last frame shown.

    ``quick`` takes it from the index of the file, where that says it: all frames are there, and equally far apart.
    """
    stream = streams.video
    index = stream.index_entries
    if quick and indexed(streams.container, stream) and len(index) > 1 and not any(entry.is_discard for entry in index):
        stamps = sorted(entry.timestamp for entry in index)
        steps = [b - a for a, b in pairwise(stamps)]
        span = (stamps[-1] - stamps[0]) / len(steps) * len(stamps)
        if max(steps) - min(steps) <= 1 and abs((stream.duration or 0) - span) <= 1:
            return float(span * stream.time_base) + streams.lead(stream.start_time or 0)
    stamps, end = picture_stamps(streams)
    return float((end - stamps[0]) * stream.time_base) + streams.lead(stamps[0])


def _riff_cut(path: str | os.PathLike) -> bool:
    """Whether a file of RIFF chunks (avi) ends inside one. A padding byte at the end may be missing."""
    size, at = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while at + 8 <= size:
            file.seek(at)
            head = file.read(8)
            if head[:4] != b"RIFF":
                return False
            at += 8 + int.from_bytes(head[4:], "little")
            at += at % 2
    return at > size + 1
