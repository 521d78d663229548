"""Encoding real files of a small world, and reading the result back."""

import numpy as np
import pytest
import torch

from crab import tasks
from crab.data import generate, records
from crab.data.media import MediaError, write_audio, write_video
from crab.models import omni
from crab.study.dataset import benchmarks, examples, load_base, overview, read_slot, write_slot
from crab.study.encode import encode_all, encode_slot, load_media, prepared

SLOTS = ["s4", "cremad", "a2v"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    generate.build(root, 0, train=2, test=2, caption=1, workers=1, slots=SLOTS, progress=False)
    return root


def test_encoded_as_the_model_reads_it(world, base, tmp_path):
    assert encode_all(world, SLOTS, base, tmp_path, workers=1) == {f"{s}/{t}": 2 for s in SLOTS for t in ("train", "test")}
    model, processor = load_base(base)
    for slot in SLOTS:
        data, found = read_slot(tmp_path, slot, "train"), records.read(world, slot, "train")
        assert data.ids == [r["id"] for r in found]
        assert data.targets["explicit"] == [tasks.target(slot, r, "explicit") for r in found]
        media = load_media(found[1], tasks.get_slot(slot).frames)
        (fresh,) = omni.encode(model, [omni.prepare(processor, media, tasks.instruction(slot, found[1]))])
        assert torch.equal(data.samples[1]["input_ids"], fresh["input_ids"])
        assert torch.equal(data.samples[1]["position_ids"], fresh["position_ids"])
        torch.testing.assert_close(data.samples[1]["features"], fresh["features"].half(), rtol=2e-3, atol=2e-3)  # alone here, in a batch there
    assert set(overview(tmp_path, SLOTS)["slot"]) == set(examples(tmp_path, SLOTS)["slot"]) == set(SLOTS)


def test_benchmarks_are_what_has_a_test_split_on_disk(encoded, tmp_path):
    """A captioning slot has none; a slot that is not whole is never taken for one."""
    data = read_slot(encoded, "ks", "train")
    for slot, splits in {"ks": ("train", "test"), "avcap": ("train",), "ave": ("train", "test")}.items():
        for split in splits:
            write_slot(tmp_path, slot, split, data.samples, data.ids, data.instructions, data.targets)
    assert benchmarks(tmp_path, ["ave", "avcap", "ks"]) == ["ave", "ks"] == [s for s in ("ave", "avcap", "ks") if tasks.get_slot(s).test]
    table = overview(tmp_path, ["ave", "avcap", "ks"])
    assert list(zip(table["slot"], table["split"])) == [
        ("ave", "train"), ("ave", "test"), ("avcap", "train"), ("ks", "train"), ("ks", "test"),
    ]  # fmt: skip
    assert set(table["samples"]) == {16}
    with pytest.raises(ValueError, match="unav: not encoded.*run the encode stage again"):
        benchmarks(tmp_path, ["ks", "unav"])
    (tmp_path / "ave/test.json").unlink()  # written last
    with pytest.raises(ValueError, match="ave: not encoded, or not to the end"):
        benchmarks(tmp_path, ["ave"])


def test_media_of_each_kind(world):
    kinds = {s: [m.kind for m in load_media(records.read(world, s, "test")[0], tasks.get_slot(s).frames)] for s in SLOTS}
    assert kinds == {"s4": ["image", "audio"], "cremad": ["video", "audio"], "a2v": ["audio", "video", "video"]}
    video, audio = load_media(records.read(world, "cremad", "test")[0], 4)
    assert video.data.shape == (4, 224, 224, 3) and video.fps == pytest.approx(0.4, abs=0.01)
    image, second = load_media(records.read(world, "s4", "test")[0], 1)
    assert second.data.shape == (16000,) and audio.data.shape == (160000,)


def clip(path, seconds, rate):
    write_video(path, np.random.default_rng(0).integers(0, 255, (round(seconds * rate), 32, 32, 3), dtype=np.uint8), rate)
    return tasks.MediaItem("video", str(path), "video_path")


@pytest.mark.parametrize("seconds, rate, frames", [(3, 10, 10), (25, 4, 10), (60, 2, 10), (10, 2, 4), (7, 25, 4)])
def test_a_videos_rate_is_its_own(tmp_path, seconds, rate, frames):
    """Frames are at the middles of equal parts, so one stands for seconds / frames, to within one frame of the clip."""
    (video,) = load_media({"media": [clip(tmp_path / "v.mp4", seconds, rate)]}, frames)
    assert 1 / video.fps == pytest.approx(seconds / frames, abs=1 / rate / (frames - 1) + 1e-6)


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_rate_of_a_clip_with_fewer_frames_than_are_taken(tmp_path, name, count):
    (video,) = load_media({"media": [clip(tmp_path / name, 6, count / 6)]}, 10)
    assert len(video.data) == 10 and 1 / video.fps == pytest.approx(0.6, abs=1e-4)


def test_two_videos_of_a_prompt_keep_a_clock_each(base, tmp_path):
    """Positions in time follow from the seconds a frame: a temporal patch of two frames is 2 s of one clip, 4 s of the other."""
    model, processor = load_base(base)
    write_audio(tmp_path / "a.wav", np.full(160000, 0.1))
    record = {"media": [tasks.MediaItem("audio", str(tmp_path / "a.wav"), "audio_path"),
                        clip(tmp_path / "one.mp4", 10, 2), clip(tmp_path / "two.mp4", 20, 2)]}  # fmt: skip
    prompt = prepared(processor, record, 10, "which ?")
    assert [float(s) for s in prompt["video_second_per_grid"]] == pytest.approx([2.0, 4.0])
    (sample,) = omni.encode(model, [prompt])
    times = sample["position_ids"][0][sample["input_ids"] == model.config.video_token_id].view(2, 5, -1)
    per_second = model.config.position_id_per_seconds
    for video, seconds in zip(times, (2, 4), strict=True):
        assert ((video - video[0, 0]) == torch.arange(5)[:, None] * seconds * per_second).all()


def test_missing_file_is_named_and_nothing_is_left(world, base, tmp_path, monkeypatch):
    good = records.read(world, "cremad", "train")
    gone = good[1]["media"][0]._replace(path=str(world / "gone.mp4"))
    bad = [good[0], good[1] | {"media": [gone, good[1]["media"][1]]}]
    monkeypatch.setattr(records, "read", lambda *args: bad)
    with pytest.raises(MediaError, match="gone.mp4"):
        encode_slot(world, "cremad", "train", base, tmp_path)
    assert not list(tmp_path.rglob("*.*"))
