"""Records of the AV-UIE v2 layout, read and checked, and their media decoded.

A record is the published JSON object as it is, with three keys added: ``id`` (unique in the slot), ``media`` (the
prompt's media in order, their paths resolved) and, for slots scored on masks, ``mask`` (path of the true one; where
nothing is to be found, no file lies there).  The same code reads a generated tree and the real one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from crab import tasks
from crab.data import media

ADDED = ("id", "media", "mask")


class RecordError(ValueError):
    """Records that cannot be used: the message names the file, the record, the field and the mend."""


def read(root: str | os.PathLike, slot: str, split: str) -> list[dict[str, Any]]:
    """The records of a slot's split, in file order, each with ``id`` and ``media`` (and ``mask``) added.

    ``media`` is a list of :class:`crab.tasks.MediaItem` with paths that start with `root`; media files are not
    touched before :func:`load`.

    Raises:
        ValueError: unknown slot, or no such split of it.
        RecordError: no file, malformed JSON, a record that lacks a field or gives a path outside its folder, an id
            that occurs twice.
    """
    slot = tasks.get_slot(slot)
    path = Path(root) / tasks.json_path(slot, split)
    loaded = _json(path)
    if not isinstance(loaded, list):
        raise RecordError(f"{path}: holds a {type(loaded).__name__}; it must be a list of records")
    out, seen = [], {}
    for index, raw in enumerate(loaded):
        where = f"{path}: record {index}"
        record = _checked(where, slot, split, raw)
        record["id"] = tasks.sample_id(slot, record, index, split)
        if record["id"] in seen:
            raise RecordError(f"{where}, field 'id': {record['id']!r} is also that of record {seen[record['id']]}; "
                              "give every record its own, or none")
        seen[record["id"]] = index
        try:
            items = tasks.media_paths(slot, record)
        except ValueError as error:
            raise RecordError(f"{where}: {error}") from error
        record["media"] = [item._replace(path=str(Path(root) / item.path)) for item in items]
        if slot.masks:
            record["mask"] = str(Path(root) / tasks.mask_path(slot, raw))
        out.append(record)
    return out


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file; run the build stage, or set the data root to the folder that "
                          f"holds {tasks.FOLDER}") from None
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}: malformed JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
                          "mend it there, or build or copy it again") from error
    except RecursionError as error:
        raise RecordError(f"{path}: nested too deep; it must be a flat list of records") from error


def _checked(where: str, slot: tasks.Slot, split: str, raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RecordError(f"{where}: is a {type(raw).__name__}; it must be an object with fields")
    for name in slot.fields(split):
        if name not in raw:
            raise RecordError(f"{where}: no field '{name}'; records of {slot.name}/{split} need "
                              f"{', '.join(slot.fields(split))}")
        if raw[name] is None:
            raise RecordError(f"{where}, field '{name}': is null; give its value")
    for name in ("media", "mask"):
        if name in raw:
            raise RecordError(f"{where}, field '{name}': is a name this reader uses itself; rename it")
    return dict(raw)


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


def write(root: str | os.PathLike, slot: str, split: str, records: Iterable[dict[str, Any]]) -> Path:
    """Write a split's records (without the added keys) to its place under `root`; returns the file."""
    path = Path(root) / tasks.json_path(slot, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    added = [name for name in ADDED if name not in tasks.get_slot(slot).fields(split)]  # some slots publish an id
    kept = [{name: value for name, value in record.items() if name not in added} for record in records]
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps(kept, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path
