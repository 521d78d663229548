"""A raw data set on disk: its annotation files read row by row, its media found by name, what is left out written down.

A *fault* is something that should not be there (a malformed row, an unknown label, two files of one name): an error that
names file, line and mend, or, where the caller says so, a row left out like any other.  What is *left out* (media that
are missing, clips without sound, labels that say too little) is kept by reason, with the place of each.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FAULTS = ("error", "skip-and-record")
VIDEO = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".flv")
AUDIO = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg")


class SourceError(ValueError):
    """A fault of a raw data set: the message names file, line or record, field, and the mend."""


class LeftOut(Exception):
    """Raised for a row of which no record is made: the reason, then what it is about."""

    def __init__(self, reason: str, about: str) -> None:
        super().__init__(reason, about)
        self.reason, self.about = reason, about


class Draft(NamedTuple):
    """A record before its answer is written and its media are in place.

    Attributes:
        where: the row it comes from, for messages.
        record: the published fields, but for the answer.
        truth: the answer, of the type that :func:`crab.tasks.parse` returns.
        chain: statements before the answer, each supported by the labels.
        files: path under the media slot's folder -> file of the raw set.  A sound whose file is a video is extracted.
        labels: the labels that a chain may name.
        others: labels that it may not name, beside those of other records (the wrong choices of a question).
    """

    where: str
    record: dict[str, Any]
    truth: Any
    chain: str
    files: dict[str, Path]
    labels: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


class Raw:
    """A raw data set.

    Args:
        root: its folder; annotation files and media may lie anywhere below.
        faults: one of :data:`FAULTS`.
        seed: of what is drawn (the pairs of a2v and v2a).
    """

    def __init__(self, root: str | os.PathLike, faults: str = "error", seed: int = 0) -> None:
        self.root, self.faults, self.seed = Path(root), faults, seed
        self.left_out: dict[str, list[str]] = {}
        if faults not in FAULTS:
            raise ValueError(f"faults is {faults!r}; give one of {', '.join(FAULTS)}")
        if not self.root.is_dir():
            raise SourceError(f"{self.root}: no such folder; give the one that holds the raw data set")
        self.paths: list[Path] = []
        self._stems: dict[str, list[Path]] = {}
        walked = {os.path.realpath(self.root)}
        for folder, names, files in os.walk(self.root, followlinks=True):
            below = {n: os.path.realpath(os.path.join(folder, n)) for n in sorted(names) if not n.startswith(".")}
            names[:] = [n for n, real in below.items() if real not in walked and not walked.add(real)]  # links may loop
            self.paths += (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        for path in self.paths:
            self._stems.setdefault(path.stem, []).append(path)

    def leave(self, reason: str, where: str) -> None:
        """Write down that something is left out."""
        self.left_out.setdefault(reason, []).append(where)

    def fault(self, error: SourceError) -> None:
        """Raise the error, or write it down."""
        if self.faults == "error":
            raise error
        self.leave("fault", str(error))

    # ------------------------------------------------------------ annotation files

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return any(path.name == name for path in self._stems.get(Path(name).stem, ()))

    def file(self, name: str) -> Path:
        """The annotation file of this name that lies highest."""
        found = sorted((p for p in self._stems.get(Path(name).stem, ()) if p.name == name), key=lambda p: (len(p.parts), p))
        if not found:
            raise SourceError(f"{self.root}: no {name} in it or below; put the data set's own file there")
        if len(found) > 1 and len(found[0].parts) == len(found[1].parts):
            raise SourceError(f"{found[0]} and {found[1]}: which is meant? keep one of them under {self.root}")
        return found[0]

    def text(self, name: str) -> tuple[Path, str]:
        """An annotation file and its text."""
        path = self.file(name)
        try:
            return path, path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise SourceError(f"{path}, line {line}: not UTF-8 at byte {error.start}; save it as UTF-8") from error

    def lines(self, name: str) -> Iterator[tuple[str, str]]:
        """(where, line) of a text file, empty lines skipped."""
        path, text = self.text(name)
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield f"{path}, line {number}", line.strip()

    def rows(self, name: str, columns: Sequence[str], delimiter: str = ",", header: bool = True) -> Iterator[tuple[str, dict]]:
        """(where, row) of a delimited file, values stripped.

        Args:
            columns: those that must be there; without a header, all of them in order (a line that repeats them is skipped).
        """
        path, text = self.text(name)
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter,
                           quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE)
        names = list(columns)
        try:
            if header:
                names = [n.strip() for n in next(lines, [])]
                for absent in (c for c in columns if c not in names):
                    raise SourceError(f"{path}, line 1: no column '{absent}' in its header; it needs {', '.join(columns)}, "
                                      f"separated by {delimiter!r}")
            for values in lines:
                values = [v.strip() for v in values]
                where = f"{path}, line {lines.line_num}"
                if not any(values) or values == names:
                    continue
                if len(values) != len(names):
                    self.fault(SourceError(f"{where}: {len(values)} fields, must be {len(names)} ({', '.join(names)}); "
                                           "mend or remove the line"))
                    continue
                yield where, dict(zip(names, values, strict=True))
        except csv.Error as error:
            raise SourceError(f"{path}, line {lines.line_num}: {error}; mend the line or fetch the file again") from error

    def entries(self, name: str, inside: str = "") -> Iterator[tuple[str, dict]]:
        """(where, entry) of a JSON list of objects, or of the object of objects `inside`; its place or name is the entry's "key"."""
        path, text = self.text(name)
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise SourceError(f"{path}, line {error.lineno}, column {error.colno}: malformed JSON ({error.msg}); "
                              "mend it there or fetch the file again") from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path}: cannot be read as JSON ({error}); fetch the file again") from error
        value = value.get(inside) if inside and isinstance(value, dict) else value
        if not isinstance(value, dict if inside else list):
            wanted = f"an object with an object '{inside}'" if inside else "a list of records"
            raise SourceError(f"{path}: holds a {type(value).__name__}; it must be {wanted}")
        for key, entry in value.items() if inside else enumerate(value):
            if isinstance(entry, dict):
                yield f"{path}, record {key}", {**entry, "key": key}
            else:
                self.fault(SourceError(f"{path}, record {key}: is a {type(entry).__name__}; it must be an object with fields"))

    # ------------------------------------------------------------ media

    def media(self, suffixes: Sequence[str], stem: str, within: str = "") -> Path | None:
        """The file of this stem with the first of the suffixes that occurs, in a folder called `within` if one is named."""
        found = [p for p in self._stems.get(stem, ()) if not within or within in p.relative_to(self.root).parts[:-1]]
        for suffix in suffixes:
            same = [p for p in found if p.suffix.lower() == suffix]
            if len(same) > 1:
                raise SourceError(f"{same[0]} and {same[1]}: two files of one name; keep the one that is meant under {self.root}")
            if same:
                return same[0]
        return None

    def clip(self, *stems: str, within: str = "", folder: str = "") -> tuple[dict[str, str], dict[str, Path]]:
        """Fields and files of the clip called by the first of these stems that is there.

        Args:
            within: a folder of the raw set in which it must lie.
            folder: the folder that it gets under `video/` and `audio/`.

        Raises:
            LeftOut: there is no such video.  A clip without a sound file has its sound in the video.
        """
        video = next(filter(None, (self.media(VIDEO, stem, within) for stem in stems)), None)
        if video is None:
            raise LeftOut("no video file", stems[0])
        audio = self.media(AUDIO, video.stem, within)
        prefix = f"{folder}/" if folder else ""
        fields = {"video_path": f"{prefix}{video.name}",
                  "audio_path": f"{prefix}{audio.name if audio else f'{video.stem}.wav'}"}
        return fields, {f"video/{fields['video_path']}": video, f"audio/{fields['audio_path']}": audio or video}


# ---------------------------------------------------------------- values

def one_of(where: str, value: str, allowed: Sequence[str], what: str = "label") -> str:
    """The value, if it is allowed."""
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    raise SourceError(f"{where}: {what} {str(value)!r:.80} is not among the set's {len(allowed)}"
                      + (f"; did it mean {near[0]!r}?" if near else f" ({', '.join(allowed):.200}); correct it"))


def whole(where: str, name: str, value: Any) -> int:
    """A whole number of at least 0."""
    try:
        number = float(value)
        if number >= 0 and number == int(number):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise SourceError(f"{where}, field '{name}': {value!r:.80} is no whole number of at least 0; correct it")


def span(where: str, start: Any, end: Any, last: int = 10) -> tuple[int, int]:
    """Whole seconds [start, end) within a clip of `last` seconds; an event of no length is left out, as AVE has a few."""
    start, end = whole(where, "start", start), whole(where, "end", end)
    if start == end:
        raise LeftOut("an event of no length", f"{start} to {end}")
    if not start < end <= last:
        raise SourceError(f"{where}: seconds {start} to {end} must be 0 <= start < end <= {last}; correct them")
    return start, end


def need(where: str, entry: dict, name: str, kind: type | tuple[type, ...] = str) -> Any:
    """A field of a JSON object, of this type and not empty."""
    value = entry.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        fault = f"is {value!r:.80}" if name in entry else "is missing"
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise SourceError(f"{where}, field '{name}': {fault}; give a {wanted}")
    return value


def plain(where: str, name: str, value: str) -> str:
    """A value that is to be part of a path: a name without slashes."""
    if not value or value in (".", "..") or set(value) & set("/\\\0"):
        raise SourceError(f"{where}, field '{name}': {value!r:.80} is no file name; correct it")
    return value
