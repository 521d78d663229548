"""A raw data set on disk: its annotation files are read row by row, and its media are found by name.

A *fault* is something that should not be there: a malformed row, an unknown label, two files of one name. It raises an
error that names file, line and fix, or, with ``faults="skip-and-record"``, its row is left out. What is *left out*
(missing media, clips without sound, labels that say too little) is recorded by reason, with the place of each row.
"""

import csv
import difflib
import io
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

FAULTS = ("error", "skip-and-record")
VIDEO = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".flv")
AUDIO = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg")


class SourceError(ValueError):
    """A fault of a raw data set."""

    def __init__(self, place: object, fault: str, fix: str) -> None:
        super().__init__(f"{place}: {fault}; {fix}")


class LeftOut(Exception):
    """Raised with a reason, and what it is about, for a row that cannot become a record."""


class Row(dict[str, Any]):
    """The fields of one row, and its place (file and line, or record) for messages."""

    def __init__(self, place: str, fields: Any) -> None:
        super().__init__(fields)
        self.place = place

    def fail(self, field: str, fault: str, fix: str = "correct it") -> NoReturn:
        raise SourceError(f"{self.place}, field '{field}'", fault, fix)

    def need(self, field: str, kind: type | tuple[type, ...] = str) -> Any:
        """A field of this type that is not empty."""
        value = self.get(field)
        if not isinstance(value, kind) or isinstance(value, bool) or value == "":
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            self.fail(field, f"is {value!r:.80}" if field in self else "is missing", f"give a {wanted}")
        return value

    def one_of(self, field: str, allowed: Collection[str]) -> str:
        """A field whose value is one of these."""
        value = str(self.get(field, ""))
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, n=1)
            fix = f"did it mean {near[0]!r}?" if near else f"give one of {', '.join(allowed):.200}"
            self.fail(field, f"{value!r:.80} is not among the set's {len(allowed)}", fix)
        return value

    def whole(self, field: str) -> int:
        """A field that is a whole number of at least 0."""
        try:
            number = float(self[field])
            if number >= 0 and number == int(number):
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
        self.fail(field, f"{self[field]!r:.80} is not a whole number of at least 0")

    def name(self, field: str) -> str:
        """A field that becomes part of a path: text without slashes, or a number."""
        value = str(self.need(field, (str, int)))
        if value in (".", "..") or set(value) & set("/\\\0"):
            self.fail(field, f"{value!r:.80} is not a file name")
        return value


class Draft(NamedTuple):
    """A record before its answer is written and its media are in place."""

    place: str  #: of its row
    record: dict[str, Any]  #: the published fields, without the answer
    truth: Any  #: the answer, of the type that :func:`crab.tasks.parse` returns
    chain: str  #: statements before the answer; the labels support each of them
    labels: Sequence[str] = ()  #: that the chain may name
    others: Sequence[str] = ()  #: that it may not name, besides those of other records (wrong choices of a question)
    #: Path under the slot's media folder -> file of the raw set. If a sound's file is a video, its sound is extracted.
    files: dict[str, Path] = {}


class Raw:
    """A raw data set: annotation files and media anywhere below the folder `root`. `seed` is for the pairs of a2v, v2a.

    What is left out stands in ``left_out``: reason -> the places of the rows.
    """

    def __init__(self, root: str | os.PathLike, faults: str = "error", seed: int = 0) -> None:
        self.root, self.faults, self.seed = Path(root), faults, seed
        self.left_out: dict[str, list[str]] = {}
        if faults not in FAULTS:
            raise ValueError(f"faults is {faults!r}; give one of {', '.join(FAULTS)}")
        if not self.root.is_dir():
            raise SourceError(self.root, "no such folder", "give the one that holds the raw data set")
        self.paths: list[Path] = []  #: all files that are not hidden
        self._stems: dict[str, list[Path]] = {}
        walked = {os.path.realpath(self.root)}
        for folder, names, files in os.walk(self.root, followlinks=True):
            below = {n: os.path.realpath(os.path.join(folder, n)) for n in sorted(names) if not n.startswith(".")}
            # links may form a loop
            names[:] = [n for n, real in below.items() if real not in walked and not walked.add(real)]
            self.paths += (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        for path in self.paths:
            self._stems.setdefault(path.stem, []).append(path)

    def leave(self, reason: str, place: str) -> None:
        self.left_out.setdefault(reason, []).append(place)

    def fault(self, error: SourceError) -> None:
        """Raise the error, or record it."""
        if self.faults == "error":
            raise error
        self.leave("fault", str(error))

    @contextmanager
    def reading(self, row: Row | Draft) -> Iterator[None]:
        """Leave the row out if the body raises LeftOut, or treat it as a fault if it raises SourceError."""
        try:
            yield
        except LeftOut as left:
            self.leave(left.args[0], f"{row.place}: {left.args[1]}")
        except SourceError as error:
            self.fault(error)

    def has(self, name: str) -> bool:
        return any(path.name == name for path in self._stems.get(Path(name).stem, ()))

    def file(self, name: str) -> Path:
        """The annotation file of this name that lies highest."""
        paths = [path for path in self._stems.get(Path(name).stem, ()) if path.name == name]
        paths.sort(key=lambda path: (len(path.parts), path))
        if not paths:
            raise SourceError(self.root, f"no {name} in it or below", "put the data set's own file there")
        if len(paths) > 1 and len(paths[0].parts) == len(paths[1].parts):
            raise SourceError(f"{paths[0]} and {paths[1]}", "which is meant?", f"keep one of them under {self.root}")
        return paths[0]

    def text(self, name: str) -> tuple[Path, str]:
        """An annotation file and its text."""
        path = self.file(name)
        try:
            return path, path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise SourceError(f"{path}, line {line}", f"not UTF-8 at byte {error.start}", "save it as UTF-8") from error

    def rows(self, name: str, columns: Sequence[str], delimiter: str = ",", header: bool = True) -> Iterator[Row]:
        """The rows of a file of delimited fields. Quotes have a meaning only in comma-separated files.

        A delimiter at the end of a row is passed over, as in some copies of AVE's lists.

        Args:
            columns: those it must have or, without a header, all of them in order. Lines that repeat them are skipped.
        """
        path, text = self.text(name)
        quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
        try:
            names = [name.strip() for name in next(lines, [])] if header else list(columns)
            for absent in (column for column in columns if column not in names):
                fix = f"it needs {', '.join(columns)}, separated by {delimiter!r}"
                raise SourceError(f"{path}, line 1", f"no column '{absent}' in its header", fix)
            for values in ([value.strip() for value in line] for line in lines):
                place = f"{path}, line {lines.line_num}"
                if len(values) == len(names) + 1 and not values[-1]:
                    values.pop()
                if len(values) == len(names) and any(values) and values != names:
                    yield Row(place, zip(names, values, strict=True))
                elif any(values) and values != names:
                    fault = f"{len(values)} fields, must be {len(names)} ({', '.join(names)})"
                    self.fault(SourceError(place, fault, "fix or remove the line"))
        except csv.Error as error:
            fix = "fix the line or download the file again"
            raise SourceError(f"{path}, line {lines.line_num}", str(error), fix) from error

    def entries(self, name: str, inside: str = "") -> Iterator[Row]:
        """The objects of a JSON list, or of the object `inside`. The field "key" is the index or name of each."""
        path, text = self.text(name)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:  # a JSON error names line and column
            raise SourceError(path, f"malformed JSON ({error})", "fix it there or download the file again") from error
        value = value.get(inside) if inside and isinstance(value, dict) else value
        if not isinstance(value, dict if inside else list):
            wanted = f"an object with an object '{inside}'" if inside else "a list of records"
            raise SourceError(path, f"holds a {type(value).__name__}", f"it must be {wanted}")
        for key, entry in value.items() if inside else enumerate(value):
            if isinstance(entry, dict):
                yield Row(f"{path}, record {key}", {**entry, "key": key})
            else:
                fault, fix = f"is a {type(entry).__name__}", "it must be an object with fields"
                self.fault(SourceError(f"{path}, record {key}", fault, fix))

    def media(self, suffixes: Sequence[str], stem: str, within: str = "") -> Path | None:
        """The file of this stem with the first suffix that occurs, in a folder named `within` if that is given."""
        paths = [p for p in self._stems.get(stem, ()) if not within or within in p.relative_to(self.root).parts[:-1]]
        paths = [path for suffix in suffixes for path in paths if path.suffix.lower() == suffix]
        if len(paths) > 1 and paths[0].suffix.lower() == paths[1].suffix.lower():
            fix = f"keep the right one under {self.root}"
            raise SourceError(f"{paths[0]} and {paths[1]}", "two files of one name", fix)
        return paths[0] if paths else None

    def clip(self, draft: Draft, *stems: str, within: str = "", folder: str = "") -> Draft:
        """The draft with the fields and files of the first of these stems that has a video; if none has, it is LeftOut.

        A clip without a sound file has its sound in the video. The video must lie in a folder named `within`, if that
        is given; `folder` is the folder that it gets under ``video/`` and ``audio/``.
        """
        video = next(filter(None, (self.media(VIDEO, stem, within) for stem in stems)), None)
        if video is None:
            raise LeftOut("no video file", stems[0])
        audio = self.media(AUDIO, video.stem, within)
        prefix = f"{folder}/" if folder else ""
        shown, sound = f"{prefix}{video.name}", f"{prefix}{audio.name if audio else f'{video.stem}.wav'}"
        files = {f"video/{shown}": video, f"audio/{sound}": audio or video}
        return draft._replace(record={"video_path": shown, "audio_path": sound, **draft.record}, files=files)
