"""Encoding real files of a small world, and reading the result back."""

import struct

import av
import numpy as np
import pytest
import torch
from PIL import Image

from crab import tasks
from crab.world import generate
from crab.data import records
from crab.data.media import MediaError, write_audio, write_video
from crab.models import omni
from crab.study.dataset import benchmarks, examples, load_base, overview, read_slot, write_slot
from crab.models import published
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


@pytest.mark.parametrize("slot, second", [("ks", None), ("s4", 0)])
@pytest.mark.parametrize("compatibility", ["none", "published"])
def test_a_sound_of_which_no_token_is_made_is_named(base, tmp_path, monkeypatch, slot, second, compatibility):
    """Two frames of the spectrogram, of 400 samples each, make none; the published loader fills a sound up to 1 s first."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    seen = clip(tmp_path / "v.mp4", 2, 4) if slot == "ks" else tasks.MediaItem("image", str(tmp_path / "0.png"), "image_path")
    record = {"id": "x/7", "image_path": "0.png", "media": [seen, tasks.MediaItem("audio", str(tmp_path / "a.wav"), "audio_path", second)],
              "action": "a", "label": "<answer>a</answer>", "label_content": "[0,0,8,8] [1,1] [2,2] [3,3]"}  # fmt: skip
    monkeypatch.setattr(records, "read", lambda *args: [record])
    for samples in (10, 800, 801):
        write_audio(tmp_path / "a.wav", np.full(samples, 0.1))
        if samples > 800 or compatibility == "published":
            assert encode_slot(tmp_path, slot, "train", base, tmp_path / "out", compatibility=compatibility) == 1
        else:
            with pytest.raises(ValueError, match="a.wav, a sound of record x/7, gives no more than 0.05 s to hear.*; leave the record out"):
                encode_slot(tmp_path, slot, "train", base, tmp_path / "out", compatibility=compatibility)


def test_a_sound_that_the_base_would_cut_is_refused(base, tmp_path):
    """The frames span the whole clip; half a second too much is let pass."""
    _, processor = load_base(base)
    seen, sound = clip(tmp_path / "v.mp4", 12, 2), tasks.MediaItem("audio", str(tmp_path / "a.wav"), "audio_path")
    record = {"id": "x/7", "media": [seen, sound]}
    shown = {"none": lambda: prepared(processor, record, 4, "which ?"), "published": lambda: published.prepared("ks", processor, record, 4, "?")}
    for seconds, fits in ((10, True), (10.4, True), (12, False)):
        write_audio(tmp_path / "a.wav", np.full(round(seconds * 16_000), 0.1))
        for show in shown.values():
            if fits:
                assert show()["feature_attention_mask"].sum() == 400
            else:
                with pytest.raises(ValueError, match="x/7,? lasts 12.0 s, of which this base hears 10 s; cut clip and sound to that"):
                    show()
    processor.feature_extractor.n_samples = 300 * 16_000  # as Qwen2.5-Omni's
    assert not published.cut_off(processor, np.zeros(300 * 16_000)) and published.cut_off(processor, np.zeros(301 * 16_000))


def test_records_on_which_the_encoders_fail_are_named(world, base, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(omni, "encode", fail)
    with pytest.raises(RuntimeError, match="cremad/train, records cremad/train/00000 to cremad/train/00001: out of memory"):
        encode_slot(world, "cremad", "train", base, tmp_path)


def test_missing_file_is_named_and_nothing_is_left(world, base, tmp_path, monkeypatch):
    good = records.read(world, "cremad", "train")
    gone = good[1]["media"][0]._replace(path=str(world / "gone.mp4"))
    bad = [good[0], good[1] | {"media": [gone, good[1]["media"][1]]}]
    monkeypatch.setattr(records, "read", lambda *args: bad)
    with pytest.raises(MediaError, match="gone.mp4"):
        encode_slot(world, "cremad", "train", base, tmp_path)
    assert not list(tmp_path.rglob("*.*"))


# ---------------------------------------------------------------- as the published loader shows media

def numbered(path, count, rate=5):
    """A clip whose frames are grey, each lighter than the one before."""
    write_video(path, [np.full((32, 32, 3), 20 + 4 * i, np.uint8) for i in range(count)], rate)
    return path


@pytest.mark.parametrize("count, frames, shown", [
    (50, 10, [0, 5, 11, 16, 22, 27, 33, 38, 44, 49]), (10, 10, range(10)), (30, 4, [0, 10, 19, 29]), (9, 10, [0, 8]), (2, 4, [0, 1]),
])  # fmt: skip
def test_published_frames_go_from_the_first_to_the_last(tmp_path, count, frames, shown):
    """Of a clip with fewer frames than are asked for, these two alone."""
    pictures = published.read_video(numbered(tmp_path / "v.mp4", count), frames)
    assert pictures.shape == (len(shown), 224, 224, 3)
    np.testing.assert_allclose(pictures.mean((1, 2, 3)), [20 + 4 * i for i in shown], atol=1.5)


def test_published_frames_are_those_that_a_cut_clip_shows_turned_as_it_is_marked(tmp_path):
    """24 frames, 4 a second, cut at 2 s: the first eight are in the file and not shown."""
    with av.open(str(tmp_path / "whole.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"g": "24", "sc_threshold": "0", "bf": "0", "crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for i in range(24):
            picture = np.full((32, 64, 3), 20 + 4 * i, np.uint8)
            picture[:, 32:] += 100
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "whole.mp4")) as old, av.open(str(tmp_path / "v.mp4"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.pts is not None:
                packet.stream, packet.pts, packet.dts = stream, *(n - int(2 / packet.time_base) for n in (packet.pts, packet.dts))
                new.mux(packet)
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    at = content.find(b"tkhd") + 44  # the matrix of the track's header: what is left comes to the top
    content[at:at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "v.mp4").write_bytes(content)
    pictures = published.read_video(tmp_path / "v.mp4", 4)
    np.testing.assert_allclose(pictures[:, :100].mean((1, 2, 3)), [20 + 4 * i for i in (8, 13, 18, 23)], atol=2)
    np.testing.assert_allclose(pictures[:, 124:].mean((1, 2, 3)), [120 + 4 * i for i in (8, 13, 18, 23)], atol=2)


def test_a_published_clip_of_one_frame_is_black_and_a_broken_one_an_error(tmp_path):
    assert not published.read_video(numbered(tmp_path / "v.mp4", 1), 4).any()
    assert len(published.read_video(tmp_path / "v.mp4", 4)) == 10
    (tmp_path / "bad.mp4").write_bytes(b"no clip")
    write_audio(tmp_path / "a.wav", np.full(16000, 0.1))
    for name in ("bad.mp4", "a.wav", "gone.mp4"):
        with pytest.raises(MediaError, match=name):
            published.read_video(tmp_path / name, 4)


def test_published_pictures_are_scaled_bicubically(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "i.png")
    write_audio(tmp_path / "a.wav", np.full(16000, 0.1))
    record = {"media": [tasks.MediaItem("image", str(tmp_path / "i.png"), "visual_path"),
                        tasks.MediaItem("audio", str(tmp_path / "a.wav"), "audio_path", 0)]}  # fmt: skip
    image, _ = published.load_media("ms3", record, 1)
    np.testing.assert_array_equal(image.data, np.asarray(Image.fromarray(noise).resize((224, 224), Image.Resampling.BICUBIC)))


def pieces(slot, samples, second=None):
    """Where what is heard comes from, as samples of the sound counted from 1; 0 where it is silent."""
    return published.sound(slot, np.arange(1, samples + 1, dtype=np.float64), second)


def test_published_sounds_are_cut_by_an_assumed_length():
    everything = np.arange(1, 160_001)
    for slot in ("ave", "ks", "a2v", "v2a", "avcap", "arig"):
        np.testing.assert_array_equal(pieces(slot, 160_000), everything)  # arig too, whatever its frame
        assert len(pieces(slot, 160_009)) in (160_000, 160_005)
    for slot, shares in (("s4", 5), ("ms3", 5), ("ref_avs", 10)):  # of the clip's own length, not seconds
        share = 96_000 // shares
        np.testing.assert_array_equal(pieces(slot, 96_000, 2), np.arange(2 * share + 1, 3 * share + 1))
        np.testing.assert_array_equal(pieces(slot, 96_003, shares), np.zeros(share))  # none is past the end
    np.testing.assert_array_equal(pieces("ave", 7_000), [*range(1, 7_001), *[0] * 9_000])
    for slot in ("meld", "cremad"):
        np.testing.assert_array_equal(pieces(slot, 80_000), np.arange(1, 64_001))
        np.testing.assert_array_equal(pieces(slot, 30_000), [*range(1, 30_001), *[0] * 34_000])


@pytest.mark.parametrize("share", [16_000, 1_601])
def test_published_sounds_of_music_are_ten_pieces_around_every_sixth_share(share):
    found = pieces("avqa", 60 * share + 7).reshape(10, 2 * share)
    half = -(-share // 2)  # an odd share begins its piece a sample early
    for row, place in zip(found, range(0, 60, 6), strict=True):
        wanted = np.arange(place * share - half + 1, (place + 2) * share - half + 1)
        np.testing.assert_array_equal(row, np.maximum(wanted, 0))


def test_published_training_records_of_s4_hear_the_first_share(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "3.png")
    write_audio(tmp_path / "a.wav", np.repeat(np.linspace(0.1, 0.5, 5), 16_000))
    media = [tasks.MediaItem("image", str(tmp_path / "3.png"), "image_path"),
             tasks.MediaItem("audio", str(tmp_path / "a.wav"), "audio_path", 3)]  # fmt: skip
    for fields, heard in (({"image_path": "3.png"}, 0.1), ({"visual_path": "3.png"}, 0.4)):
        _, sound = published.load_media("s4", {"media": media, **fields}, 1)
        assert sound.data.mean() == pytest.approx(heard, abs=1e-3)


def test_the_setting_gives_a_constant_clock_and_sight_before_sound(base, tmp_path):
    model, processor = load_base(base)
    write_audio(tmp_path / "a.wav", np.full(160_000, 0.1))
    record = {"media": [clip(tmp_path / "long.mp4", 60, 2), tasks.MediaItem("audio", str(tmp_path / "a.wav"), "audio_path")]}
    prompt = published.prepared("ks", processor, record, 10, "which ?")
    assert [float(s) for s in prompt["video_second_per_grid"]] == [2.0]  # its own would be 12
    (sample,) = omni.encode(model, [prompt])
    seen, heard = (sample["input_ids"] == token for token in (model.config.video_token_id, model.config.audio_token_id))
    assert seen.nonzero().max() < heard.nonzero().min()
    times = sample["position_ids"][0][seen].view(5, -1)
    assert ((times - times[0, 0]) == torch.arange(5)[:, None] * 2 * model.config.position_id_per_seconds).all()
    ids = prepared(processor, record, 10, "which ?")["input_ids"][0]  # by default they go in turns
    assert (ids == model.config.video_token_id).nonzero().max() > (ids == model.config.audio_token_id).nonzero().min()


def test_the_setting_joins_two_clips_and_refuses_sounds_that_the_base_would_cut(base, tmp_path):
    _, processor = load_base(base)
    write_audio(tmp_path / "a.wav", np.full(64_000, 0.1))
    sound = tasks.MediaItem("audio", str(tmp_path / "a.wav"), "audio_path")
    one, two = clip(tmp_path / "one.mp4", 10, 2), clip(tmp_path / "two.mp4", 20, 2)
    kinds = [(m.kind, len(m.data)) for m in published.load_media("a2v", {"media": [sound, one, two]}, 10)]
    assert kinds == [("audio", 64_000), ("video", 20)]
    prompt = published.prepared("a2v", processor, {"media": [sound, one, two]}, 10, "which ?")
    assert prompt["video_grid_thw"].tolist()[0][0] == 10 and [float(s) for s in prompt["video_second_per_grid"]] == [2.0]
    prompt = published.prepared("v2a", processor, {"media": [one, sound, sound]}, 10, "which ?")
    assert len(prompt["input_features"]) == 1
    assert prompt["feature_attention_mask"].sum() == 128_000 // processor.feature_extractor.hop_length
    write_audio(tmp_path / "long.wav", np.full(96_001, 0.1))
    long = sound._replace(path=str(tmp_path / "long.wav"))
    with pytest.raises(ValueError, match="compatibility is 'published'.*of v/7 to 12 s, and this base hears 10 s; take v2a out of slots"):
        published.prepared("v2a", processor, {"id": "v/7", "media": [one, long, long]}, 10, "which ?")


def test_the_stage_takes_the_setting_and_without_it_encodes_as_ever(world, base, tmp_path):
    for name, options in (("plain", {}), ("none", {"compatibility": "none"}), ("published", {"compatibility": "published"})):
        encode_all(world, ["cremad"], base, tmp_path / name, workers=1, **options)
    plain, same, other = (read_slot(tmp_path / name, "cremad", "train") for name in ("plain", "none", "published"))
    for a, b in zip(plain.samples, same.samples, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(plain.samples, other.samples, strict=True))
    assert plain.ids == other.ids and plain.targets == other.targets and plain.instructions == other.instructions
    with pytest.raises(ValueError, match="encode: compatibility is 'crab'; choose one of none, published"):
        encode_all(world, ["cremad"], base, tmp_path / "x", workers=1, compatibility="crab")
