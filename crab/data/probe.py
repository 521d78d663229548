"""Media files probed: does each exist, is it what its record says, and is it whole?

A probe opens a file as its reader does (`crab.data.media`), by the same functions, decodes the first frame of the
stream that is needed, and makes sure that the end is there: a clip must reach as far as its index says, a sound must
have a sample near its end. Pictures are read completely. This finds the files that the reader refuses, and the length
that it gives, without decoding hundreds of gigabytes. Damage in the middle of a clip or sound is only found if they are
decoded completely ("whole video", "whole audio").
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

from crab.core.files import atomic_file
from crab.core.workers import end_with_parent
from crab.data.containers import AGAIN, RATE, MediaError, decoding, open_container, picture_seconds, reason
from crab.data.pictures import read_image, read_mask
from crab.data.sounds import read_audio, sound_seconds

#: The formats that are read, by their names in FFmpeg, libsndfile or Pillow, and the suffixes of their files.
SUFFIXES = {
    "mov": ".mp4 .m4v .mov .m4a .3gp", "avi": ".avi", "matroska": ".mkv .webm", "mpegts": ".ts .mts",
    "mpeg": ".mpg .mpeg", "flv": ".flv", "asf": ".wmv .wma .asf", "aac": ".aac", "wav": ".wav", "wavex": ".wav",
    "rf64": ".wav", "mp3": ".mp3", "flac": ".flac", "ogg": ".ogg .oga .opus", "jpeg": ".jpg .jpeg", "png": ".png",
    "bmp": ".bmp", "webp": ".webp", "gif": ".gif", "tiff": ".tif .tiff",
}  # fmt: skip
_SAVE_EVERY = 60  # seconds between two writes of the results
WHOLE = "whole "  # stands before a kind if the file is decoded completely
_THINGS = {"video": "a video", "audio": "sound", "image": "an image", "mask": "an image"}


@dataclass(frozen=True)
class Probe:
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
    try:
        with decoding(path, _THINGS[kind]):
            if kind == "video":
                seconds, form = _video(path, whole)
            elif kind == "audio":
                seconds, form = sound_seconds(path)
                seconds = len(read_audio(path)) / RATE if whole else seconds
            else:
                (read_mask if kind == "mask" else read_image)(path)
                with Image.open(path) as image:
                    seconds, form = None, image.format.lower()
    except MediaError as error:
        return Probe(error.problem, f"{error.fault}; {error.fix}".replace(path, ""))
    suffixes, suffix = SUFFIXES.get(form, "").split(), Path(path).suffix.lower()
    misnamed = f"holds {form}, is named '{suffix}'; rename it, here and in its records"
    return Probe(seconds=seconds, named=misnamed if suffixes and suffix not in suffixes else "")


def _video(path: str, whole: bool) -> tuple[float, str]:
    with open_container(path, "video") as streams:
        seconds = picture_seconds(streams, quick=True)
        frames, done = streams.container.decode(streams.video), 1
        if next(frames, None) is None:
            raise MediaError(path, "has a video stream without frames that decode", AGAIN, "no frames")
        try:
            while whole and next(frames, None):  # what would stop a reader inside the clip
                done += 1
        except av.error.FFmpegError as error:
            fault = f"breaks off inside: {done} frames decode, the next does not ({error.strerror})"
            raise MediaError(path, fault, AGAIN) from None
        return seconds, streams.container.format.name.split(",")[0]


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
        fault = "the processes that probe media files could not be started; try again with fewer workers"
        fix = "in a script call this under `if __name__ == '__main__':`, since each process imports the script"
        raise RuntimeError(f"{fault}, and {fix}") from error


class File(NamedTuple):
    """What the file system says of a path."""

    fault: Probe | None  # if it is not a file
    size: int = 0
    changed: int = 0  # ns
    same: Any = None  # equal for two names of one file
    outside: str = ""  # if it lies outside the root: the problem and how to fix it


class Files:
    """The media files of a tree, by their paths under the root: what the file system says of one (`stat`, asked once),
    and what probes found (`probes`, by path and kind), now or in an earlier walk.

    Results are kept in a JSON file, by path, kind, size and time of the last change. If it is damaged, or comes from
    other versions of the decoders, it begins again. A killed walk loses the results of its last minute.
    """

    _VERSION = f"4 {av.__version__} {soundfile.__libsndfile_version__} {Image.__version__}"

    def __init__(self, root: str | os.PathLike, cache: str | os.PathLike | None = None) -> None:
        self.root, self.cache = Path(os.path.realpath(root)), Path(cache) if cache else None
        self.stat, self._folder = functools.cache(self._stat), functools.cache(os.path.realpath)
        self.probes: dict[tuple[str, str], Probe] = {}
        try:
            content = json.loads(self.cache.read_bytes()) if cache else {}
            self._results = content["results"] if content["version"] == self._VERSION else {}
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            self._results = {}
        self._save()  # fails now, not after hours, if the file cannot be written

    def _stat(self, path: str) -> File:
        """What the file system says of a path under the root."""
        folder, name = os.path.split(self.root / path)
        try:
            full = os.path.join(self._folder(folder), name)
            full = os.path.realpath(full) if os.path.islink(full) else full
            at = os.stat(full)
        except (FileNotFoundError, NotADirectoryError):
            return File(Probe("missing", "does not exist; check the path in the record, or copy or build the file"))
        except (OSError, ValueError) as error:
            fault = f"cannot be reached ({reason(error)})"
            return File(Probe("missing", f"{fault}; check the path in the record and the file's rights"))
        if not stat.S_ISREG(at.st_mode):
            return File(Probe("not a file", "is a folder or a device; give a file"))
        outside = ""
        if not Path(full).is_relative_to(self.root):
            fix = "copy it under the root, or put `link` in tolerate if you trust it"
            outside = f"is, or lies behind, a link that leads out of the root; {fix}"
        return File(None, at.st_size, at.st_mtime_ns, (at.st_dev, at.st_ino) if at.st_ino else full, outside)

    def probe(self, jobs: Iterable[tuple[str, str]], decode: bool, limit: float, workers: int, progress: bool):
        """Probe each (path, kind), with ``decode`` completely. Returns the number of files opened, and known.

        A file with several names is opened once.
        """
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
                waiting.setdefault((at.same, asked, Path(path).suffix), {})[path, kind] = full
        opened = {(next(iter(names.values())), asked): names for (_, asked, _), names in waiting.items()}
        results = probe_all(opened, workers, limit)
        for (full, asked), result in tqdm(results, "probe", len(opened), unit="file", disable=not progress):
            for (path, kind), name in opened[full, asked].items():
                self.probes[path, kind] = result
                # a decoder that hangs or crashes is tried again next time: the machine may have been busy
                if result.problem not in ("hangs", "crashes"):
                    self._results[f"{asked} {name}"] = [*self.stat(path)[1:3], *astuple(result)]
            if time.monotonic() - self._saved > _SAVE_EVERY:
                self._save()
        self._save()
        return len(opened), known

    def _save(self) -> None:
        if self.cache:
            with atomic_file(self.cache) as part:
                part.write_text(json.dumps({"version": self._VERSION, "results": self._results}), encoding="utf-8")
        self._saved = time.monotonic()
