"""Media files probed: is each what its record takes it for, and whole?  In processes that can be killed, once a file.

A probe opens the file, looks for the stream that is needed, decodes the first frame of it and makes sure that the end
is there: for a clip, that the file reaches as far as its own index says; for a sound, that a sample near its end can
be read; images are decoded as a whole.  That finds the files which :mod:`crab.data.media` would refuse, without
decoding hundreds of gigabytes; damage in the middle of a clip or sound is found where they are asked for whole.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import av
import soundfile
from PIL import Image, UnidentifiedImageError

from crab.data import media

# Each format that is read, by its name in FFmpeg, libsndfile or Pillow, and the names that its files bear. Nothing else
# is opened: FFmpeg also reads play lists, which can send it to any file or address.
_SUFFIXES = {
    "mov": ".mp4 .m4v .mov .m4a .3gp", "avi": ".avi", "matroska": ".mkv .webm", "mpegts": ".ts .mts", "mpeg": ".mpg .mpeg",
    "flv": ".flv", "asf": ".wmv .wma .asf", "aac": ".aac", "wav": ".wav", "wavex": ".wav", "rf64": ".wav", "mp3": ".mp3",
    "flac": ".flac", "ogg": ".ogg .oga .opus", "jpeg": ".jpg .jpeg", "png": ".png", "bmp": ".bmp",
    "webp": ".webp", "gif": ".gif", "tiff": ".tif .tiff",
}  # fmt: skip
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpegts,mpeg,flv,asf,wav,mp3,aac,flac,ogg"
_OPTIONS = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"uuid", b"moof", b"mfra", b"sidx", b"styp", b"udta", b"meta")
_AGAIN = "copy or build it again"
WHOLE = "whole "  # before a kind: decoded to its end, with all that the reader may meet there
_START = 120  # seconds in which a process must have imported what it needs
_BATCH = 16  # files handed to a process at a time


@dataclass(frozen=True)
class Probe:
    """What was found out about a file.

    Attributes:
        problem: what is wrong, one of `crab.data.findings.PROBLEMS`; empty if the file can be used.
        words: what is wrong in words, and the mend.
        seconds: how long it lasts, None for a picture.
        named: what is wrong with its name, though it can be used; else empty.
    """

    problem: str = ""
    words: str = ""
    seconds: float | None = None
    named: str = ""


class _Bad(Exception):
    """A file that cannot be used: (problem, words)."""


def probe(path: str, kind: str) -> Probe:
    """Probe one file, here: see the module's words. Never raises; a decoder may hang or crash (:func:`probe_all`).

    Args:
        kind: what it is to be: video, audio, image or mask; "whole video" or "whole audio" decodes all of it.
    """
    kind, whole = kind.removeprefix(WHOLE), kind.startswith(WHOLE)
    try:
        if not os.path.getsize(path):
            raise _Bad("empty", f"is empty (0 bytes); {_AGAIN}")
        if _box_cut(path):
            raise _Bad("truncated", f"is truncated: its last part would end after the file does; {_AGAIN}")
        seconds, form = {"video": _video, "audio": _sound}.get(kind, _picture)(path)
        if whole and kind == "video":
            _decode(path)
        elif whole and kind == "audio":
            media.read_audio(path)
        return Probe(seconds=seconds, named=_misnamed(path, form))
    except _Bad as bad:
        return Probe(*bad.args)
    except media.MediaError as error:
        return Probe("truncated" if "truncated:" in error.fault else "undecodable", f"{error.fault}; {error.mend}")
    except Exception as error:  # whatever a decoder's binding raises is a fault of the file
        noun = {"video": "a video", "audio": "sound"}.get(kind, "an image")
        reason = getattr(error, "strerror", None) or str(error).replace(path, "").strip(": ") or type(error).__name__
        return Probe("undecodable", f"cannot be decoded as {noun} ({reason[:200]}); the file is truncated or not {noun}: {_AGAIN}")


def _misnamed(path: str, form: str) -> str:
    suffixes = _SUFFIXES.get(form, "").split()
    found = Path(path).suffix.lower()
    if not suffixes or found in suffixes:
        return ""
    return f"holds {form}, is named '{found}'; rename it, here and in its records"


def _video(path: str) -> tuple[float, str]:
    with av.open(path, options=_OPTIONS) as container:
        moving = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not moving:
            raise _Bad("no video", "has no video stream; give a file with moving pictures")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        index = list(stream.index_entries)
        whole = stream.frames and len(index) >= stream.frames
        if whole:
            size = os.path.getsize(path)
            there = sum(e.pos + e.size <= size for e in index)
            if there < len(index):
                raise _Bad("truncated", f"is truncated: {there} of {len(index)} frames are there; {_AGAIN}")
        if whole and not any(e.is_discard for e in index):
            stamps = sorted(e.timestamp for e in index)
            step = (stamps[-1] - stamps[0]) / (len(stamps) - 1) if len(stamps) > 1 else stream.duration or 0
            seconds = float((stamps[-1] - stamps[0] + step) * stream.time_base)
        else:  # no index of all frames, or one with frames that are not shown: walk through the packets, as the reader does
            try:
                _, seconds = media.span(Path(path), container, stream)
            except media.MediaError as error:
                if "without frames" in error.fault:
                    raise _Bad("no frames", f"{error.fault}; {_AGAIN}") from None
                raise
        if next(container.decode(stream), None) is None:
            raise _Bad("no frames", f"has a video stream without frames that decode; {_AGAIN}")
        return seconds, container.format.name.split(",")[0]


def _decode(path: str) -> None:
    """Decode all frames of a clip: what would stop a reader inside it is found."""
    with av.open(path, options=_OPTIONS) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        done = 0
        try:
            for done, _ in enumerate(container.decode(stream), 1):
                pass
        except av.error.FFmpegError as error:
            raise _Bad("undecodable", f"breaks off inside: {done} frames decode, the next does not ({error.strerror}); {_AGAIN}") from None


def _box_cut(path: str) -> bool:
    """Whether one of the outermost boxes of an mp4 (ISO 14496-12) reaches beyond the end; False for other files."""
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
                raise _Bad("no sound", "holds no sound (zero length); record or build it again")
            sound.read(min(sound.frames, 1024))
            seconds = sound.frames / sound.samplerate
            # half a second short is let pass: headers that are a few frames off are common
            sound.seek(max(0, sound.frames - sound.samplerate // 2 - 1))
            missing = 0.5 if not len(sound.read(1)) else 0.0
            form = sound.format.lower()
            form = "mp3" if form == "mpeg" else form  # which FFmpeg calls a kind of video
        missing = max(missing, _riff_missing(path) * seconds)
        if missing >= 0.5:
            raise _Bad("truncated", f"is truncated: it ends before the {seconds:.1f} s that it promises; {_AGAIN}")
        return seconds, form
    except soundfile.LibsndfileError:
        return _sound_of_container(path)


def _riff_missing(path: str) -> float:
    """What is missing of a wav by its own header, over what is there; libsndfile takes such a file for a short one."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
    promised = int.from_bytes(head[4:8], "little") + 8
    whole = head[:4] != b"RIFF" or promised >= 0xFFFFFF00  # a writer that could not go back leaves the size open
    return 0.0 if whole else max(0, promised - size) / size


def _sound_of_container(path: str) -> tuple[float, str]:
    with av.open(path, options=_OPTIONS) as container:
        if not container.streams.audio:
            raise _Bad("no sound", "has no sound stream; give a file with sound")
        stream = container.streams.audio[0]
        index, size = list(stream.index_entries), os.path.getsize(path)
        there = sum(e.pos + e.size <= size for e in index)
        if there < len(index):
            raise _Bad("truncated", f"is truncated: {there} of {len(index)} pieces of sound are there; {_AGAIN}")
        if next(container.decode(stream), None) is None:
            raise _Bad("no sound", f"has a sound stream without sound that decodes; {_AGAIN}")
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / av.time_base
        return seconds, container.format.name.split(",")[0]


def _picture(path: str) -> tuple[None, str]:
    try:
        with Image.open(path) as image:
            form = (image.format or "").lower()
            image.load()
    except UnidentifiedImageError:
        raise _Bad("undecodable", f"cannot be decoded as an image (no known format); the file is not an image: {_AGAIN}") from None
    return None, form


# ---------------------------------------------------------------- many files, and those that never come to an end

def _work(pipe: Connection) -> None:
    """A process of :func:`probe_all`: answers each batch of files one by one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders written in C complain there
    try:
        pipe.send(None)
        while True:
            for path, kind in pipe.recv():
                pipe.send(probe(path, kind))
    except (EOFError, OSError):  # the parent has gone
        return


class _Worker:
    def __init__(self) -> None:
        # spawned, not forked: the caller may be a notebook with threads of its own
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.ready, self.jobs = False, deque()
        self.deadline = time.monotonic() + _START

    def end(self, dying: bool = False) -> int | None:
        """Kill it, whatever it does; its exit code if it had ended by itself."""
        self.process.join(1 if dying else 0)
        code = self.process.exitcode
        self.process.kill()  # not terminate: a decoder deep in C would put that off
        self.process.join(1)
        self.pipe.close()
        return code


def probe_all(jobs: Iterable[tuple[str, str]], workers: int, limit: float) -> Iterator[tuple[tuple[str, str], Probe]]:
    """Probe files in processes of their own; gives (job, result) as they come.

    A process that spends more than `limit` seconds on one file, or dies of it, is killed and replaced; the file's
    problem is then ``"hangs"`` or ``"crashes"``.

    Args:
        jobs: path and kind of each.
        workers: processes.
        limit: seconds for a file.

    Raises:
        RuntimeError: a process cannot be started.
    """
    waiting = deque(jobs)
    running: dict[Connection, _Worker] = {}
    try:
        for _ in range(min(workers, -(-len(waiting) // _BATCH))):
            worker = _Worker()
            running[worker.pipe] = worker
        while running:
            now = time.monotonic()
            ready = wait(running, max(0.0, min(w.deadline for w in running.values()) - now))
            for pipe in ready:
                yield from _answered(running[pipe], waiting, running, limit)
            now = time.monotonic()
            for worker in [w for w in running.values() if w.deadline < now and not w.pipe.poll()]:
                yield from _lost(worker, waiting, running, Probe(
                    "hangs", f"keeps the decoder busy for more than {limit:g} s; {_AGAIN}, or allow more time (time_limit)"))
    finally:
        for worker in running.values():
            worker.end()


def _answered(worker: _Worker, waiting: deque, running: dict, limit: float) -> Iterator:
    """Take in what a process has sent, and give it more to do, or its leave."""
    try:
        found = worker.pipe.recv()
    except (EOFError, OSError):
        yield from _lost(worker, waiting, running, None)
        return
    if worker.ready:
        yield worker.jobs.popleft(), found
    worker.ready = True
    if not worker.jobs:
        worker.jobs.extend(waiting.popleft() for _ in range(min(_BATCH, len(waiting))))
        if not worker.jobs:
            del running[worker.pipe]
            worker.end()
            return
        worker.pipe.send(list(worker.jobs))
    worker.deadline = time.monotonic() + limit


def _lost(worker: _Worker, waiting: deque, running: dict, found: Probe | None) -> Iterator:
    """End a process that hangs or has died; its other files go back to those that wait, before a new process."""
    del running[worker.pipe]
    code = worker.end(dying=found is None)
    if not worker.jobs:
        raise RuntimeError(f"a process that probes media files could not be started (exit code {code}); try again with fewer workers, and "
                           "in a script call this under `if __name__ == '__main__':`, since each process imports the script")
    job = worker.jobs.popleft()
    waiting.extendleft(reversed(worker.jobs))
    yield job, found or Probe("crashes", f"makes the decoder crash (exit code {code}); {_AGAIN}")
    if waiting:
        fresh = _Worker()
        running[fresh.pipe] = fresh


# ---------------------------------------------------------------- what is known from earlier walks

class Cache:
    """Results of earlier probes in a file (SQLite), each for a path, kind, size and time of last change.

    Files on which the decoder hung or crashed are probed again: the machine may have been busy. A cache that is damaged
    or was made by another version of the decoders begins anew.
    """

    _VERSION = f"2 {av.__version__} {soundfile.__libsndfile_version__} {Image.__version__}"

    def __init__(self, path: str | os.PathLike | None) -> None:
        self._path = Path(path) if path else None
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._open()
        except sqlite3.OperationalError:  # another walk holds it, or its folder cannot be written to
            raise
        except sqlite3.DatabaseError:
            self._path.unlink()
            self._open()

    def _open(self) -> None:
        self._base = sqlite3.connect(self._path or ":memory:")
        with self._base:
            self._base.execute("CREATE TABLE IF NOT EXISTS made_by (version TEXT)")
            if self._base.execute("SELECT version FROM made_by").fetchall() != [(self._VERSION,)]:
                self._base.executescript("DROP TABLE IF EXISTS probes; DELETE FROM made_by")
                self._base.execute("INSERT INTO made_by VALUES (?)", (self._VERSION,))
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS probes (path TEXT, kind TEXT, size INTEGER, changed INTEGER, problem TEXT, words TEXT, "
                "seconds REAL, named TEXT, PRIMARY KEY (path, kind)) WITHOUT ROWID")
        self._saved = time.monotonic()

    def get(self, path: str, kind: str, size: int, changed: int) -> Probe | None:
        """What is known about a file of this size and time of change (ns), if anything."""
        row = self._base.execute(
            "SELECT problem, words, seconds, named FROM probes WHERE path = ? AND kind = ? AND size = ? AND changed = ?",
            (path, kind, size, changed)).fetchone()
        return Probe(*row) if row else None

    def put(self, path: str, kind: str, size: int, changed: int, found: Probe) -> None:
        """Remember a result; it is on disk a few seconds later, or after :meth:`close`."""
        if found.problem in ("hangs", "crashes"):
            return
        self._base.execute("INSERT OR REPLACE INTO probes VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                           (path, kind, size, changed, found.problem, found.words, found.seconds, found.named))
        if time.monotonic() - self._saved > 5:
            self._base.commit()
            self._saved = time.monotonic()

    def close(self) -> None:
        """Write what is not yet written."""
        self._base.commit()
        self._base.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def default_workers() -> int:
    """A process for each core that this one may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
