"""Records of the AV-UIE v2 layout, read and checked, and their media decoded.

A record is the published JSON object as it is, with three keys added: ``id`` (unique in the slot), ``media`` (the
prompt's media in order, their paths resolved) and, for slots scored on masks, ``mask`` (path of the true one; where
nothing is to be found, no file lies there).  The same code reads a generated tree and the real one.

The media lie beside the records, or under the folder that ``<root>/root.json`` names: a data root may hold checked
record lists alone (:mod:`crab.study.build`) while hundreds of gigabytes stay where they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np

from crab import tasks
from crab.data import media
from crab.data.files import read_json, write_json
from crab.tasks.registry import MEDIA, describe, wrong_type

ADDED = ("id", "media", "mask")
ROOT = "root.json"  # in a data root: names the folder under which its media lie, where that is another


class RecordError(ValueError):
    """Records that cannot be used: the message names the file, the record, the field and the mend.

    Attributes:
        kind: what is wrong, one of `crab.data.findings.PROBLEMS`.
        words: the message without the names of file and record.
    """

    def __init__(self, where: str, words: str = "", kind: str = "field"):
        super().__init__(f"{where}: {words}" if words else where)
        self.kind, self.words = kind, words or where


def read(root: str | os.PathLike, slot: str, split: str) -> list[dict[str, Any]]:
    """The records of a slot's split, in file order, each with ``id`` and ``media`` (and ``mask``) added.

    ``media`` is a list of :class:`crab.tasks.MediaItem` with paths that start with `root`, or with the folder that
    its ``root.json`` names; media files are not touched before :func:`load`.

    Raises:
        ValueError: unknown slot, or no such split of it.
        RecordError: no file, malformed JSON, a record that lacks a field or gives one of another type or a path
            outside its folder, an id that occurs twice, media that lie in a folder that is not there.
    """
    slot = tasks.get_slot(slot)
    path = Path(root) / tasks.json_path(slot, split)
    folder = media_root(root)
    out, seen = [], {}
    for index, raw in enumerate(parse(path)):
        where = f"{path}: record {index}"
        record = check(where, slot, split, index, raw)
        if record["id"] in seen:
            raise RecordError(where, twice(record["id"], seen[record["id"]]), "id twice")
        seen[record["id"]] = index
        record["media"] = [item._replace(path=str(folder / item.path)) for item in record["media"]]
        if "mask" in record:
            record["mask"] = str(folder / record["mask"])
        out.append(record)
    return out


def twice(name: str, index: int) -> str:
    """Words for an id that an earlier record, the one at `index`, has too."""
    return f"field 'id': {name[:80]!r} is also that of record {index}; give every record its own, or none"


def parse(path: str | os.PathLike) -> list[Any]:
    """The list that a file of records holds, its members unchecked; NaN and infinite numbers read as null.

    Raises:
        RecordError: no file, one that is not UTF-8 or not JSON, or not a list; a field that an object gives twice.
    """
    path = Path(path)
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None, parse_float=_finite,
                            object_pairs_hook=_once)
    except FileNotFoundError:
        raise RecordError(str(path), "no such file; run the build stage, or set the data root to the folder that "
                          f"holds {tasks.FOLDER}", "no list") from None
    except OSError as error:
        raise RecordError(str(path), f"cannot be read ({error.strerror or error}); it must be a file you may read",
                          "unreadable list") from None
    except UnicodeDecodeError as error:
        raise RecordError(str(path), f"not UTF-8 at byte {error.start}; save it as UTF-8", "unreadable list") from error
    except json.JSONDecodeError as error:
        raise RecordError(str(path), f"malformed JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
                          "mend it there, or build or copy it again", "unreadable list") from error
    except RecursionError as error:
        raise RecordError(str(path), "nested too deep; it must be a flat list of records", "unreadable list") from error
    except _Twice as error:
        raise RecordError(str(path), str(error), "unreadable list") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise RecordError(str(path), f"holds a number that cannot be read ({error}); mend it", "unreadable list") from error
    if not isinstance(loaded, list):
        raise RecordError(str(path), f"holds a {type(loaded).__name__}; it must be a list of records", "unreadable list")
    return loaded


class _Twice(ValueError):
    """A field that an object gives twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of which Python would keep the last of two fields of one name, silently."""
    made = dict(pairs)
    if len(made) < len(pairs):
        name = next(name for place, (name, _) in enumerate(pairs) if any(name == other for other, _ in pairs[:place]))
        values = " and ".join(repr(value)[:80] for other, value in pairs if other == name)
        about = ", ".join(f"{other!r} {value!r}"[:80] for other, value in pairs[:2])
        raise _Twice(f"field {name[:80]!r} stands twice in one record ({about}, ...), as {values}; keep one of them")
    return made


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def check(where: str, slot: tasks.Slot, split: str, index: int, raw: Any) -> dict[str, Any]:
    """One member of a list as a record: ``id``, ``media`` and ``mask`` added, their paths relative to the root.

    Args:
        where: file and place, for the message.
        index: its place in the list.

    Raises:
        RecordError: it is no object, lacks a field, or has one of another type or a path outside its folder.
    """
    if not isinstance(raw, dict):
        raise RecordError(where, f"is a {type(raw).__name__}; it must be an object with fields")
    fields = slot.fields(split)
    for name in (*fields, *(("id",) if "id" in raw else ())):
        if name not in raw:
            raise RecordError(where, f"no field '{name}'; records of {slot.name}/{split} need {', '.join(fields)}")
        if raw[name] is None:
            raise RecordError(where, f"field '{name}': is null; give its value")
        if (wrong := wrong_type(name, raw[name])) and name not in _paths(slot):  # a path's words say more
            raise RecordError(where, f"field '{name}': {wrong}")
    for name in ("media", "mask"):
        if name in raw:
            raise RecordError(where, f"field '{name}': is a name this reader uses itself; rename it")
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RecordError(where, "holds half a character (a lone surrogate); write the text as whole characters") from None
    except RecursionError:
        raise RecordError(where, "nested too deep; give plain fields") from None
    record = dict(raw)
    record["id"] = tasks.sample_id(slot, record, index, split)
    try:
        record["media"] = tasks.media_paths(slot, record)
        if slot.masks:
            record["mask"] = tasks.mask_path(slot, raw)
    except ValueError as error:
        raise RecordError(where, said(error, slot, record), "path") from error
    return record


def said(error: Exception, slot: tasks.Slot, record: dict[str, Any]) -> str:
    """Words of an error of `crab.tasks` without the record's name, which stands elsewhere, but with a mend."""
    words = str(error).removeprefix(f"{describe(slot, record)}: ") or type(error).__name__
    return words if "; " in words else f"{words}; correct the record"


def _paths(slot: tasks.Slot) -> set[str]:
    return {name for _, names in MEDIA[slot.media] for name in names}


def media_root(root: str | os.PathLike) -> Path:
    """The folder under which the media of a data root lie: `root`, or the one that its ``root.json`` names.

    Raises:
        RecordError: the file is not as :func:`write_root` leaves it, or its folder is not there.
    """
    path = Path(root) / ROOT
    if not path.is_file():
        return Path(root)
    try:
        loaded = read_json(path)
    except ValueError as error:
        raise RecordError(str(error)) from None
    named = loaded.get("media_root") if isinstance(loaded, dict) else None
    if not isinstance(named, str) or not (Path(named) / tasks.FOLDER).is_dir():
        raise RecordError(str(path), f"the media's folder {named!r} is not there, or holds no {tasks.FOLDER}; mount it again, or set "
                          "`root` of the build section in params.yaml to where it is now and run the build stage")
    return Path(named)


def write_root(root: str | os.PathLike, folder: str | os.PathLike, media: str = "") -> None:
    """Note in the data root `root` that its media lie under `folder`, and what they are now (a digest)."""
    write_json(Path(root) / ROOT, {"media_root": str(Path(folder).resolve()), "media": media})


def load(record: dict[str, Any], frames: int) -> list[tuple[np.ndarray, np.ndarray] | np.ndarray]:
    """Decode the media of a record that :func:`read` gave, in the order in which the prompt shows them.

    Returns, for each: a video as (uint8 [frames, 224, 224, 3], float64 [frames] seconds), an image as uint8
    [224, 224, 3], a sound as float32 [samples] at 16 kHz.  The sound of an image slot is the one second around the
    frame.  Raises MediaError, naming the file.
    """
    out = []
    for item in record["media"]:
        if item.kind == "video":
            out.append(media.read_video(item.path, frames))
        elif item.kind == "image":
            out.append(media.read_image(item.path))
        elif item.second is None:
            out.append(media.read_audio(item.path))
        else:
            out.append(media.read_audio(item.path, item.second, item.second + 1))
    return out


def clip_seconds(path: str | os.PathLike) -> float:
    """How long a clip lasts by the time stamps of its packets, over which :func:`crab.data.media.read_video` spreads frames.

    Raises MediaError for a clip that this cannot read either.
    """
    try:
        with av.open(str(path)) as container:
            return media.span(Path(path), container, container.streams.video[0])[1]
    except (av.error.FFmpegError, EOFError, IndexError) as error:
        raise media.MediaError(path, f"has no length that can be read ({error})", "copy or build it again") from error


def write(root: str | os.PathLike, slot: str, split: str, records: Iterable[dict[str, Any]], ids: bool = False) -> Path:
    """Write a split's records (without the added keys) to its place under `root`; returns the file.

    Args:
        ids: write ``id`` as well, so that a record keeps its name when others before it are left out.
    """
    path = Path(root) / tasks.json_path(slot, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = (*tasks.get_slot(slot).fields(split), *(("id",) if ids else ()))  # some slots publish an id
    added = [name for name in ADDED if name not in own]
    kept = [{name: value for name, value in record.items() if name not in added} for record in records]
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(kept, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path
