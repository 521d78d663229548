"""Media files probed: does each exist, is it what its record says, and is it whole?

A probe opens a file, decodes the first frame of the stream that is needed, and makes sure that the end is there: a
clip must reach as far as its index says, a sound must have a sample near its end. Pictures are decoded completely. This
finds the files that `crab.data.media` refuses, without decoding hundreds of gigabytes. Damage in the middle of a clip
or sound is only found if they are decoded completely ("whole video", "whole audio").
"""

from __future__ import annotations

import functools
import json
import os
import stat
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import av
import soundfile
from pebble import ProcessExpired, ProcessPool
from PIL import Image
from tqdm import tqdm

from crab.data import media
from crab.data.files import atomic_file
from crab.data.media import AGAIN, MediaError
from crab.data.workers import end_with_parent

#: The formats that are read, by their names in FFmpeg, libsndfile or Pillow, and the suffixes of their files.
SUFFIXES = {
    "mov": ".mp4 .m4v .mov .m4a .3gp", "avi": ".avi", "matroska": ".mkv .webm", "mpegts": ".ts .mts",
    "mpeg": ".mpg .mpeg", "flv": ".flv", "asf": ".wmv .wma .asf", "aac": ".aac", "wav": ".wav", "wavex": ".wav",
    "rf64": ".wav", "mp3": ".mp3", "flac": ".flac", "ogg": ".ogg .oga .opus", "jpeg": ".jpg .jpeg", "png": ".png",
    "bmp": ".bmp", "webp": ".webp", "gif": ".gif", "tiff": ".tif .tiff",
}  # fmt: skip
# FFmpeg opens these alone: it also reads play lists, which can send it to any file or address.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpegts,mpeg,flv,asf,wav,mp3,aac,flac,ogg"
_OPTIONS = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
_BOXES = b"ftyp moov mdat free skip wide uuid moof mfra sidx styp udta meta".split()
_SAVE_EVERY = 60  # seconds between two writes of the results
WHOLE = "whole "  # stands before a kind if the file is decoded completely


@dataclass(frozen=True)
class Probe:
    """Result for one file."""

    problem: str = ""  # one of `crab.data.findings.PROBLEMS`; empty if the file can be used
    words: str = ""  # the problem and how to fix it
    seconds: float | None = None  # None for a picture
    named: str = ""  # what is wrong with the name of a file that can be used


def probe(path: str, kind: str) -> Probe:
    """Probe one file in this process. This never raises, but a decoder may hang or crash: see `probe_all`.

    Args:
        kind: what the file must be: video, audio, image or mask; "whole video" or "whole audio" decodes it completely.
    """
    kind, whole = kind.removeprefix(WHOLE), kind.startswith(WHOLE)
    thing = {"video": "a video", "audio": "sound"}.get(kind, "an image")
    try:
        if not os.path.getsize(path):
            raise MediaError(path, "is empty (0 bytes)", AGAIN, "empty")
        if _box_cut(path):
            raise _truncated(path, "its last part would end after the file does")
        if kind == "video":
            seconds, form = _video(path, whole)
        elif kind == "audio":
            seconds, form = _sound(path)
            if whole:
                media.read_audio(path)
        else:
            with media.opened(path) as image:
                seconds, form = None, (image.format or "").lower()
    except MediaError as error:
        return Probe(error.problem, f"{error.fault}; {error.fix}".replace(path, ""))
    except Exception as error:  # whatever a decoder raises is a fault of the file
        fault = f"cannot be decoded as {thing} ({media.reason(error).replace(path, '').strip(': ')[:200]})"
        return Probe("undecodable", f"{fault}; the file is truncated or not {thing}: {AGAIN}")
    suffixes, suffix = SUFFIXES.get(form, "").split(), Path(path).suffix.lower()
    misnamed = f"holds {form}, is named '{suffix}'; rename it, here and in its records"
    return Probe(seconds=seconds, named=misnamed if suffixes and suffix not in suffixes else "")


def _truncated(path: str, what: str) -> MediaError:
    return MediaError(path, f"is truncated: {what}", AGAIN, "truncated")


# ---------------------------------------------------------------- one file


def _video(path: str, whole: bool) -> tuple[float, str]:
    with av.open(path, options=_OPTIONS) as container:
        if all(s.disposition & av.stream.Disposition.attached_pic for s in container.streams.video):
            raise MediaError(path, "has no video stream", "give a file with moving pictures", "no video")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        index = list(stream.index_entries)
        indexed = stream.frames and len(index) >= stream.frames
        if indexed:
            _check_index(path, index, "frames")
        if indexed and not any(entry.is_discard for entry in index):
            stamps = sorted(entry.timestamp for entry in index)
            step = (stamps[-1] - stamps[0]) / (len(stamps) - 1) if len(stamps) > 1 else stream.duration or 0
            seconds = float((stamps[-1] - stamps[0] + step) * stream.time_base)
        else:  # the index lacks frames, or has frames that are not shown: walk through the packets, as the reader does
            seconds = media.length(path, container, stream)
        frames, done = container.decode(stream), 1
        if next(frames, None) is None:
            raise MediaError(path, "has a video stream without frames that decode", AGAIN, "no frames")
        try:
            while whole and next(frames, None):  # what would stop a reader inside the clip
                done += 1
        except av.error.FFmpegError as error:
            fault = f"breaks off inside: {done} frames decode, the next does not ({error.strerror})"
            raise MediaError(path, fault, AGAIN) from None
        return seconds, container.format.name.split(",")[0]


def _check_index(path: str, index: list, things: str) -> None:
    size = os.path.getsize(path)
    there = sum(entry.pos + entry.size <= size for entry in index)
    if there < len(index):
        raise _truncated(path, f"{there} of {len(index)} {things} are there")


def _box_cut(path: str) -> bool:
    """Whether an outermost box of an mp4 (ISO 14496-12) reaches beyond the end of the file. False for other formats."""
    size, at = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while at + 8 <= size:
            file.seek(at)
            head = file.read(16)
            length, name = int.from_bytes(head[:4], "big"), head[4:8]
            if name not in _BOXES or length == 0:  # another format, junk at the end, or a box that ends with the file
                return False
            at += int.from_bytes(head[8:], "big") if length == 1 else max(length, 8)
    return at > size


def _sound(path: str) -> tuple[float, str]:
    try:
        with soundfile.SoundFile(path) as sound:
            if not sound.frames:
                raise MediaError(path, "holds no sound (zero length)", "record or build it again", "no sound")
            sound.read(min(sound.frames, 1024))
            seconds = sound.frames / sound.samplerate
            # half a second less is accepted: many headers are a few frames off
            sound.seek(max(0, sound.frames - sound.samplerate // 2 - 1))
            missing = 0.0 if len(sound.read(1)) else 0.5
            form = sound.format.lower()
    except soundfile.LibsndfileError:
        return _sound_of_container(path)
    if max(missing, _riff_missing(path) * seconds) >= 0.5:
        raise _truncated(path, f"it ends before the {seconds:.1f} s that it promises")
    return seconds, "mp3" if form == "mpeg" else form  # FFmpeg uses the name mpeg for a kind of video


def _riff_missing(path: str) -> float:
    """The part of a wav that its header promises and that is missing, as a fraction of the part that is there.

    libsndfile reads such a file as a shorter sound.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
    promised = int.from_bytes(head[4:8], "little") + 8
    whole = head[:4] != b"RIFF" or promised >= 0xFFFFFF00  # a writer that cannot seek leaves the size open
    return 0.0 if whole else max(0, promised - size) / size


def _sound_of_container(path: str) -> tuple[float, str]:
    with av.open(path, options=_OPTIONS) as container:
        if not container.streams.audio:
            raise MediaError(path, "has no sound stream", "give a file with sound", "no sound")
        stream = container.streams.audio[0]
        _check_index(path, list(stream.index_entries), "pieces of sound")
        if next(container.decode(stream), None) is None:
            raise MediaError(path, "has a sound stream without sound that decodes", AGAIN, "no sound")
        seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
        return float(seconds), container.format.name.split(",")[0]


# ---------------------------------------------------------------- many files


def _start_worker() -> None:
    end_with_parent()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders written in C complain on stderr


def probe_all(jobs: Iterable[tuple[str, str]], workers: int, limit: float) -> Iterator[tuple[tuple[str, str], Probe]]:
    """Probe files, given as (path, kind), in worker processes, and yield (job, result) as they finish.

    A worker that takes more than ``limit`` seconds for a file, or dies of it, is replaced. The problem of this file is
    then "hangs" or "crashes". RuntimeError if the processes cannot be started.
    """
    waiting, running = deque(jobs), {}
    workers = min(workers, len(waiting) // 16 + 1)
    # spawned, not forked: the caller may be a notebook with threads
    pool = ProcessPool(workers, initializer=_start_worker, context=get_context("spawn"))
    try:
        while waiting or running:
            while waiting and len(running) < 8 * workers:  # so that no worker waits
                job = waiting.popleft()
                running[pool.schedule(probe, args=job, timeout=limit)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), _result(future, limit)
    finally:
        pool.stop()
        pool.join()


def _result(future, limit: float) -> Probe:
    try:
        return future.result()
    except TimeoutError:
        fault = f"keeps the decoder busy for more than {limit:g} s"
        return Probe("hangs", f"{fault}; {AGAIN}, or allow more time (time_limit)")
    except ProcessExpired as error:
        return Probe("crashes", f"makes the decoder crash (exit code {error.exitcode}); {AGAIN}")
    except BrokenProcessPool as error:
        raise RuntimeError(
            "the processes that probe media files could not be started; try again with fewer workers, and in a script "
            "call this under `if __name__ == '__main__':`, since each process imports the script"
        ) from error


class File(NamedTuple):
    """What the file system says of a path."""

    fault: Probe | None  # if it is not a file
    size: int = 0
    changed: int = 0  # ns
    same: Any = None  # equal for two names of one file
    outside: str = ""  # if it lies outside the root: the problem and how to fix it


class Files:
    """The media files of a tree: what the file system says (`files`, by path under the root), and what probes found
    (`probes`, by path and kind), now or in an earlier walk.

    Results are kept in a JSON file, by path, kind, size and time of the last change. If it is damaged, or comes from
    other versions of the decoders, it begins again. A killed walk loses the results of its last minute.
    """

    _VERSION = f"3 {av.__version__} {soundfile.__libsndfile_version__} {Image.__version__}"

    def __init__(self, root: str | os.PathLike, cache: str | os.PathLike | None = None) -> None:
        self.root, self.cache = Path(os.path.realpath(root)), Path(cache) if cache else None
        self.files: dict[str, File] = {}
        self.probes: dict[tuple[str, str], Probe] = {}
        self._folder = functools.cache(os.path.realpath)
        try:
            content = json.loads(self.cache.read_bytes()) if cache else {}
            self._results = content["results"] if content["version"] == self._VERSION else {}
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            self._results = {}
        self._save()  # fails now, not after hours, if the file cannot be written

    def stat(self, path: str) -> File:
        """What the file system says of a path under the root."""
        if path not in self.files:
            self.files[path] = self._stat(path)
        return self.files[path]

    def _stat(self, path: str) -> File:
        folder, name = os.path.split(self.root / path)
        try:
            full = os.path.join(self._folder(folder), name)
            full = os.path.realpath(full) if os.path.islink(full) else full
            at = os.stat(full)
        except (FileNotFoundError, NotADirectoryError):
            return File(Probe("missing", "does not exist; check the path in the record, or copy or build the file"))
        except (OSError, ValueError) as error:
            fault = f"cannot be reached ({media.reason(error)})"
            return File(Probe("missing", f"{fault}; check the path in the record and the file's rights"))
        if not stat.S_ISREG(at.st_mode):
            return File(Probe("not a file", "is a folder or a device; give a file"))
        outside = ""
        if not Path(full).is_relative_to(self.root):
            fix = "copy it under the root, or put `link` in tolerate if you trust it"
            outside = f"is, or lies behind, a link that leads out of the root; {fix}"
        return File(None, at.st_size, at.st_mtime_ns, (at.st_dev, at.st_ino) if at.st_ino else full, outside)

    def probe(self, jobs: Iterable[tuple[str, str]], decode: bool, limit: float, workers: int, progress: bool):
        """Probe each (path, kind), with ``decode`` completely. Returns the number of files opened, and known."""
        waiting, known = {}, 0
        for path, kind in jobs:
            at, full = self.stat(path), str(self.root / path)
            # also the key of the result: a file that was only opened may be damaged inside
            asked = f"{WHOLE}{kind}" if decode and kind in ("video", "audio") else kind
            result = self._results.get(f"{asked} {full}")
            if at.fault:
                self.probes[path, kind] = at.fault
            elif result and result[:2] == [at.size, at.changed]:
                self.probes[path, kind] = Probe(*result[2:])
                known += 1
            else:
                waiting[full, asked] = path, kind
        results = probe_all(waiting, workers, limit)
        for (full, asked), result in tqdm(results, "probe", len(waiting), unit="file", disable=not progress):
            path, kind = waiting[full, asked]
            self.probes[path, kind] = result
            # a decoder that hangs or crashes is tried again next time: the machine may have been busy
            if result.problem not in ("hangs", "crashes"):
                self._results[f"{asked} {full}"] = [*self.files[path][1:3], *astuple(result)]
            if time.monotonic() - self._saved > _SAVE_EVERY:
                self._save()
        self._save()
        return len(waiting), known

    def _save(self) -> None:
        if self.cache:
            with atomic_file(self.cache) as part:
                part.write_text(json.dumps({"version": self._VERSION, "results": self._results}), encoding="utf-8")
        self._saved = time.monotonic()
