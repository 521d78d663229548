"""What the fields of a record hold: types, numbers, and the paths of its files."""

import ast
import json
import numbers
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from .registry import FOLDER, MEDIA, Slot, get_slot

Record = Mapping[str, Any]

#: The JSON type of a field. A field that is not named here is text. Some data sets give a list as text.
FIELD_TYPES = {
    **dict.fromkeys("id vid uid fid filename video_name video_id question_id".split(), "text or a number"),
    **dict.fromkeys("start_time end_time frame_idx idx answer correct_video correct_audio".split(), "text or a number"),
    **dict.fromkeys("multi_choice top_left bottom_right type event".split(), "text or a list"),
}
_TYPES = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object", bool: "true or false"}


def wrong_type(field: str, value: Any) -> str | None:
    """The problem with the type of a field's value and how to fix it; None if the type is right."""
    allowed = FIELD_TYPES.get(field, "text")
    actual = "null" if value is None else _TYPES.get(type(value), type(value).__name__)
    return None if actual in allowed.split(" or ") else f"is {actual}; give {allowed}"


def number(value: Any) -> float:
    """The number in a field, as 2.5 or "2.5"; -1 if there is none, or if it is below 0."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}(\.[0-9]*)?\s*", value):
        return float(value)
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if real and 0 <= value < 1e9 else -1.0


def whole(value: Any) -> int:
    """The whole number in a field, as 2, 2.0, "2" or "2.0"; -1 if there is none, as in 2.7."""
    value = number(value)
    return int(value) if value % 1 == 0 else -1


def listed(value: Any) -> Any:
    """The list in a field, given as such, or as text in the form of JSON or of Python; else the value as it is."""
    text = value.strip() if isinstance(value, str) and len(value) < 10_000 else ""
    for read in (json.loads, ast.literal_eval) if text.startswith(("[", "(")) else ():
        try:
            return list(read(text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return value


def describe(slot: Slot, record: Record) -> str:
    """The name of a record in an error message."""
    for field in ("id", "question_id", "uid", "vid", "video_path", "visual_path", "image_path"):
        if field in record:
            return f"slot {slot.name}, record {field}={str(record[field])[:80]}"
    return f"slot {slot.name}, record without id"


def field_error(slot: Slot, record: Record, field: str, fix: str) -> ValueError:
    return ValueError(f"{describe(slot, record)}: field '{field}' is {record[field]!r:.80}; {fix}")


def required(slot: Slot, record: Record, field: str) -> Any:
    """A record's field. ValueError that names the field if it is missing."""
    if field not in record:
        raise ValueError(f"{describe(slot, record)}: no field '{field}'")
    return record[field]


def numbered(record: Record) -> str | None:
    """The field with the number of an image slot's frame, which is the second of its sound; None if there is none."""
    return next((name for name in ("frame_idx", "idx") if name in record), None)


class MediaItem(NamedTuple):
    kind: str  # video, image or audio
    path: str  # POSIX path under the data root
    field: str  # the record's field with this path
    second: int | None = None  # the second of the clip that is heard, for the sound of an image slot


def json_path(slot: str | Slot, split: str) -> str:
    """POSIX path under the data root of a split's list of records."""
    slot = get_slot(slot)
    slot.fields(split)  # an unknown split is an error
    return f"{FOLDER}/{slot.name}/{split}.json"


def media_paths(slot: str | Slot, record: Record) -> list[MediaItem]:
    """The media of a record, in the order of the prompt.

    Media of video slots lie in ``AVUIE_2/<slot>/video`` and ``.../audio``, of image slots in ``AVUIE_2/<media_slot>``.
    ValueError if a path is missing, is no text, is absolute, or leaves its folder.
    """
    slot = get_slot(slot)
    frame = slot.media == "image_audio"
    items = []
    for kind, names in MEDIA[slot.media]:
        field = next((name for name in names if name in record), None)
        if field is None:
            fields = " or ".join(names)
            raise ValueError(f"{describe(slot, record)}: no field '{fields}'; it must name the {kind} file")
        value = record[field]
        if not isinstance(value, str) or not value or "\\" in value or "\0" in value:
            raise field_error(slot, record, field, "give a relative POSIX path")
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            place = f"field '{field}' leaves its folder: {value!r:.200}"
            raise ValueError(f"{describe(slot, record)}: {place}; give a path below it")
        folder = f"{FOLDER}/{slot.media_slot}" + ("" if frame else f"/{kind}")
        items.append(MediaItem(kind, f"{folder}/{path}", field))
    if frame:
        field = numbered(record)  # train records of s4 have none; their frames are named by the number
        second = whole(record[field] if field else PurePosixPath(items[0].path).stem)
        fix = "give the frame's number, from 0, as 'frame_idx', or name the frame by it"
        if second < 0:
            problem = f"field '{field}' is {record[field]!r:.80}" if field else "no second for its sound"
            raise ValueError(f"{describe(slot, record)}: {problem}; {fix}")
        items[1] = items[1]._replace(second=second)
    return items


def mask_path(slot: str | Slot, record: Record) -> str:
    """POSIX path under the data root of a record's true mask.

    The mask of ``<clip>/frames/0.jpg`` is ``<clip>/labels_rgb/0.png``. In Ref-AVS, the mask of the thing with number
    `fid` in ``media/<clip>/frames/0.jpg`` is ``gt_mask/<clip>/fid_1/00000.png``; the null split has no masks.
    """
    slot = get_slot(slot)
    frame = PurePosixPath(media_paths(slot, record)[0].path)
    clip, referring = frame.parent.parent, slot.kind == "referring"
    number = str(required(slot, record, "fid")) if referring else "0"
    if not number.isdigit():
        number = str(whole(number))  # 1.0, as tables write a whole number
    if not (number.isascii() and number.isdigit()):
        raise field_error(slot, record, "fid", "give the number of the thing")
    if frame.parent.name != "frames" or (referring and clip.parent.name != "media"):
        form = "media/<clip>/frames/<number>.jpg" if referring else "<clip>/frames/<number>.jpg"
        fix = f"'{str(frame)[-200:]}' must be {form}, so that its mask is found"
        raise ValueError(f"{describe(slot, record)}: {fix}")
    if referring:
        return str(clip.parent.parent / "gt_mask" / clip.name / f"fid_{number}" / f"{frame.stem:0>5}.png")
    return str(clip / "labels_rgb" / f"{frame.stem}.png")
