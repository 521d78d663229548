"""The registry against the published layout."""

import pytest

from crab import tasks


def paths(slot, **record):
    return [(m.kind, m.path) for m in tasks.media_paths(slot, record)]


def test_media_of_each_kind_in_the_order_of_the_prompt():
    assert paths("ave", video_path="a.mp4", audio_path="b.wav") == [
        ("video", "AVUIE_2/ave/video/a.mp4"), ("audio", "AVUIE_2/ave/audio/b.wav")]
    assert paths("a2v", video1_path="1.mp4", video2_path="2.mp4", audio_path="a.mp3") == [
        ("audio", "AVUIE_2/a2v/audio/a.mp3"), ("video", "AVUIE_2/a2v/video/1.mp4"), ("video", "AVUIE_2/a2v/video/2.mp4")]
    assert paths("v2a", video_path="v.mp4", audio1_path="1.wav", audio2_path="2.wav") == [
        ("video", "AVUIE_2/v2a/video/v.mp4"), ("audio", "AVUIE_2/v2a/audio/1.wav"), ("audio", "AVUIE_2/v2a/audio/2.wav")]


@pytest.mark.parametrize("field", ["image_path", "visual_path"])
@pytest.mark.parametrize(("slot", "folder"), [("s4", "s4"), ("arig", "s4"), ("ms3", "ms3")])
def test_image_slots_share_the_media_of_s4_but_ms3(slot, folder, field):
    record = {field: "AVS/v1s/c/frames/3.jpg", "audio_path": "AVS/v1s/c/audio.wav"}
    image, audio = tasks.media_paths(slot, record)
    assert (image.kind, image.path, image.second) == ("image", f"AVUIE_2/{folder}/AVS/v1s/c/frames/3.jpg", None)
    assert (audio.kind, audio.path, audio.second) == ("audio", f"AVUIE_2/{folder}/AVS/v1s/c/audio.wav", 3)
    assert tasks.media_paths(slot, record | {"frame_idx": 4})[1].second == 4
    assert tasks.mask_path(slot, record) == f"AVUIE_2/{folder}/AVS/v1s/c/labels_rgb/3.png"


@pytest.mark.parametrize("bad", ["../x.mp4", "/x.mp4", "a/../../x.mp4", "", "..\\x.mp4", "a\0b", None, 3, "."])
def test_a_path_may_not_leave_its_folder(bad):
    with pytest.raises(ValueError, match="video_path"):
        tasks.media_paths("ave", {"id": "x", "video_path": bad, "audio_path": "b.wav"})


def test_a_missing_path_or_second_is_named():
    with pytest.raises(ValueError, match="audio_path"):
        tasks.media_paths("ave", {"video_path": "a.mp4"})
    with pytest.raises(ValueError, match="frame_idx"):
        tasks.media_paths("s4", {"image_path": "frames/first.jpg", "audio_path": "a.wav"})


@pytest.mark.parametrize("bad", [0.9, -1, "1.0", "\u0663", "1_0", True, "", float("nan")])
def test_the_number_of_a_frame_is_whole(bad):
    record = {"visual_path": "c/frames/0.jpg", "audio_path": "a.wav"}
    for field in ("frame_idx", "idx"):
        with pytest.raises(ValueError, match=f"field '{field}' is .*; give the frame's number"):
            tasks.media_paths("s4", record | {field: bad})
    assert [tasks.media_paths("s4", record | {"frame_idx": good})[1].second for good in (2, 2.0, "02")] == [2, 2, 2]


@pytest.mark.parametrize("slot", ["s4", "ms3"])
@pytest.mark.parametrize("frame", ["0.jpg", "c/0.jpg", "c/Frames/0.jpg"])
def test_a_frame_without_a_folder_of_frames_has_no_mask_to_be_found(slot, frame):
    with pytest.raises(ValueError, match="must be <clip>/frames/<number>.jpg"):
        tasks.mask_path(slot, {"visual_path": frame, "audio_path": "a.wav", "frame_idx": 0})


def test_an_unknown_slot_is_an_error_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'cremad'.*ave.*avcap"):
        tasks.get_slot("crema")
    with pytest.raises(ValueError, match="unknown slot ''"):
        tasks.parse("", "x")


def test_splits_and_fields():
    assert tasks.json_path("ks", "test") == "AVUIE_2/ks/test.json"
    assert tasks.get_slot("arig").fields("test") == (
        "visual_path", "audio_path", "a_obj", "top_left", "bottom_right", "frame_idx")
    assert tasks.get_slot("cremad").frames == 4 and tasks.get_slot("s4").frames == 1
    for slot, split in (("avcap", "test"), ("ave", "val")):
        with pytest.raises(ValueError, match=f"{slot} has no split '{split}'"):
            tasks.json_path(slot, split)


@pytest.mark.parametrize("slot", sorted(tasks.SLOTS))
def test_every_entry_is_whole(slot):
    entry = tasks.get_slot(slot)
    assert entry.name == slot and entry.media_slot in tasks.SLOTS
    assert entry.answer_field in entry.train_fields
    assert set(entry.truth_fields) <= set(entry.test_fields or entry.train_fields)
    assert entry.test == (entry.metric is not None)
    assert entry.masks == (entry.family == "pixel-level")


# The table of slots: field names as published, frames as shown.
@pytest.mark.parametrize(("slot", "frames", "train", "test"), [
    ("unav", 10, "video_path audio_path vid label_content", ""),
    ("ms3", 1, "image_path audio_path vid uid a_obj frame_idx label_content", "visual_path audio_path vid uid a_obj frame_idx"),
    ("ref_avs", 1, "image_path audio_path vid fid uid idx description output",
     "visual_path audio_path object split vid uid fid frame_idx"),
    ("meld", 4, "video_path audio_path Emotion label", None), ("mer24", 4, "video_path audio_path discrete label", ""),
    ("mafw", 4, "video_path audio_path emotion label", None), ("dfew", 4, "video_path audio_path emotion label", None),
    ("ucf", 10, "video_path audio_path label new_label", None),
    ("avqa_thu", 10, "video_path audio_path id video_name video_id question_relation question_type multi_choice question_text "
     "answer label", None),
])
def test_published_fields(slot, frames, train, test):
    entry = tasks.get_slot(slot)
    assert entry.frames == frames and entry.media_slot == slot
    assert " ".join(entry.train_fields) == train
    assert " ".join(entry.test_fields) == (train if test is None else test)


def test_masks_of_ref_avs_lie_in_a_folder_of_their_own():
    record = {"visual_path": "REFAVS/media/clip_1/frames/7.jpg", "audio_path": "REFAVS/media/clip_1/audio.wav", "fid": 2, "frame_idx": 7}
    assert tasks.mask_path("ref_avs", record) == "AVUIE_2/ref_avs/REFAVS/gt_mask/clip_1/fid_2/00007.png"
    assert tasks.mask_path("ref_avs", record | {"visual_path": "media/c/frames/0.jpg", "fid": "0"}) == (
        "AVUIE_2/ref_avs/gt_mask/c/fid_0/00000.png")
    train = {"image_path": "media/c/frames/3.jpg", "audio_path": "media/c/audio.wav", "fid": 1, "idx": 3}
    assert tasks.media_paths("ref_avs", train)[1].second == 3
    for change, named in (
        ({"fid": "../1"}, "fid"), ({"fid": -1}, "fid"), ({"visual_path": "c/frames/0.jpg"}, "media/<clip>"),
        ({"visual_path": "0.jpg"}, "media/<clip>"), ({"visual_path": "media/c/0.jpg"}, "media/<clip>"),
    ):
        with pytest.raises(ValueError, match=named):
            tasks.mask_path("ref_avs", record | change)


def test_media_of_ucf_may_lie_in_folders():
    assert paths("ucf", video_path="swaying_bell/v_1.avi", audio_path="swaying_bell/v_1.wav") == [
        ("video", "AVUIE_2/ucf/video/swaying_bell/v_1.avi"), ("audio", "AVUIE_2/ucf/audio/swaying_bell/v_1.wav")]
