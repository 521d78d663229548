"""The slots of AV-UIE v2, one entry per data set.

To add a data set, add a :class:`Slot` to `_ENTRIES`, and its question to ``prompts.yaml``.
"""

import difflib
from dataclasses import KW_ONLY, dataclass
from functools import partial

FOLDER = "AVUIE_2"
SPLITS = ("train", "test")
PUBLISHED_SAMPLES = 222_000  # of all slots together, "about"

#: The media of a prompt, in the order of the published prompts: (kind, names of the field).
#: A frame is named `image_path` in train records and `visual_path` in test records.
MEDIA: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "video_audio": (("video", ("video_path",)), ("audio", ("audio_path",))),
    "image_audio": (("image", ("image_path", "visual_path")), ("audio", ("audio_path",))),
    "two_videos_audio": (("audio", ("audio_path",)), ("video", ("video1_path",)), ("video", ("video2_path",))),
    "video_two_audios": (("video", ("video_path",)), ("audio", ("audio1_path",)), ("audio", ("audio2_path",))),
}


@dataclass(frozen=True)
class Slot:
    """One data set in the unified interface. Lists of names are words with spaces between them."""

    name: str  # its folder on disk, such as "ave"
    dataset: str  # the published data set
    own_fields: str  # published fields of a train record after its media fields; the last one holds the answer
    truth: str = ""  # fields that hold the truth; none if the truth is read from the answer
    metrics: str = ""  # the primary metric, for labels (crab.tasks.labels) others too; none if for training only
    _: KW_ONLY
    family: str  # task family of AV-UIE v2
    kind: str  # kind of answer, a key of crab.tasks.KINDS
    test_fields: str = ""  # as own_fields, for a test record, if they differ
    media: str = "video_audio"  # a key of MEDIA
    frames: int = 10  # video frames that the model sees; 1 for an image
    media_slot: str = ""  # the slot whose folder holds the media, if it is another one
    overlap: bool = False  # whether train and test of the published set share videos

    def __post_init__(self) -> None:
        if self.media not in MEDIA:
            raise ValueError(f"slot {self.name}: media '{self.media}' is unknown; use one of {', '.join(MEDIA)}")
        object.__setattr__(self, "media_slot", self.media_slot or self.name)

    @property
    def metric(self) -> str | None:
        """The primary metric; None if the slot is for training only."""
        return self.metrics.split()[0] if self.metrics else None

    @property
    def test(self) -> bool:
        """Whether the slot has a test split, that is, whether it is a benchmark."""
        return bool(self.metrics)

    @property
    def splits(self) -> tuple[str, ...]:
        return SPLITS if self.test else SPLITS[:1]

    @property
    def masks(self) -> bool:
        """Whether answers are scored on masks: a record has a true mask, and scoring needs a `Masks`."""
        return self.kind in ("segmentation", "referring")

    @property
    def answer_field(self) -> str:
        """The field that holds the answer, chain included."""
        return self.own_fields.split()[-1]

    @property
    def truth_fields(self) -> tuple[str, ...]:
        return tuple(self.truth.split())

    def fields(self, split: str) -> tuple[str, ...]:
        """The published fields of a split's records."""
        if split not in self.splits:
            raise ValueError(f"slot {self.name} has no split '{split}'; choose one of {', '.join(self.splits)}")
        media = (names[SPLITS.index(split) % len(names)] for _, names in MEDIA[self.media])
        own = self.test_fields if split == "test" and self.test_fields else self.own_fields
        return (*media, *own.split())

    def optional(self, split: str) -> tuple[str, ...]:
        """The fields that a record of a split need not have: of a test record the answer to learn, if it is not the
        only truth, and what a pair of clips shows."""
        answer = (self.answer_field,) if self.truth or self.kind == "video_parsing" else ()
        events = tuple(name for name in self.own_fields.split() if name.endswith("_event"))
        return (*answer, *events) if split == "test" else ()


_events = partial(Slot, family="temporal localization")
_frame = partial(Slot, media="image_audio", frames=1)
_pixels = partial(_frame, family="pixel-level", kind="segmentation", metrics="J", test_fields="vid uid a_obj frame_idx")
_question = partial(Slot, family="spatio-temporal reasoning", truth="answer", metrics="accuracy")
_emotion = partial(Slot, family="emotion recognition", kind="emotion", frames=4)
_action = partial(Slot, family="action recognition", kind="action", metrics="accuracy")
_match = partial(Slot, family="audio-visual matching", kind="matching", metrics="accuracy")

# name, data set, fields, fields of the truth, metrics
_ENTRIES = (
    _events("ave", "AVE", "vid event start_time end_time label_content", "event start_time end_time",
            "segment_accuracy", kind="temporal"),
    _events("unav", "UnAV-100", "vid label_content", kind="dense"),
    _events("avvp", "LLP", "filename vid event label_content", metrics="segment_type_av", kind="video_parsing"),
    _frame("arig", "AVSBench-S4 frames", "a_obj label_content", "top_left bottom_right", "ciou",
           family="spatial localization", kind="spatial", test_fields="a_obj top_left bottom_right frame_idx",
           media_slot="s4"),
    _pixels("s4", "AVSBench single source", "vid uid a_obj label_content"),
    _pixels("ms3", "AVSBench multi source", "vid uid a_obj frame_idx label_content"),
    _pixels("ref_avs", "Ref-AVS", "vid fid uid idx description output", kind="referring",
            test_fields="object split vid uid fid frame_idx"),
    _question("avqa", "MUSIC-AVQA", "video_id question_id type question answer label", kind="qa", overlap=True),
    _question("avqa_thu", "AVQA", "id video_name video_id question_relation question_type multi_choice question_text "
              "answer label", kind="choice"),
    _emotion("meld", "MELD", "Emotion label", "Emotion", "weighted_f1 accuracy"),
    _emotion("mer24", "MER2024", "discrete label", "discrete"),
    _emotion("cremad", "CREMA-D", "emotion label", "emotion", "accuracy"),
    _emotion("mafw", "MAFW", "emotion label", "emotion", "WAR UAR"),
    _emotion("dfew", "DFEW", "emotion label", "emotion", "WAR UAR"),
    _action("ks", "Kinetics-Sounds", "action label", "action"),
    _action("ucf", "UCF-101 (AV subset)", "label new_label", "label"),
    _match("a2v", "video for a sound", "correct_video audio_event video1_event video2_event label", "correct_video",
           media="two_videos_audio"),
    _match("v2a", "sound for a video", "correct_audio video_event audio1_event audio2_event label", "correct_audio",
           media="video_two_audios"),
    Slot("avcap", "VALOR", "video_id label_content", family="captioning", kind="captioning"),
)  # fmt: skip

SLOTS: dict[str, Slot] = {slot.name: slot for slot in _ENTRIES}
BENCHMARKS: tuple[str, ...] = tuple(slot.name for slot in _ENTRIES if slot.test)


def get_slot(name: str | Slot) -> Slot:
    """The slot with this name. A :class:`Slot` is returned as it is. ValueError for an unknown name."""
    if isinstance(name, Slot):
        return name
    if name not in SLOTS:
        near = difflib.get_close_matches(str(name), SLOTS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ValueError(f"unknown slot '{name}'{hint} Known slots: {', '.join(SLOTS)}")
    return SLOTS[name]
