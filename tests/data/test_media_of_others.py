"""Media as other people's tools leave them: loudness, time, pictures and streams, each by what was put in."""

import av
import numpy as np
import pytest
import soundfile
from made_media import agreed, blocks, encoded, film, grey, muxed, tone
from PIL import Image, PngImagePlugin
from test_media_fuzz import tones

from crab.data import media, probe, records
from crab.data.media import MediaError
from crab.models import published
from crab.world import generate


def sine(seconds, rate=48000, loud=0.5):
    return 2 * loud * tone(seconds, rate)[None]


GREYS = [grey(level) for level in range(20, 220, 5)]  # 40 frames, 4 s


# ---------------------------------------------------------------- loudness


@pytest.mark.parametrize(
    "name, codec",
    [
        ("a.mp4", "aac"), ("a.m4a", "aac"), ("a.mkv", "flac"), ("a.webm", "libopus"), ("a.mkv", "ac3"),
        ("a.mov", "pcm_s16le"), ("a.wav", None), ("a.flac", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout, channels", [("mono", 1), ("stereo", 2), ("5.1", 6)])
def test_sound_is_the_mean_of_its_channels_in_every_container(tmp_path, name, codec, layout, channels):
    wave, loudness = tones(np.random.default_rng(channels), 2, 48000, channels)
    if codec:
        muxed(tmp_path / name, sound=(codec, wave, 48000, layout, 0, 0))
    else:
        soundfile.write(tmp_path / name, wave.T, 48000)
    read = agreed(tmp_path / name, "audio")[3200:-3200]
    assert np.sqrt(2 * np.mean(read.astype(float) ** 2)) == pytest.approx(loudness, rel=0.08)


@pytest.mark.parametrize("name, codec", [("a.wav", None), ("a.mkv", "pcm_f32le")])
@pytest.mark.parametrize("peak", [0.5, 1.5, 20_000])
def test_floats_beyond_1_are_scaled_as_a_whole(tmp_path, name, codec, peak):
    wave = np.concatenate([sine(1, 16000, loud=peak / 4), sine(1, 16000, loud=peak)], 1)
    if codec:
        muxed(tmp_path / name, sound=(codec, wave, 16000, "mono", 0, 0))
    else:
        soundfile.write(tmp_path / name, wave[0], 16000, subtype="FLOAT")
    expected = wave[0] / max(peak, 1)
    np.testing.assert_allclose(agreed(tmp_path / name, "audio"), expected, atol=2e-3)
    np.testing.assert_allclose(media.read_audio(tmp_path / name, 0, 1), expected[:16000], atol=2e-3)


def test_what_decoders_and_filters_add_beyond_1_is_clipped(tmp_path):
    square = np.sign(sine(2))
    soundfile.write(tmp_path / "a.wav", square[0], 48000)
    muxed(tmp_path / "a.mp4", sound=("aac", square, 48000, "mono", 0, 0))
    for name in ("a.wav", "a.mp4"):
        read = agreed(tmp_path / name, "audio")
        assert np.abs(read).max() == 1 and np.abs(read).mean() > 0.9


# ---------------------------------------------------------------- time


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts", "v.mov"])
@pytest.mark.parametrize("begin, hole", [(1.5, 0), (0, 1), (0.4, 0.25)])
def test_sound_lies_where_its_time_stamps_say(tmp_path, name, begin, hole):
    path = muxed(tmp_path / name, GREYS, sound=("aac", sine(2), 48000, "mono", begin, hole))
    read = agreed(path, "audio")
    assert len(read) / 16000 == pytest.approx(2 + begin + hole, abs=0.06)
    at, half = np.arange(len(read)) / 16000, begin + 0.98
    silent = (at < begin - 0.06) | (at > half + 0.06) & (at < half + hole - 0.06)
    assert np.abs(read[silent]).max(initial=0) < 0.02
    for low, high in ((begin, half), (half + hole, 1.98 + begin + hole)):
        heard = read[(at > low + 0.06) & (at < high - 0.06)]
        assert np.sqrt(2 * np.mean(heard**2)) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts"])
def test_picture_and_sound_agree_on_time_0(tmp_path, name):
    """The sound begins 1 s before the picture, and all of it is heard; the first frame stands for the second before."""
    path = muxed(tmp_path / name, GREYS, range(10, 50), ("aac", sine(2), 48000, "mono", 0, 0))
    pictures, times = media.read_video(path, 5)
    np.testing.assert_allclose(pictures.mean((1, 2, 3)), [20, 45, 95, 145, 195], atol=8)
    np.testing.assert_allclose(times, [1, 1.5, 2.5, 3.5, 4.5], atol=0.11)  # a frame, where the encoder's delay counts
    assert media.clip_seconds(path) == pytest.approx(5, abs=0.04)
    assert probe.probe(str(path), "video").seconds == pytest.approx(media.clip_seconds(path), abs=1e-6)
    assert len(agreed(path, "audio")) / 16000 == pytest.approx(2, abs=0.06)


def test_sound_whose_time_stamps_jump_too_far_is_refused(tmp_path):
    path = muxed(tmp_path / "v.mkv", GREYS, sound=("aac", sine(2), 48000, "mono", 0, 4000))
    assert agreed(path, "audio") is None
    with pytest.raises(MediaError, match="v.mkv: has time stamps of sound that jump by 4000 s after 1.0 s; write"):
        media.read_audio(path)


@pytest.mark.parametrize("name, codec", [("v.mp4", "libx264"), ("v.mkv", "libx264"), ("v.webm", "libvpx")])
def test_probe_and_reader_agree_on_the_length_of_uneven_clips(tmp_path, name, codec):
    stamps = [0, 1, 9, 10, 29, 30]
    muxed(tmp_path / name, GREYS[:6], stamps, codec=codec)
    agreed(tmp_path / name, "video")  # and on its length
    assert 3 < media.clip_seconds(tmp_path / name) < 5


def test_a_clip_that_has_no_length_for_its_last_frame_shows_it_as_long_as_the_others(tmp_path):
    muxed(tmp_path / "v.wmv", GREYS, codec="wmv2")
    agreed(tmp_path / "v.wmv", "video")
    assert media.clip_seconds(tmp_path / "v.wmv") == pytest.approx(4, abs=0.01)


# ---------------------------------------------------------------- pictures

RAMP = np.kron(np.arange(256).reshape(16, 16), np.ones((14, 14))).astype(np.uint8)  # 224 x 224
SQUARE = np.zeros((224, 224), bool)
SQUARE[30:70, 100:140] = True


@pytest.mark.parametrize(
    "name, values",
    [
        ("i.png", RAMP.astype(np.uint16) * 257), ("i.tif", RAMP.astype(np.uint16) * 257),
        ("i.pgm", RAMP.astype(np.int32) * 257), ("i.tif", RAMP.astype(np.int32)),
        ("i.tif", RAMP.astype(np.float32) / 255), ("i.tif", RAMP.astype(np.float32)),
    ],
)  # fmt: skip
def test_pictures_of_other_depths_become_8_bits(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    np.testing.assert_array_equal(agreed(tmp_path / name, "image"), np.stack([RAMP] * 3, 2))
    assert (agreed(tmp_path / name, "mask") == (RAMP > 0)).all()


@pytest.mark.parametrize("values", [RAMP * 9.5 - 100, np.full((9, 9), np.nan), RAMP.astype(int) * 100_000])
def test_a_picture_that_does_not_say_what_is_white_is_refused(tmp_path, values):
    Image.fromarray(values.astype(np.int32 if values.dtype.kind == "i" else np.float32)).save(tmp_path / "i.tif")
    assert agreed(tmp_path / "i.tif", "image") is None
    with pytest.raises(MediaError, match="i.tif: holds values from .* white; save"):
        media.read_image(tmp_path / "i.tif")


def transparent(path, kind):
    """A red square on white that is transparent."""
    colours, opaque = np.where(SQUARE[..., None], [255, 0, 0], 255).astype(np.uint8), SQUARE * np.uint8(255)
    if kind == "RGBA":
        Image.fromarray(np.dstack([colours, opaque])).save(path)
    elif kind == "LA":
        Image.merge("LA", [Image.fromarray(~opaque // 2 + 128), Image.fromarray(opaque)]).save(path)
    elif kind == "P":
        picture = Image.fromarray(SQUARE.astype(np.uint8), "P")
        picture.putpalette([255, 255, 255, 255, 0, 0])
        picture.save(path, transparency=0)
    elif kind == "RGB":
        Image.fromarray(colours).save(path, transparency=(255, 255, 255))
    elif kind == "I;16":
        Image.fromarray(np.where(SQUARE, 9000, 65535).astype(np.uint16)).save(path, transparency=65535)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "I;16"])
def test_what_is_transparent_is_background_in_a_mask_and_white_in_a_picture(tmp_path, kind):
    transparent(tmp_path / "m.png", kind)
    assert (agreed(tmp_path / "m.png", "mask") == SQUARE).all()
    assert ((agreed(tmp_path / "m.png", "image") == 255).all(-1) == ~SQUARE).all()


@pytest.mark.parametrize("orientation, turn", [(1, np.asarray), (6, lambda a: np.rot90(a, 3)), (8, np.rot90)])
def test_malformed_marks_are_ignored_and_the_orientation_is_heeded(tmp_path, orientation, turn):
    """XResolution and others have types that cannot hold their values; Pillow fails when it writes them again."""
    tags = [(0x0112, 3, 1, orientation << 16), (0x0128, 7, 2, 0x6162 << 16), (0x011A, 5, 1, 0xFFFFFFF0)]
    body = b"".join(t.to_bytes(2) + k.to_bytes(2) + n.to_bytes(4) + v.to_bytes(4) for t, k, n, v in tags)
    mark = b"Exif\0\0MM\0*\0\0\0\x08" + len(tags).to_bytes(2) + body + bytes(4)
    Image.fromarray(blocks(1)[0]).save(tmp_path / "i.png", exif=mark)
    np.testing.assert_array_equal(agreed(tmp_path / "i.png", "image"), turn(blocks(1)[0]))


def test_a_picture_too_large_to_decode_is_refused_by_the_reader_too(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "i.png")
    assert agreed(tmp_path / "i.png", "image") is None and agreed(tmp_path / "i.png", "mask") is None


def test_compressed_text_that_is_too_long_is_refused(tmp_path):
    marks = PngImagePlugin.PngInfo()
    marks.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    Image.fromarray(RAMP).save(tmp_path / "i.png", pnginfo=marks)
    assert agreed(tmp_path / "i.png", "image") is None


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("read", [lambda path, n: media.read_video(path, n)[0], published.read_video])
@pytest.mark.parametrize("name", ["v.mkv", "v.mp4", "v.mov"])
def test_the_film_is_shown_not_a_still_before_it(tmp_path, name, read):
    path = muxed(tmp_path / name, GREYS, sound=("aac", sine(4), 48000, "mono", 0, 0), still=True)
    agreed(path, "video")
    means = read(path, 4).mean((1, 2, 3))
    assert (np.diff(means) > 30).all() and means[0] < 60
    assert len(agreed(path, "audio")) / 16000 == pytest.approx(4, abs=0.06)


def test_an_empty_or_second_sound_is_not_heard(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = [container.add_stream("pcm_s16le", rate=16000, layout="mono") for _ in range(4)]
        streams[1].disposition = av.stream.Disposition.visual_impaired
        streams[3].disposition = av.stream.Disposition.default
        container.start_encoding()
        for stream, loud in zip(streams[1:], (0.2, 0.4, 0.8), strict=True):
            container.mux(encoded(stream, sine(1, 16000, loud=loud)))
    assert np.abs(agreed(tmp_path / "a.mkv", "audio")).max() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("name", ["a:b.mp4", "50%03d.mp4", "x#y?.mkv"])
def test_names_that_mean_something_to_ffmpeg(tmp_path, monkeypatch, name):
    muxed(tmp_path / name, GREYS)
    monkeypatch.chdir(tmp_path)
    agreed(tmp_path / name, "video")
    assert probe.probe(name, "video").problem == "" and media.read_video(name, 2)[0].shape[0] == 2


def test_tags_that_are_not_utf_8(tmp_path):
    path = muxed(tmp_path / "v.avi", GREYS, codec="mpeg4")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Lavf", b"caf\xe9"))
    assert b"caf\xe9" in path.read_bytes() and agreed(path, "video") is not None


def test_flv_that_begins_with_sound(tmp_path):
    path = muxed(tmp_path / "v.flv", GREYS, sound=("aac", sine(4), 44100, "mono", 0, 0), codec="flv")
    assert agreed(path, "video") is not None and agreed(path, "audio") is not None


# ---------------------------------------------------------------- avi


def test_an_avi_of_10_frames_a_second_at_30_ticks_is_whole(tmp_path):
    path = tmp_path / "v.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        for packet in film(stream, GREYS, range(0, 120, 3), 30):
            packet.duration = 3
            container.mux(packet)
    agreed(path, "video")
    pictures, times = media.read_video(path, 4)
    np.testing.assert_allclose(times, [0.4, 1.4, 2.4, 3.4], atol=0.11)
    assert (np.diff(pictures.mean((1, 2, 3))) > 30).all()
    assert media.clip_seconds(path) == pytest.approx(4, abs=0.001)
    content = path.read_bytes()
    for part in (50, 80):
        path.write_bytes(content[: len(content) * part // 100])
        assert probe.probe(str(path), "video").problem == "truncated" and agreed(path, "video") is None


# ---------------------------------------------------------------- the generated tree


def test_a_built_tree_is_read_as_by_a_plain_reading(tmp_path):
    """Ten lines of PyAV, soundfile and Pillow, as the first reader had them: results of earlier runs stand."""
    slots, kinds = ["ucf", "ave", "s4", "a2v"], set()
    generate.build(tmp_path, 0, slots=slots, train=2, test=1, caption=1, workers=1, progress=False)
    for slot in slots:
        for record in records.read(tmp_path, slot, "train"):
            for item, data in zip(record["media"], records.load(record, 10), strict=True):
                kinds.add(item.path[-3:])
                if item.kind == "video":
                    with av.open(item.path) as container:
                        every = [(f.time, f) for f in container.decode(video=0)]
                    shown = [max(i for i, (t, _) in enumerate(every) if t <= (n + 0.5) + 1e-9) for n in range(10)]
                    plain = [every[i][1].to_ndarray(format="rgb24", width=224, height=224) for i in shown]
                    assert (data[0] == plain).all() and (data[1] == [every[i][0] for i in shown]).all()
                elif item.kind == "image":
                    assert (data == np.array(Image.open(item.path).convert("RGB"))).all()
                else:
                    wave, rate = soundfile.read(item.path, dtype="float32")
                    first = 0 if item.second is None else item.second * rate
                    assert rate == 16000 and (data == wave[first : None if item.second is None else first + rate]).all()
            if "mask" in record:
                assert (media.read_mask(record["mask"]) == np.array(Image.open(record["mask"]))).all()
    assert kinds == {"avi", "mp4", "mp3", "wav", "jpg"}
