"""Encoding real files of a small world, and reading the result back."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from crab import tasks
from crab.core.files import write_json
from crab.data import records
from crab.data.media import MediaError, write_audio, write_video
from crab.models import omni, published
from crab.models.batches import encoded
from crab.models.checkpoint import load_base
from crab.samples import encode
from crab.samples.encode import Encoder, encode_all
from crab.samples.inputs import load_media, prepared
from crab.samples.reading import benchmarks, encoded_slots, read_manifest, read_slot, shape_table, spread
from crab.samples.shards import Shards
from crab.world import generate

SLOTS = ["s4", "cremad", "a2v"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    generate.build(root, 0, train=2, test=2, caption=1, workers=1, slots=[*SLOTS, "avcap"], progress=False)
    records.write_manifest(root)
    return root


def test_encoded_as_the_model_reads_it(world, base, tmp_path):
    counts = encode_all(world, SLOTS, base, tmp_path, workers=1)
    counts = {name: (entry["samples"], entry["skipped"]) for name, entry in counts.items()}
    assert counts == {f"{slot}/{split}": (2, 0) for slot in SLOTS for split in ("train", "test")}
    model, processor = load_base(base)
    for slot in SLOTS:
        data, rows = read_slot(tmp_path, slot, "train"), records.read(world, slot, "train")
        assert data.ids == [row["id"] for row in rows]
        assert [answer for _, answer in data.answered("explicit")] == [tasks.target(slot, r, "explicit") for r in rows]
        media = load_media(rows[1], tasks.get_slot(slot).frames)
        (fresh,) = omni.encode(model, [omni.prepare(processor, media, tasks.instruction(slot, rows[1]))])
        assert torch.equal(data[1]["input_ids"], fresh["input_ids"])
        assert torch.equal(data[1]["position_ids"], fresh["position_ids"])
        # The sample is alone here, and was in a batch there.
        torch.testing.assert_close(data[1]["features"], fresh["features"].half(), rtol=2e-3, atol=2e-3)
    table = shape_table(tmp_path)
    assert [(row["slot"], row["split"]) for row in table][:3] == [("s4", "train"), ("s4", "test"), ("cremad", "train")]
    assert {row["samples"] for row in table} == {2} and all(row["of media"] < row["prompt tokens"] for row in table)


def test_manifest_says_what_is_encoded_and_what_it_follows_from(world, base, tmp_path):
    encode_all(world, ["cremad", "avcap"], base, tmp_path / "one", workers=1)
    first = read_manifest(tmp_path / "one")
    assert list(first) == ["cremad/train", "cremad/test", "avcap/train"] and first["avcap/train"]["samples"] == 1
    assert encoded_slots(tmp_path / "one") == ["cremad", "avcap"] and benchmarks(tmp_path / "one") == ["cremad"]
    encode_all(world, ["cremad"], base, tmp_path / "two", workers=1)
    assert read_manifest(tmp_path / "two")["cremad/test"] == first["cremad/test"]
    encode_all(world, ["cremad"], base, tmp_path / "three", workers=1, compatibility="published")
    assert read_manifest(tmp_path / "three")["cremad/test"] != first["cremad/test"]
    with pytest.raises(ValueError, match="slot 's4' is not encoded; add it to encode.slots"):
        benchmarks(tmp_path / "one", ["cremad", "s4"])
    with pytest.raises(ValueError, match="ks/train was not built; take its slot out of encode.slots"):
        encode_all(world, ["ks"], base, tmp_path / "x", workers=1)


def test_spread_is_even_and_never_too_many():
    assert spread(10, 4) == [0, 3, 6, 9] and spread(3, 9) == [0, 1, 2] and spread(5, 1) == [0]
    with pytest.raises(ValueError, match="0 samples wanted of 3"):
        spread(3, 0)


def test_media_of_each_kind(world):
    rows = {slot: records.read(world, slot, "test")[0] for slot in SLOTS}
    kinds = {slot: [item.kind for item in load_media(row, 4)] for slot, row in rows.items()}
    assert kinds == {"s4": ["image", "audio"], "cremad": ["video", "audio"], "a2v": ["audio", "video", "video"]}
    video, audio = load_media(rows["cremad"], 4)
    assert video.data.shape == (4, 224, 224, 3) and video.fps == pytest.approx(0.4, abs=0.01)
    image, second = load_media(rows["s4"], 1)
    assert second.data.shape == (16000,) and audio.data.shape == (160000,)


def clip(path, seconds, rate):
    shape = (round(seconds * rate), 32, 32, 3)
    write_video(path, np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8), rate)
    return tasks.MediaItem("video", str(path), "video_path")


@pytest.mark.parametrize("seconds, rate, frames", [(3, 10, 10), (25, 4, 10), (60, 2, 10), (10, 2, 4), (7, 25, 4)])
def test_a_videos_rate_is_its_own(tmp_path, seconds, rate, frames):
    """Frames are at the middles of equal parts, so one stands for seconds / frames, to within one frame of the clip."""
    (video,) = load_media({"media": [clip(tmp_path / "v.mp4", seconds, rate)]}, frames)
    assert 1 / video.fps == pytest.approx(seconds / frames, abs=1 / rate / (frames - 1) + 1e-6)


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_rate_of_a_clip_with_too_few_frames(tmp_path, name, count):
    (video,) = load_media({"media": [clip(tmp_path / name, 6, count / 6)]}, 10)
    assert len(video.data) == 10 and 1 / video.fps == pytest.approx(0.6, abs=1e-4)


def test_two_videos_of_a_prompt_keep_a_clock_each(base, tmp_path):
    """Positions in time follow from seconds per frame: two frames are 2 s of one clip and 4 s of the other."""
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


@pytest.mark.parametrize("slot, second", [("ks", None), ("s4", 0)])
@pytest.mark.parametrize("compatibility", ["none", "published"])
def test_a_sound_of_which_no_token_is_made_is_named(base, tmp_path, monkeypatch, slot, second, compatibility):
    """Two frames of the spectrogram, of 400 samples each, make none. The published loader first pads to 1 s."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    image = tasks.MediaItem("image", str(tmp_path / "0.png"), "image_path")
    seen = clip(tmp_path / "v.mp4", 2, 4) if slot == "ks" else image
    sound = tasks.MediaItem("audio", str(tmp_path / "a.wav"), "audio_path", second)
    record = {"id": "x/7", "image_path": "0.png", "media": [seen, sound],
              "action": "a", "label": "<answer>a</answer>", "label_content": "[0,0,8,8] [1,1] [2,2] [3,3]"}  # fmt: skip
    monkeypatch.setattr(encode, "_records", lambda *args: [record])

    def write():
        Encoder(tmp_path, base, compatibility).write(slot, "train", tmp_path / "00000.safetensors", range(1))

    for samples in (10, 800, 801):
        write_audio(tmp_path / "a.wav", np.full(samples, 0.1))
        if samples > 800 or compatibility == "published":
            write()
            assert len(Shards(tmp_path)) == 1
        else:
            with pytest.raises(ValueError, match="a.wav, a sound of record x/7, gives at most 0.05 s to hear.*; leave"):
                write()


def test_a_sound_that_the_base_would_cut_is_refused(base, tmp_path):
    """The frames span the whole clip; half a second too much is let pass."""
    _, processor = load_base(base)
    seen, sound = clip(tmp_path / "v.mp4", 12, 2), tasks.MediaItem("audio", str(tmp_path / "a.wav"), "audio_path")
    record = {"id": "x/7", "media": [seen, sound]}
    shown = [prepared, partial(published.prepared, "ks")]
    for seconds, fits in ((10, True), (10.4, True), (12, False)):
        write_audio(tmp_path / "a.wav", np.full(round(seconds * 16_000), 0.1))
        for show in (partial(way, processor, record, 4, "which ?") for way in shown):
            if fits:
                assert show()["feature_attention_mask"].sum() == 400
            else:
                with pytest.raises(ValueError, match="x/7,? lasts 12.0 s, of which this base hears 10 s; cut clip and"):
                    show()
    processor.feature_extractor.n_samples = 300 * 16_000  # as Qwen2.5-Omni's
    assert not published.cut_off(processor, np.zeros(300 * 16_000))
    assert published.cut_off(processor, np.zeros(301 * 16_000))


def test_records_on_which_the_encoders_fail_are_named(world, base, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(omni, "encode", fail)
    with pytest.raises(RuntimeError, match="cremad/train, records cremad/train/00000 to .*/00001: out of memory"):
        Encoder(world, base).write("cremad", "train", tmp_path / "00000.safetensors", range(2))


def test_missing_file_is_named_and_nothing_is_left(world, base, tmp_path, monkeypatch):
    good = records.read(world, "cremad", "train")
    gone = good[1]["media"][0]._replace(path=str(world / "gone.mp4"))
    bad = [good[0], good[1] | {"media": [gone, good[1]["media"][1]]}]
    monkeypatch.setattr(encode, "_records", lambda *args: bad)
    with pytest.raises(MediaError, match="gone.mp4"):
        Encoder(world, base).write("cremad", "train", tmp_path / "00000.safetensors", range(2))
    assert not list(tmp_path.rglob("*.*"))


def test_the_stage_takes_the_setting_and_without_it_encodes_as_ever(world, base, tmp_path):
    encode_all(world, ["cremad"], base, tmp_path / "plain", workers=1)
    for name in ("none", "published"):
        encode_all(world, ["cremad"], base, tmp_path / name, workers=1, compatibility=name)
    plain, same, other = (read_slot(tmp_path / name, "cremad", "train") for name in ("plain", "none", "published"))
    for a, b, c in zip(plain, same, other, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("input_ids", "position_ids", "features"))
        assert not torch.equal(a["input_ids"], c["input_ids"]) and a["text"] == c["text"]
    with pytest.raises(ValueError, match="encode.compatibility is 'crab'; choose one of none, published"):
        encode_all(world, ["cremad"], base, tmp_path / "x", workers=1, compatibility="crab")


def test_shards_of_an_earlier_run_are_kept_and_others_made_anew(world, base, tmp_path, monkeypatch):
    """The stage was killed after two of three shards: it reads the records of the third only."""
    monkeypatch.setattr(encode, "BATCH", 1)
    whole = encode_all(world, ["cremad"], base, tmp_path / "whole", workers=1, shard_mib=1e-6)
    encode_all(world, ["cremad"], base, tmp_path / "cut", workers=1, shard_mib=1e-6)
    paths = sorted((tmp_path / "cut").rglob("*.safetensors"))
    assert len(paths) == 4  # one record each, two records per split
    (tmp_path / "cut" / "manifest.json").unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:-7])  # half a shard is never taken for a whole one
    paths[3].unlink()
    dates = [path.stat().st_mtime_ns for path in paths[:2]]
    assert encode_all(world, ["cremad"], base, tmp_path / "cut", workers=1, shard_mib=1e-6) == whole
    assert dates == [path.stat().st_mtime_ns for path in paths[:2]]
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_damaged_records_are_skipped_and_counted_or_stop_the_stage(world, base, tmp_path, monkeypatch):
    rows = records.read(world, "cremad", "train")
    short = rows[0]["media"][0]._replace(path=str(tmp_path / "short.mp4"))
    (tmp_path / "short.mp4").write_bytes(b"no clip")
    bad = [{**rows[0], "media": [short, rows[0]["media"][1]]}, rows[1]]
    monkeypatch.setattr(encode, "_records", lambda root, slot, split, version: bad if split == "train" else rows)
    with pytest.raises(RuntimeError, match="cremad/train, shard 0 failed: .*short.mp4"):
        encode_all(world, ["cremad"], base, tmp_path / "out", workers=1)
    counts = encode_all(world, ["cremad"], base, tmp_path / "out", workers=1, on_problem="skip")
    assert (counts["cremad/train"]["samples"], counts["cremad/train"]["skipped"]) == (1, 1)
    (entry,) = Shards(tmp_path / "out" / "cremad" / "train").skipped()
    assert entry["id"] == rows[0]["id"] and "short.mp4" in entry["problem"]
    assert read_slot(tmp_path / "out", "cremad", "train").ids == [rows[1]["id"]]
    with pytest.raises(RuntimeError, match="cremad/train, shard 0 failed: .*short.mp4"):  # not the shard without it
        encode_all(world, ["cremad"], base, tmp_path / "out", workers=1)
    bad[1] = bad[0]
    with pytest.raises(ValueError, match="cremad/train: all 2 records were skipped"):
        encode_all(world, ["cremad"], base, tmp_path / "none", workers=1, on_problem="skip")
    with pytest.raises(ValueError, match="shared.on_problem is 'drop'; choose one of error, skip"):
        encode_all(world, ["cremad"], base, tmp_path / "none", workers=1, on_problem="drop")


def test_records_that_changed_are_read_again_in_the_same_process(world, base, tmp_path):
    root = tmp_path / "world"
    shutil.copytree(world / "AVUIE_2/cremad", root / "AVUIE_2/cremad")
    records.write_manifest(root)
    encode_all(root, ["cremad"], base, tmp_path / "out", workers=1)
    path = root / tasks.json_path("cremad", "test")
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows[0]["id"] = "renamed"
    write_json(path, rows)
    records.write_manifest(root)
    encode_all(root, ["cremad"], base, tmp_path / "out", workers=1)
    assert read_slot(tmp_path / "out", "cremad", "test").ids[0] == "renamed"


def test_without_cached_features_samples_are_decoded_when_they_are_read(world, base, tmp_path):
    """The same tokens, positions and answers, and features that are equal to the rounding of 16 bit."""
    encode_all(world, SLOTS, base, tmp_path / "cached", workers=1)
    encode_all(world, SLOTS, base, tmp_path / "live", workers=1, cache=False)
    assert sum(path.stat().st_size for path in (tmp_path / "live").rglob("*.safetensors")) < 100_000
    model, _ = load_base(base)
    for slot in SLOTS:
        cached, live = (read_slot(tmp_path / name, slot, "train", base) for name in ("cached", "live"))
        assert cached.ids == live.ids
        for (one, answer), (prompt, same) in zip(cached.answered("bare"), live.answered("bare"), strict=True):
            (other,) = encoded(model, [prompt])
            assert answer == same and other["text"] == one["text"]
            assert torch.equal(one["input_ids"], other["input_ids"])
            assert torch.equal(one["position_ids"], other["position_ids"])
            torch.testing.assert_close(one["features"], other["features"], rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="features of s4/train are not cached; give the base"):
        read_slot(tmp_path / "live", "s4", "train")


def test_a_clip_that_breaks_off_later_is_replaced_with_a_warning(world, base, tmp_path):
    encode_all(world, ["cremad"], base, tmp_path, workers=1, cache=False)
    data = read_slot(tmp_path, "cremad", "train", base, "skip")
    path = records.read(world, "cremad", "train")[0]["media"][0].path
    whole = open(path, "rb").read()
    try:
        open(path, "wb").write(whole[: len(whole) // 2])
        with pytest.warns(UserWarning, match=f"{data.ids[0]} is replaced by the next sample: .*{path}"):
            assert data[0]["text"]["id"] == data.ids[1]
        with pytest.raises(MediaError, match=path):
            read_slot(tmp_path, "cremad", "train", base)[0]
    finally:
        open(path, "wb").write(whole)


def test_sounds_that_are_too_long_are_known_before_anything_is_decoded(base, tmp_path):
    """The lengths come from the file in which the build stage keeps its probes."""
    write_audio(tmp_path / "AVUIE_2/cremad/audio/long.wav", np.full(12 * 16_000, 0.1))
    write_audio(tmp_path / "AVUIE_2/cremad/audio/short.wav", np.full(16_000, 0.1))
    folder = tmp_path / "AVUIE_2/cremad/video"
    folder.mkdir()
    clip(folder / "v.mp4", 2, 4)
    row = {"video_path": "v.mp4", "emotion": "happy", "label": "<answer>happy</answer>"}
    for split in tasks.SPLITS:
        rows = [{**row, "audio_path": name} for name in ("long.wav", "short.wav")]
        write_json(tmp_path / tasks.json_path("cremad", split), rows)
    records.write_manifest(tmp_path)
    options = {"workers": 1, "cache": False, "probes": tmp_path / "probes.json"}
    with pytest.raises(ValueError, match="2 records cannot be used; the first is .*long.wav lasts 12.0 s"):
        encode_all(tmp_path, ["cremad"], base, tmp_path / "out", **options)
    counts = encode_all(tmp_path, ["cremad"], base, tmp_path / "out", on_problem="skip", **options)
    assert (counts["cremad/train"]["samples"], counts["cremad/train"]["skipped"]) == (1, 1)
