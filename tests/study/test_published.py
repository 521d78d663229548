"""Media as the published loader shows them."""

import struct

import av
import numpy as np
import pytest
import torch
from PIL import Image

from crab import tasks
from crab.data.media import MediaError, write_audio, write_video
from crab.models import omni, published
from crab.models.checkpoint import load_base
from crab.samples.inputs import prepared


def clip(path, seconds, rate):
    write_video(
        path, np.random.default_rng(0).integers(0, 255, (round(seconds * rate), 32, 32, 3), dtype=np.uint8), rate
    )
    return tasks.MediaItem("video", str(path), "video_path")


def numbered(path, count, rate=5):
    """A clip whose frames are grey, each lighter than the one before."""
    write_video(path, [np.full((32, 32, 3), 20 + 4 * i, np.uint8) for i in range(count)], rate)
    return path


@pytest.mark.parametrize(
    ("count", "frames", "shown"),
    [
        (50, 10, [0, 5, 11, 16, 22, 27, 33, 38, 44, 49]),
        (10, 10, range(10)),
        (30, 4, [0, 10, 19, 29]),
        (9, 10, [0, 8]),
        (2, 4, [0, 1]),
    ],
)
def test_published_frames_go_from_the_first_to_the_last(tmp_path, count, frames, shown):
    """Of a clip with fewer frames than are asked for, these two alone."""
    pictures = published.read_video(numbered(tmp_path / "v.mp4", count), frames)
    assert pictures.shape == (len(shown), 224, 224, 3)
    np.testing.assert_allclose(pictures.mean((1, 2, 3)), [20 + 4 * i for i in shown], atol=1.5)


def test_published_frames_are_those_that_a_cut_clip_shows_turned_as_it_is_marked(tmp_path):
    """24 frames, 4 a second, cut at 2 s: the first eight are in the file and not shown."""
    with av.open(str(tmp_path / "whole.mp4"), "w") as container:
        stream = container.add_stream(
            "libx264", rate=4, options={"g": "24", "sc_threshold": "0", "bf": "0", "crf": "5"}
        )
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
                packet.stream, packet.pts, packet.dts = (
                    stream,
                    *(n - int(2 / packet.time_base) for n in (packet.pts, packet.dts)),
                )
                new.mux(packet)
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    at = content.find(b"tkhd") + 44  # the matrix of the track's header: what is left comes to the top
    content[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
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
    np.testing.assert_array_equal(
        image.data, np.asarray(Image.fromarray(noise).resize((224, 224), Image.Resampling.BICUBIC))
    )


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
    rows = pieces("avqa", 60 * share + 7).reshape(10, 2 * share)
    half = -(-share // 2)  # an odd share begins its piece a sample early
    for row, place in zip(rows, range(0, 60, 6), strict=True):
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
    record = {
        "media": [clip(tmp_path / "long.mp4", 60, 2), tasks.MediaItem("audio", str(tmp_path / "a.wav"), "audio_path")]
    }
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
    assert prompt["video_grid_thw"].tolist()[0][0] == 10 and [float(s) for s in prompt["video_second_per_grid"]] == [
        2.0
    ]
    prompt = published.prepared("v2a", processor, {"media": [one, sound, sound]}, 10, "which ?")
    assert len(prompt["input_features"]) == 1
    assert prompt["feature_attention_mask"].sum() == 128_000 // processor.feature_extractor.hop_length
    write_audio(tmp_path / "long.wav", np.full(96_001, 0.1))
    long = sound._replace(path=str(tmp_path / "long.wav"))
    with pytest.raises(
        ValueError,
        match="compatibility is 'published'.*of v/7 to 12 s, and this base hears 10 s; take v2a out of",
    ):
        published.prepared("v2a", processor, {"id": "v/7", "media": [one, long, long]}, 10, "which ?")
