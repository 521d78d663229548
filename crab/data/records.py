"""Lists of records of the AV-UIE v2 layout, read and checked, their media decoded, and the manifest of a data root.

A record is the published JSON object with added keys: ``id`` (unique in the slot), ``media`` (in the prompt's order)
and, for slots that are scored on masks, ``mask`` (path of the true one; if the thing is not there, no such file
exists). The same code reads a generated tree and the real one.

The media lie beside the records, or under the folder that ``<root>/root.json`` names: a data root may hold only checked
lists (:mod:`crab.samples.build`) while hundreds of gigabytes stay where they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crab import tasks
from crab.core.files import atomic_file, file_digest, read_json, write_json
from crab.data import media
from crab.tasks.fields import describe, wrong_type
from crab.tasks.registry import MEDIA

ADDED = ("id", "media", "mask")
ROOT = "root.json"  # in a data root: names the folder of the media, if they lie elsewhere
MANIFEST = "manifest.json"  # in a data root: number and digest of the records of each list
_READ = 256 << 20  # bytes; media of one list that lie elsewhere are read for the manifest up to this size


class RecordError(ValueError):
    """Records that cannot be used. The message names the file, the record, the field and how to fix it.

    Attributes:
        kind: the problem, one of `crab.data.findings.PROBLEMS`.
        words: the message without the names of file and record.
    """

    def __init__(self, place: str, words: str = "", kind: str = "field"):
        super().__init__(f"{place}: {words}" if words else place)
        self.kind, self.words = kind, words or place


# ---------------------------------------------------------------- reading


def read(root: str | os.PathLike, slot: str, split: str) -> list[dict[str, Any]]:
    """The records of a slot's split, in file order, with ``id`` and ``media`` (and ``mask``) added.

    ``media`` is a list of :class:`crab.tasks.MediaItem`. Their paths start with ``root``, or with the folder that its
    ``root.json`` names. Media files are not opened.

    Raises:
        ValueError: unknown slot, or it has no such split.
        RecordError: as for `parse` and `check`; an id that occurs twice; a folder of media that is not there.
    """
    folder = media_root(root)
    records = list(_relative(root, tasks.get_slot(slot), split))
    for record in records:
        record["media"] = [item._replace(path=str(folder / item.path)) for item in record["media"]]
        if "mask" in record:
            record["mask"] = str(folder / record["mask"])
    return records


def _relative(root: str | os.PathLike, slot: tasks.Slot, split: str) -> Iterator[dict[str, Any]]:
    """The records of `read`, with paths relative to the root of the media."""
    path, seen, folder = Path(root) / tasks.json_path(slot, split), {}, media_root(root)
    for index, raw in enumerate(parse(path)):
        place = f"{path}: record {index}"
        record = check(place, slot, split, index, raw, folder)
        if record["id"] in seen:
            raise RecordError(place, twice(record["id"], seen[record["id"]]), "id twice")
        seen[record["id"]] = index
        yield record


def twice(name: str, index: int) -> str:
    """Words for an id that the earlier record at ``index`` has too."""
    return f"field 'id': {name[:80]!r} is also that of record {index}; give every record its own, or none"


def parse(path: str | os.PathLike) -> list[Any]:
    """The list in a file of records, its members unchecked. NaN and infinite numbers are read as null.

    The file is a JSON list, or has one JSON object per line (JSON lines). It may begin with a byte order mark.

    RecordError if there is no file, if it is not UTF-8, JSON or a list, or if an object has the same field twice.
    """
    problem, first = "unreadable list", 1
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        try:
            content = _loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data" or not text.lstrip().startswith("{"):
                raise
            content = []
            for first, line in enumerate(text.split("\n"), 1):  # noqa: B007  the error below names the line
                content += [_loads(line)] if line.strip() else []
        if isinstance(content, list):
            return content
        words = f"holds a {type(content).__name__}; it must be a list of records, [...], or one record per line"
    except FileNotFoundError:
        problem = "no list"
        words = f"no such file; run the build stage, or set the data root to the folder that holds {tasks.FOLDER}"
    except OSError as error:
        words = f"cannot be read ({error.strerror or error}); it must be a file that you may read"
    except UnicodeDecodeError as error:
        words = f"is not UTF-8: byte {error.start} cannot be read; save it as UTF-8"
    except json.JSONDecodeError as error:
        position = f"line {first + error.lineno - 1}, column {error.colno}"
        words = f"malformed JSON at {position} ({error.msg}); correct it there, or build or copy it again"
    except RecursionError:
        words = "nested too deep; it must be a flat list of records"
    except _Twice as error:
        words = str(error)
    except ValueError as error:  # a whole number of thousands of digits
        words = f"holds a number that cannot be read ({error}); correct it"
    raise RecordError(str(path), words, problem) from None


def _loads(text: str) -> Any:
    return json.loads(
        text,
        parse_constant=lambda _: None,
        parse_float=lambda number: value if math.isfinite(value := float(number)) else None,
        object_pairs_hook=_once,
    )


class _Twice(ValueError):
    """An object that has the same field twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of two fields of one name, Python would keep the last without a word."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        values = " and ".join(repr(value)[:80] for other, value in pairs if other == name)
        about = ", ".join(f"{other!r} {value!r}"[:80] for other, value in pairs[:2])
        raise _Twice(f"field {name[:80]!r} stands twice in one record ({about}, ...), as {values}; keep one of them")
    return record


def check(
    place: str, slot: tasks.Slot, split: str, index: int, raw: Any, folder: str | os.PathLike = ""
) -> dict[str, Any]:
    """Check the member of a list at ``index``, and add ``id``, ``media`` and ``mask``, with paths relative to the root.

    Args:
        place: names the record in messages.
        folder: the root of the media. If a slot shares the media of another slot, they may also lie under its own name.

    Raises:
        RecordError: it is not an object, lacks a field, or has a wrong type or a path outside its folder.
    """
    if not isinstance(raw, dict):
        raise RecordError(place, f"is a {type(raw).__name__}; it must be an object with fields")
    fields, optional = slot.fields(split), slot.optional(split)
    paths = {name for _, names in MEDIA[slot.media] for name in names}
    for name in (*fields, *(("id",) if "id" in raw else ())):
        if name in optional and raw.get(name) is None:
            continue
        if name not in raw:
            needed = ", ".join(name for name in fields if name not in optional)
            raise RecordError(place, f"no field '{name}'; records of {slot.name}/{split} need {needed}")
        if raw[name] is None:
            raise RecordError(place, f"field '{name}': is null; give its value")
        if name not in paths and (words := wrong_type(name, raw[name])):  # a wrong path has better words below
            raise RecordError(place, f"field '{name}': {words}")
    for name in ("media", "mask"):
        if name in raw:
            raise RecordError(place, f"field '{name}': this reader uses the name itself; rename the field")
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        words = "holds half a character (a lone surrogate); write the text as whole characters"
        raise RecordError(place, words) from None
    except RecursionError:
        raise RecordError(place, "nested too deep; give plain fields") from None
    record = {name: value for name, value in raw.items() if name not in optional or value is not None}
    record["id"] = tasks.sample_id(slot, raw, index, split)
    try:
        record["media"] = [_placed(slot, item, folder) for item in tasks.media_paths(slot, record)]
        if slot.masks:
            record["mask"] = tasks.mask_path(slot, raw)
    except ValueError as error:
        raise RecordError(place, words_of(error, slot, record), "path") from error
    return record


def _placed(slot: tasks.Slot, item: tasks.MediaItem, folder: str | os.PathLike) -> tasks.MediaItem:
    """The medium. If it is not in the folder of the shared media, but under the slot's own name, its path is there."""
    shared, own = (f"{tasks.FOLDER}/{name}/" for name in (slot.media_slot, slot.name))
    path = own + item.path.removeprefix(shared)
    moved = folder and own != shared and not os.path.exists(os.path.join(folder, item.path))
    return item._replace(path=path) if moved and os.path.exists(os.path.join(folder, path)) else item


def words_of(error: Exception, slot: tasks.Slot, record: dict[str, Any]) -> str:
    """The words of an error of `crab.tasks`, without the name of the record, and always with a fix."""
    words = str(error).removeprefix(f"{describe(slot, record)}: ") or type(error).__name__
    return words if "; " in words else f"{words}; correct the record"


def load(record: dict[str, Any], frames: int) -> list[tuple[np.ndarray, np.ndarray] | np.ndarray]:
    """Decode the media of a record that `read` returned, in the order of the prompt.

    Returns:
        For a video (uint8 [frames, 224, 224, 3], float64 [frames] seconds), for an image uint8 [224, 224, 3], for a
        sound float32 [samples] at 16 kHz. The sound of an image slot is the one second around the frame.

    Raises:
        MediaError: naming the file.
    """
    loaded = []
    for item in record["media"]:
        if item.kind == "video":
            loaded.append(media.read_video(item.path, frames))
        elif item.kind == "image":
            loaded.append(media.read_image(item.path))
        else:
            loaded.append(media.read_audio(item.path, item.second, None if item.second is None else item.second + 1))
    return loaded


# ---------------------------------------------------------------- the data root


def write(root: str | os.PathLike, slot: str, split: str, records: Iterable[dict[str, Any]], ids: bool = False) -> Path:
    """Write the records of a split, without the added keys, to their place under ``root``. Returns the file.

    With ``ids`` it also writes ``id``, so that a record keeps its name if others before it are left out.
    """
    path = Path(root) / tasks.json_path(slot, split)
    published = (*tasks.get_slot(slot).fields(split), *(("id",) if ids else ()))  # some slots publish an id
    added = [name for name in ADDED if name not in published]
    rows = [{name: value for name, value in record.items() if name not in added} for record in records]
    text = json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
    return path


def media_root(root: str | os.PathLike) -> Path:
    """The folder under which the media of a data root lie: ``root``, or the one that its ``root.json`` names.

    RecordError if that is malformed, or if the folder is not there.
    """
    path = Path(root) / ROOT
    if not path.is_file():
        return Path(root)
    try:
        content = read_json(path)
    except ValueError as error:
        raise RecordError(str(error)) from None
    folder = content.get("media_root") if isinstance(content, dict) else None
    if not isinstance(folder, str) or not (Path(folder) / tasks.FOLDER).is_dir():
        fault = f"the folder of the media, {folder!r}, is not there, or holds no {tasks.FOLDER}"
        fix = "set `root` of the build section in params.yaml to its new place and run the build stage"
        raise RecordError(str(path), f"{fault}; mount it again, or {fix}")
    return Path(folder)


def write_root(root: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Note in the data root ``root`` that its media lie under ``folder``."""
    write_json(Path(root) / ROOT, {"media_root": str(Path(folder).resolve())})


def write_manifest(root: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Write ``<root>/manifest.json``: what `read_manifest` returns, for each list of records under ``root``.

    A digest covers the records in order, as `read` returns them but with relative paths, and the content of their media
    and masks. So it is the same on every machine. Only media that lie elsewhere and are too large to be read count by
    size and time of change. RecordError as for `read`.
    """
    manifest, folder = {}, media_root(root)
    for slot, split in [(entry, split) for entry in tasks.SLOTS.values() for split in entry.splits]:
        if not (Path(root) / tasks.json_path(slot, split)).is_file():
            continue
        rows = list(_relative(root, slot, split))
        files = [[*(item.path for item in row["media"]), *([row["mask"]] if slot.masks else [])] for row in rows]
        paths = [path for path in {path for each in files for path in each} if (folder / path).is_file()]
        stats = {path: (folder / path).stat() for path in paths}
        if folder == Path(root) or sum(stat.st_size for stat in stats.values()) <= _READ:
            marks = {path: file_digest(folder / path) for path in paths}
        else:
            marks = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
        digest = hashlib.sha256()
        for row, each in zip(rows, files, strict=True):
            digest.update(json.dumps([row, [marks.get(path) for path in each]], sort_keys=True).encode())
        manifest[f"{slot.name}/{split}"] = {"records": len(rows), "digest": digest.hexdigest()[:16]}
    write_json(Path(root) / MANIFEST, manifest)
    return manifest


def read_manifest(root: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """``{"slot/split": {"records": number, "digest": 16 hexadecimal digits}}`` of a data root.

    ValueError if there is no manifest, or if it is malformed.
    """
    manifest = read_json(Path(root) / MANIFEST)
    entries = manifest.values() if isinstance(manifest, dict) else [None]
    if not all(isinstance(entry, dict) and entry.keys() == {"records", "digest"} for entry in entries):
        raise ValueError(f"{Path(root) / MANIFEST}: is not a manifest of records; run the build stage (dvc repro)")
    return manifest
