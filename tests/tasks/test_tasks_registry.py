"""The registry and the paths against the published layout."""

import pytest

from crab import tasks
from crab.tasks import fields

FRAME = {"visual_path": "media/c/frames/7.jpg", "audio_path": "media/c/audio.wav", "frame_idx": 7, "fid": 2}


@pytest.mark.parametrize(
    ("slot", "paths"),
    [
        ("ave", "video/video_path audio/audio_path"),
        ("a2v", "audio/audio_path video/video1_path video/video2_path"),
        ("v2a", "video/video_path audio/audio1_path audio/audio2_path"),
    ],
)
def test_media_are_in_the_order_of_the_prompt(slot, paths):
    kinds, names = zip(*(path.split("/") for path in paths.split()), strict=True)
    items = tasks.media_paths(slot, {name: f"folder/{name}" for name in names})
    assert tuple(item.kind for item in items) == kinds
    expected = [f"AVUIE_2/{slot}/{kind}/folder/{name}" for kind, name in zip(kinds, names, strict=True)]
    assert [item.path for item in items] == expected


@pytest.mark.parametrize("field", ["image_path", "visual_path"])
@pytest.mark.parametrize(("slot", "folder"), [("s4", "s4"), ("arig", "s4"), ("ms3", "ms3")])
def test_arig_shares_the_media_of_s4(slot, folder, field):
    record = {field: "AVS/v1s/c/frames/3.jpg", "audio_path": "AVS/v1s/c/audio.wav"}
    image, audio = tasks.media_paths(slot, record)
    assert image == ("image", f"AVUIE_2/{folder}/AVS/v1s/c/frames/3.jpg", field, None)
    assert audio == ("audio", f"AVUIE_2/{folder}/AVS/v1s/c/audio.wav", "audio_path", 3)
    assert tasks.media_paths(slot, record | {"frame_idx": 4})[1].second == 4
    assert tasks.mask_path(slot, record) == f"AVUIE_2/{folder}/AVS/v1s/c/labels_rgb/3.png"


@pytest.mark.parametrize("path", ["../x.mp4", "/x.mp4", "a/../../x.mp4", "", "..\\x.mp4", "a\0b", None, 3, "."])
def test_a_path_may_not_leave_its_folder(path):
    with pytest.raises(ValueError, match="video_path"):
        tasks.media_paths("ave", {"id": "x", "video_path": path, "audio_path": "b.wav"})


def test_the_number_of_a_frame_is_whole():
    record = {"visual_path": "c/frames/0.jpg", "audio_path": "a.wav"}
    assert [tasks.media_paths("s4", record | {"idx": number})[1].second for number in (2, 2.0, "02", "2.0")] == [2] * 4
    for number in (0.9, -1, "1.5", "\u0663", "1_0", True, "", float("nan")):
        for field in ("frame_idx", "idx"):
            with pytest.raises(ValueError, match=f"field '{field}' is .*; give the frame's number"):
                tasks.media_paths("s4", record | {field: number})


def test_masks_of_ref_avs_lie_in_another_folder():
    assert tasks.mask_path("ref_avs", FRAME) == "AVUIE_2/ref_avs/gt_mask/c/fid_2/00007.png"
    assert tasks.mask_path("ref_avs", FRAME | {"fid": 2.0}) == tasks.mask_path("ref_avs", FRAME)
    deep = FRAME | {"visual_path": "REFAVS/media/c/frames/0.jpg", "fid": "0"}
    assert tasks.mask_path("ref_avs", deep) == "AVUIE_2/ref_avs/REFAVS/gt_mask/c/fid_0/00000.png"
    train = {"image_path": "media/c/frames/3.jpg", "audio_path": "media/c/audio.wav", "fid": 1, "idx": 3}
    assert tasks.media_paths("ref_avs", train)[1].second == 3


@pytest.mark.parametrize(
    ("slot", "field", "values", "message"),
    [
        ("ref_avs", "fid", ["../1", -1, 1.5], "'fid' is .*; give the number"),
        ("ref_avs", "visual_path", ["c/frames/0.jpg", "0.jpg", "media/c/0.jpg"], "must be media/<clip>/frames/"),
        ("s4", "visual_path", ["0.jpg", "c/0.jpg", "c/Frames/0.jpg"], "must be <clip>/frames/"),
        ("ms3", "frame_idx", ["first"], "frame_idx"),
    ],
)
def test_a_frame_in_another_folder_has_no_mask(slot, field, values, message):
    for value in values:
        with pytest.raises(ValueError, match=message):
            tasks.mask_path(slot, FRAME | {field: value})


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("did you mean 'cremad'.*ave.*avcap", lambda: tasks.get_slot("crema")),
        ("unknown slot ''", lambda: tasks.parse("", "x")),
        ("avcap has no split 'test'", lambda: tasks.json_path("avcap", "test")),
        ("ave has no split 'val'", lambda: tasks.json_path("ave", "val")),
        ("no field 'audio_path'; it must name the audio", lambda: tasks.media_paths("ave", {"video_path": "a.mp4"})),
        ("no second.*frame_idx", lambda: tasks.media_paths("s4", {"image_path": "first.jpg", "audio_path": "a.wav"})),
        ("media 'radio' is unknown", lambda: tasks.Slot("x", "", "", family="", kind="", media="radio")),
    ],
)
def test_an_error_names_what_is_wrong(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("slot", sorted(tasks.SLOTS))
def test_every_entry_is_complete(slot):
    entry = tasks.get_slot(slot)
    assert entry.name == slot and entry.dataset and entry.family and entry.kind in tasks.KINDS
    assert entry.media_slot == ("s4" if slot == "arig" else slot)
    assert entry.answer_field in entry.fields("train")
    assert set(entry.truth_fields) <= set(entry.fields(entry.splits[-1]))
    assert entry.test == (entry.metric is not None) == (entry.splits == tasks.SPLITS)
    assert entry.masks == (entry.family == "pixel-level")
    frames = {"emotion recognition": 4, "pixel-level": 1, "spatial localization": 1}
    assert entry.frames == frames.get(entry.family, 10)
    assert tasks.json_path(slot, "train") == f"AVUIE_2/{slot}/train.json"


@pytest.mark.parametrize(
    ("slots", "splits", "names"),
    [
        ("unav", "train", "video_path audio_path vid label_content"),
        ("arig", "train", "image_path audio_path a_obj label_content"),
        ("arig", "test", "visual_path audio_path a_obj top_left bottom_right frame_idx"),
        ("ms3", "train", "image_path audio_path vid uid a_obj frame_idx label_content"),
        ("s4 ms3", "test", "visual_path audio_path vid uid a_obj frame_idx"),
        ("ref_avs", "train", "image_path audio_path vid fid uid idx description output"),
        ("ref_avs", "test", "visual_path audio_path object split vid uid fid frame_idx"),
        ("meld", "train test", "video_path audio_path Emotion label"),
        ("mer24", "train", "video_path audio_path discrete label"),
        ("cremad mafw dfew", "train test", "video_path audio_path emotion label"),
        ("ucf", "train test", "video_path audio_path label new_label"),
        ("avqa", "train test", "video_path audio_path video_id question_id type question answer label"),
    ],
)
def test_fields_are_the_published_ones(slots, splits, names):
    for slot in slots.split():
        for split in splits.split():
            assert " ".join(tasks.get_slot(slot).fields(split)) == names


@pytest.mark.parametrize(
    ("value", "result"),
    [
        (["a"], ["a"]),
        ('["a", "b"]', ["a", "b"]),
        (" ['a', \"b's\"] ", ["a", "b's"]),
        ("('a', 1)", ["a", 1]),
        *((text, text) for text in ("a, b", "[a]", "{'a': 1}", "", "[" * 9_999, "[__import__('os')]", "['a'")),
        ("[1]" * 9_000, "[1]" * 9_000),
        (None, None),
        (3, 3),
    ],
)
def test_a_list_may_be_given_as_text(value, result):
    assert fields.listed(value) == result


@pytest.mark.parametrize(
    ("slots", "names"),
    [("ave", "label_content"), ("avvp", "label_content"), ("ucf", "new_label"), ("avqa", "label"), ("s4 ref_avs", "")]
    + [("a2v", "label audio_event video1_event video2_event"), ("v2a", "label video_event audio1_event audio2_event")],
)
def test_fields_that_a_test_record_need_not_have(slots, names):
    for slot in slots.split():
        assert " ".join(tasks.get_slot(slot).optional("test")) == names
        assert tasks.get_slot(slot).optional("train") == ()


def test_the_type_of_a_field():
    assert [fields.wrong_type(*pair) for pair in (("label", "x"), ("vid", 3), ("event", ["x"]))] == [None] * 3
    assert fields.wrong_type("label", 3) == "is a number; give text"
    assert fields.wrong_type("vid", True) == "is true or false; give text or a number"
    assert fields.wrong_type("multi_choice", 3) == "is a number; give text or a list"
    assert fields.wrong_type("answer", None) == "is null; give text or a number"
