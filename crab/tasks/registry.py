"""The slots of AV-UIE v2, as data: one entry here is all that a further data set needs.

A *slot* is one data set in one role: where its records and media lie, which fields they have, what
the model is asked, which module of :mod:`crab.tasks` reads and scores its answers. The published
layout is ``<root>/AVUIE_2/<slot>/{train,test}.json`` with media paths relative to that folder.

To add a data set: one :class:`Slot` in :data:`_ENTRIES`. A new *form of answer* (not merely a new
data set) also needs a module, named in :data:`crab.tasks.interface.MODULES`.
"""

from __future__ import annotations

import difflib
import numbers
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Mapping, NamedTuple

FOLDER = "AVUIE_2"
SPLITS = ("train", "test")
PUBLISHED_SAMPLES = 222_000  # of all slots together, "about", as published; by slot see Slot.published

# Media of a prompt in the order in which the published prompts show them: (kind, field or fields).
# Image slots name their frame `image_path` in train records and `visual_path` in test records.
MEDIA: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "video_audio": (("video", ("video_path",)), ("audio", ("audio_path",))),
    "image_audio": (("image", ("image_path", "visual_path")), ("audio", ("audio_path",))),
    "two_videos_audio": (
        ("audio", ("audio_path",)), ("video", ("video1_path",)), ("video", ("video2_path",)),
    ),
    "video_two_audios": (
        ("video", ("video_path",)), ("audio", ("audio1_path",)), ("audio", ("audio2_path",)),
    ),
}


# What a field holds, as types of JSON; every field that is not named here is text. Names and numbers of things are
# either, since the data sets differ in it; so is what a data set gives as a list or as a list's text.
_TEXT, _LIST = (str,), (list,)
_ANY_LABEL = (str, int, float)
FIELD_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "vid", "uid", "fid", "filename", "video_name", "video_id", "question_id"), _ANY_LABEL),
    **dict.fromkeys(("start_time", "end_time", "frame_idx", "idx"), _ANY_LABEL),
    **dict.fromkeys(("answer", "correct_video", "correct_audio"), _ANY_LABEL),
    **dict.fromkeys(("multi_choice", "top_left", "bottom_right"), _LIST),
    **dict.fromkeys(("type", "event"), _TEXT + _LIST),
}
_SAID = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object", bool: "true or false"}


def wrong_type(field: str, value: Any) -> str | None:
    """What is wrong with the type of a field's value, with its mend; None where it is right."""
    types = FIELD_TYPES.get(field, _TEXT)
    if isinstance(value, types) and not isinstance(value, bool):
        return None
    wanted = " or ".join(dict.fromkeys(_SAID[t] for t in types))
    given = "null" if value is None else _SAID.get(type(value), type(value).__name__)
    return f"is {given}; give {wanted}"


def whole(value: Any) -> int:
    """The whole number that a field gives: as such, as 2.0, or as plain digits.

    Raises:
        ValueError: it gives none; 2.7 is not taken for 2.
    """
    text = isinstance(value, str) and value.isascii() and value.strip().isdigit()
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and value % 1 == 0
    if not (text or number):
        raise ValueError(f"{value!r:.80} is no whole number")
    return int(value)


@dataclass(frozen=True)
class Slot:
    """One data set in the unified interface.

    Attributes:
        name: the slot's name on disk, e.g. ``"ave"``.
        dataset: the published data set it comes from.
        family: the task family of AV-UIE v2.
        module: key of :data:`crab.tasks.interface.MODULES`: who reads and scores the answers.
        media: a key of :data:`MEDIA`.
        frames: video frames shown to the model (1 for an image).
        answer_field: field holding the answer text, chain included.
        metric: name of the primary metric, None where the slot is never scored.
        instruction: what the model is asked; ``{field}`` is filled from the record, ``{one|other}`` from the
            first of these fields that it has, a list as "a , b or c".
        train_fields, test_fields: published fields; no test fields = train only.
        truth_fields: fields of a record holding the truth; empty = read it from the answer.
        media_slot: slot under whose folder the media lie, where it is not the slot itself.
        published_train, published_test: how many records the published split has; None where that is not known.
    """

    name: str
    dataset: str
    family: str
    module: str
    media: str
    frames: int
    answer_field: str
    metric: str | None
    instruction: str
    train_fields: tuple[str, ...]
    test_fields: tuple[str, ...] = ()
    truth_fields: tuple[str, ...] = ()
    media_slot: str = ""
    published_train: int | None = None
    published_test: int | None = None

    def __post_init__(self) -> None:
        if self.media not in MEDIA:
            raise ValueError(f"slot {self.name}: media '{self.media}' is not one of {sorted(MEDIA)}")
        if not self.media_slot:
            object.__setattr__(self, "media_slot", self.name)

    @property
    def test(self) -> bool:
        """Whether the slot has a test split, that is, is a benchmark."""
        return bool(self.test_fields)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits it has."""
        return SPLITS if self.test else SPLITS[:1]

    @property
    def masks(self) -> bool:
        """Whether answers are scored on masks: records have a true one, scoring needs a :class:`crab.tasks.Masks`."""
        return self.module in ("segmentation", "referring")

    def fields(self, split: str) -> tuple[str, ...]:
        """The published fields of a split's records."""
        if split not in SPLITS or not (split == "train" or self.test):
            raise ValueError(f"slot {self.name} has no split '{split}'")
        return self.train_fields if split == "train" else self.test_fields

    def published(self, split: str) -> int | None:
        """How many records the published split has, or None."""
        return self.published_train if split == "train" else self.published_test


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_AVE = _words("video_path audio_path vid event start_time end_time label_content")
_UNAV = _words("video_path audio_path vid label_content")
_AVVP = _words("video_path audio_path filename vid event label_content")
_AVQA = _words("video_path audio_path video_id question_id type question answer label")
_AVQA_THU = _words("video_path audio_path id video_name video_id question_relation question_type multi_choice "
                   "question_text answer label")
_MELD = _words("video_path audio_path Emotion label")
_MER24 = _words("video_path audio_path discrete label")
_EMOTION = _words("video_path audio_path emotion label")
_KS = _words("video_path audio_path action label")
_UCF = _words("video_path audio_path label new_label")
_A2V = _words("video1_path video2_path audio_path correct_video audio_event video1_event video2_event label")
_V2A = _words("video_path audio1_path audio2_path correct_audio video_event audio1_event audio2_event label")

_ENTRIES = (
    # temporal localization
    Slot("ave", "AVE", "temporal localization", "temporal", "video_audio", 10, "label_content",
         "segment_accuracy", "which event is both seen and heard , and from when to when ?",
         _AVE, _AVE, _words("event start_time end_time")),
    Slot("unav", "UnAV-100", "temporal localization", "dense", "video_audio", 10, "label_content",
         None, "which events are both seen and heard , and when ?", _UNAV),
    Slot("avvp", "LLP", "temporal localization", "video_parsing", "video_audio", 10, "label_content",
         "segment_type_av", "which events are heard and which are seen , and from when to when ?",
         _AVVP, _AVVP),
    # spatial localization
    Slot("arig", "AVSBench-S4 frames", "spatial localization", "spatial", "image_audio", 1, "label_content",
         "ciou", "give the box of the thing that makes the sound .",
         _words("image_path audio_path a_obj label_content"),
         _words("visual_path audio_path a_obj top_left bottom_right frame_idx"),
         _words("top_left bottom_right"), media_slot="s4"),
    # pixel-level
    Slot("s4", "AVSBench single source", "pixel-level", "segmentation", "image_audio", 1, "label_content",
         "J", "give the box of the thing that makes the sound , and three points on it .",
         _words("image_path audio_path vid uid a_obj label_content"),
         _words("visual_path audio_path vid uid a_obj frame_idx")),
    Slot("ms3", "AVSBench multi source", "pixel-level", "segmentation", "image_audio", 1, "label_content",
         "J", "give the box of all the sounding things , and three points on them .",
         _words("image_path audio_path vid uid a_obj frame_idx label_content"),
         _words("visual_path audio_path vid uid a_obj frame_idx")),
    # What is referred to stands in `description` in train records and in `object` in test records.
    Slot("ref_avs", "Ref-AVS", "pixel-level", "referring", "image_audio", 1, "output",
         "J", "is {description|object} there , true or false ? if true , give its box and three points on it .",
         _words("image_path audio_path vid fid uid idx description output"),
         _words("visual_path audio_path object split vid uid fid frame_idx")),
    # spatio-temporal reasoning
    Slot("avqa", "MUSIC-AVQA", "spatio-temporal reasoning", "qa", "video_audio", 10, "label",
         "accuracy", "{question}", _AVQA, _AVQA, ("answer",)),
    Slot("avqa_thu", "AVQA", "spatio-temporal reasoning", "choice", "video_audio", 10, "label",
         "accuracy", "{question_text} choose {multi_choice} .", _AVQA_THU, _AVQA_THU, ("answer",)),
    # emotion recognition
    Slot("meld", "MELD", "emotion recognition", "emotion", "video_audio", 4, "label",
         "weighted_f1", "what does the speaker feel ?", _MELD, _MELD, ("Emotion",)),
    Slot("mer24", "MER2024", "emotion recognition", "emotion", "video_audio", 4, "label",
         None, "which emotion is both seen and heard ?", _MER24, truth_fields=("discrete",)),
    Slot("cremad", "CREMA-D", "emotion recognition", "emotion", "video_audio", 4, "label",
         "accuracy", "which emotion does the person show ?", _EMOTION, _EMOTION, ("emotion",)),
    Slot("mafw", "MAFW", "emotion recognition", "emotion", "video_audio", 4, "label",
         "WAR", "which emotion do face and voice show ?", _EMOTION, _EMOTION, ("emotion",)),
    Slot("dfew", "DFEW", "emotion recognition", "emotion", "video_audio", 4, "label",
         "WAR", "how does the person feel ?", _EMOTION, _EMOTION, ("emotion",)),
    # action recognition
    Slot("ks", "Kinetics-Sounds", "action recognition", "action", "video_audio", 10, "label",
         "accuracy", "which action takes place in the video ?", _KS, _KS, ("action",)),
    Slot("ucf", "UCF-101 (AV subset)", "action recognition", "action", "video_audio", 10, "new_label",
         "accuracy", "what action is seen in the video ?", _UCF, _UCF, ("label",)),
    # audio-visual matching
    Slot("a2v", "video for a sound", "audio-visual matching", "matching", "two_videos_audio", 10, "label",
         "accuracy", "which of the two videos matches the sound , one or two ?",
         _A2V, _A2V, ("correct_video",)),
    Slot("v2a", "sound for a video", "audio-visual matching", "matching", "video_two_audios", 10, "label",
         "accuracy", "which of the two sounds matches the video , one or two ?",
         _V2A, _V2A, ("correct_audio",)),
    # captioning, train only
    Slot("avcap", "VALOR", "captioning", "captioning", "video_audio", 10, "label_content",
         None, "describe what is seen and heard .",
         _words("video_path audio_path video_id label_content")),
)

SLOTS: dict[str, Slot] = {slot.name: slot for slot in _ENTRIES}
BENCHMARKS: tuple[str, ...] = tuple(slot.name for slot in _ENTRIES if slot.test)


def get_slot(name: str | Slot) -> Slot:
    """The slot of a name (a :class:`Slot` is returned as it is).

    Raises:
        ValueError: unknown name; the message holds the nearest and all known names.
    """
    if isinstance(name, Slot):
        return name
    if name not in SLOTS:
        near = difflib.get_close_matches(str(name), SLOTS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"unknown slot '{name}'{hint} Known slots: {', '.join(SLOTS)}")
    return SLOTS[name]


class MediaItem(NamedTuple):
    """One medium of a prompt.

    Attributes:
        kind: ``"video"``, ``"image"`` or ``"audio"``.
        path: POSIX path under the data root.
        field: the record's field it came from.
        second: for the sound of an image slot, the second of the clip that is heard; else None.
    """

    kind: str
    path: str
    field: str
    second: int | None = None


def json_path(slot: str | Slot, split: str) -> str:
    """POSIX path under the data root of a split's record list."""
    slot = get_slot(slot)
    slot.fields(split)
    return f"{FOLDER}/{slot.name}/{split}.json"


def media_paths(slot: str | Slot, record: Mapping[str, Any]) -> list[MediaItem]:
    """The media of a record in the order in which the prompt shows them.

    Video and audio of the video slots lie in ``AVUIE_2/<slot>/video`` and ``.../audio``; those of the
    image slots directly under ``AVUIE_2/<media_slot>``.

    Raises:
        ValueError: a path is missing, no text, absolute, or climbs out of its folder.
    """
    slot = get_slot(slot)
    image_slot = slot.media == "image_audio"
    items = []
    for kind, names in MEDIA[slot.media]:
        field = next((n for n in names if n in record), None)
        if field is None:
            raise ValueError(f"{describe(slot, record)}: no field '{' or '.join(names)}'; it must name the {kind} file")
        path = _inside(slot, record, field)
        folder = f"{FOLDER}/{slot.media_slot}" + ("" if image_slot else f"/{kind}")
        items.append(MediaItem(kind, f"{folder}/{path}", field))
    if image_slot:
        items[1] = items[1]._replace(second=_second(slot, record, items[0].path))
    return items


def mask_path(slot: str | Slot, record: Mapping[str, Any]) -> str:
    """POSIX path under the data root of a record's true mask.

    ``<clip>/labels_rgb/0.png`` for the frame ``<clip>/frames/0.jpg``; in Ref-AVS, for the thing numbered `fid`,
    ``gt_mask/<clip>/fid_1/00000.png`` for ``media/<clip>/frames/0.jpg`` (in the null split no such file exists).

    Raises:
        ValueError: a frame that is not in such a folder, or a `fid` that is no number.
    """
    slot = get_slot(slot)
    frame = PurePosixPath(media_paths(slot, record)[0].path)
    clip = frame.parent.parent
    if slot.module != "referring":
        if frame.parent.name != "frames":
            raise ValueError(f"{describe(slot, record)}: '{str(frame)[-200:]}' must be <clip>/frames/<number>.jpg, for its mask to be found")
        return str(clip / "labels_rgb" / f"{frame.stem}.png")
    number = str(required(slot, record, "fid"))
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"{describe(slot, record)}: field 'fid' is {number[:80]!r}; give the number of the thing")
    if frame.parent.name != "frames" or clip.parent.name != "media":
        raise ValueError(f"{describe(slot, record)}: '{str(frame)[-200:]}' must be media/<clip>/frames/<number>.jpg, "
                         "for its mask to be found")
    return str(clip.parent.parent / "gt_mask" / clip.name / f"fid_{number}" / f"{frame.stem:0>5}.png")


def _inside(slot: Slot, record: Mapping[str, Any], field: str) -> PurePosixPath:
    value = record[field]
    if not isinstance(value, str) or not value or "\\" in value or "\0" in value:
        raise ValueError(f"{describe(slot, record)}: field '{field}' is {value!r:.80}; give a relative POSIX path")
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{describe(slot, record)}: field '{field}' leaves its folder: {value!r:.200}; give a path below it")
    return path


def _second(slot: Slot, record: Mapping[str, Any], image: str) -> int:
    """Train records of s4 carry no index; their frames are named by it."""
    field = numbered(record)
    value = record[field] if field else PurePosixPath(image).stem
    try:
        second = whole(value)
    except ValueError:
        second = -1
    if second < 0:
        given = f"field '{field}' is {value!r:.80}" if field else "no second for its sound"
        raise ValueError(f"{describe(slot, record)}: {given}; give the frame's number, from 0, as 'frame_idx', or name the frame by it")
    return second


def numbered(record: Mapping[str, Any]) -> str | None:
    """The field that gives the number of an image slot's frame, which is the second of its sound; None if it has none."""
    return next((name for name in ("frame_idx", "idx") if name in record), None)


def describe(slot: Slot, record: Mapping[str, Any]) -> str:
    """How an error names a record."""
    for field in ("id", "question_id", "uid", "vid", "video_path", "visual_path", "image_path"):
        if field in record:
            return f"slot {slot.name}, record {field}={str(record[field])[:80]}"
    return f"slot {slot.name}, record without id"


def required(slot: Slot, record: Mapping[str, Any], field: str) -> Any:
    """A record's field, or a ValueError that names it."""
    if field not in record:
        raise ValueError(f"{describe(slot, record)}: no field '{field}'")
    return record[field]
