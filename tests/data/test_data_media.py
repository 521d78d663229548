"""Readers against what was written, against all frames decoded by FFmpeg, and against marked and damaged files."""

import pickle
import re
import struct
from functools import partial

import av
import numpy as np
import pytest
import soundfile
from made_media import blocks, muxed, remux, tone
from PIL import Image

from crab.data import containers, media, probe
from crab.data.media import MediaError

write_clip = partial(media.write_video, fps=2)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def snr(clean, noisy):
    return 10 * np.log10(np.mean(clean**2) / np.mean((clean - noisy) ** 2))


def moving(path, count, **options):
    """A clip of moving blocks."""
    return muxed(path, [np.roll(blocks(1, 64)[0], 3 * i, 1) for i in range(count)], rate=30, **options)


# ---------------------------------------------------------------- clips


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
def test_a_video_survives_the_round_trip(tmp_path, name):
    frames = blocks(20)
    media.write_video(tmp_path / name, frames, 2)
    read, times = media.read_video(tmp_path / name, 20)
    assert read.shape == (20, 224, 224, 3) and read.dtype == np.uint8 and psnr(read, frames) > 30
    np.testing.assert_allclose(times, np.arange(20) / 2)


@pytest.mark.parametrize(
    "count, expected",
    [
        (10, np.arange(10) + 0.5),  # two frames a second: the second of each pair begins at the middle
        (4, [1.0, 3.5, 6.0, 8.5]),  # middles 1.25, 3.75, 6.25, 8.75; a frame shows until the next one begins
        (1, [5.0]),
    ],
)
def test_frames_are_on_display_at_the_middles_and_have_their_own_times(tmp_path, count, expected):
    frames = blocks(20)
    media.write_video(tmp_path / "v.mp4", frames, 2)
    read, times = media.read_video(tmp_path / "v.mp4", count)
    np.testing.assert_allclose(times, expected)
    for picture, second in zip(read, times, strict=True):
        assert np.abs(frames.astype(float) - picture).mean((1, 2, 3)).argmin() == second * 2


def test_uneven_time_stamps_are_used(tmp_path):
    path = muxed(tmp_path / "v.mp4", blocks(6, 64), [0, 100, 900, 1000, 2900, 3000], rate=1000)
    _, times = media.read_video(path, 3)  # about 3 s: middles near 0.5, 1.5, 2.5
    np.testing.assert_allclose(times, [0.1, 1.0, 1.0], atol=1e-6)


def test_a_clip_with_too_few_frames_repeats_some(tmp_path):
    media.write_video(tmp_path / "v.mp4", blocks(2), 1)
    read, times = media.read_video(tmp_path / "v.mp4", 4)
    np.testing.assert_allclose(times, [0, 0, 1, 1])
    assert (read[0] == read[1]).all()


@pytest.mark.parametrize("bframes", [0, 3])
def test_frames_that_an_edit_list_hides_are_not_shown(tmp_path, bframes):
    """20 s at 4 frames/s, a key frame every 10 s, cut to 6 to 16 s: the frames of 0 to 6 s are decoded and hidden."""
    seconds = [np.full((64, 64, 3), 20 + 10 * (i // 4), np.uint8) for i in range(80)]  # the second, in grey
    options = {"g": "40", "sc_threshold": "0", "bf": str(bframes), "crf": "5"}
    path = remux(muxed(tmp_path / "whole.mp4", seconds, rate=4, **options), tmp_path / "v.mp4", 6, 16)
    read, times = media.read_video(path, 10)
    np.testing.assert_allclose(times, np.arange(10) + 0.5, atol=1e-6)
    np.testing.assert_allclose(read.mean((1, 2, 3)), 20 + 10 * np.arange(6, 16), atol=3)
    assert media.clip_seconds(path) == pytest.approx(10)
    assert probe.probe(str(path), "video") == probe.probe(str(path), "whole video")
    assert probe.probe(str(path), "video") == probe.Probe(seconds=pytest.approx(10))
    content = bytearray(path.read_bytes())
    at = content.find(b"elst") + 12  # length of the edit in ms: now it also ends before the next key frame, 4 s later
    content[at : at + 4] = struct.pack(">I", 2000)
    path.write_bytes(content)
    np.testing.assert_allclose(media.read_video(path, 2)[0].mean((1, 2, 3)), [80, 90], atol=3)
    assert probe.probe(str(path), "video") == probe.Probe(seconds=pytest.approx(2))


@pytest.mark.parametrize(
    "matrix, exif, sides",  # where the white left half and the black right half must appear
    [((1, 0, 0, 1), 1, "left right"), ((0, 1, -1, 0), 6, "top bottom")]
    + [((-1, 0, 0, -1), 3, "right left"), ((0, -1, 1, 0), 8, "bottom top")],
)
def test_pictures_that_are_marked_as_rotated_are_upright(tmp_path, matrix, exif, sides):
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, :64] = 255
    media.write_video(tmp_path / "v.mp4", [picture] * 4, 2)
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    at = content.find(b"tkhd") + 4 + 4 + 20 + 16  # version and flags; times, number, length; layer, group, loudness
    a, b, c, d = (value << 16 for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "v.mp4").write_bytes(content)
    mark = Image.Exif()
    mark[0x0112] = exif
    Image.fromarray(picture).save(tmp_path / "i.png", exif=mark)
    part = {"left": np.s_[:, :100], "right": np.s_[:, 124:], "top": np.s_[:100], "bottom": np.s_[124:]}
    white, black = map(part.get, sides.split())
    for shown in (media.read_video(tmp_path / "v.mp4", 2)[0][1], media.read_image(tmp_path / "i.png")):
        assert shown.shape == (224, 224, 3) and shown[white].min() > 200 and shown[black].max() < 50


@pytest.mark.parametrize(
    "name, options",
    [
        ("v.mp4", {"bf": "3"}),
        ("v.mp4", {"bf": "0"}),
        ("v.mp4", {"bf": "8", "x264-params": "b-pyramid=strict:b-adapt=0:keyint=20:open-gop=1"}),
        ("v.mp4", {"bf": "3", "flags": "+ildct+ilme", "x264-params": "tff=1"}),
        ("v.mkv", {"bf": "3"}),  # time stamps in milliseconds
        ("v.ts", {"bf": "3"}),  # the first time stamp is not 0
        ("v.avi", {"bf": "3"}),  # its frames seem to go back in time
        ("v.mp4", {"codec": "mpeg4", "bf": "2"}),
        ("v.webm", {"codec": "libvpx-vp9", "deadline": "realtime"}),
    ],
)
@pytest.mark.parametrize("count, frames", [(90, 10), (47, 7), (5, 8), (1, 2)])
def test_skipped_frames_change_nothing(tmp_path, name, options, count, frames):
    path = moving(tmp_path / name, count, **options)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [(p.dts if p.pts is None else p.pts, p.duration) for p in container.demux(stream) if p.size]
        container.seek(0)
        pictures = [f.to_ndarray(format="rgb24", width=224, height=224) for f in container.decode(stream)]
        begin, *_, (last, length) = sorted(packets) if count > 1 else 2 * packets
        seconds = [float((stamp - begin[0]) * stream.time_base) for stamp, _ in sorted(packets)]
        end = float((last + length - begin[0]) * stream.time_base)
    shown = [sum(s <= (i + 0.5) * end / frames + 1e-9 for s in seconds) - 1 for i in range(frames)]
    read, times = media.read_video(path, frames)
    np.testing.assert_allclose(times, [seconds[n] for n in shown], atol=1e-9)
    assert len(pictures) == count and (read == np.stack([pictures[n] for n in shown])).all()


def test_frames_that_no_other_needs_are_not_decoded(tmp_path, monkeypatch):
    decoded, real, stamps = [], media._decoded, media.picture_stamps
    monkeypatch.setattr(media, "_decoded", lambda *a: (decoded.append(f.pts) or f for f in real(*a)))
    media.read_video(moving(tmp_path / "v.mp4", 90, bf="3"), 5)
    assert len(decoded) < 60
    # packets without the time stamps of their frames: all frames up to the last one taken are decoded
    monkeypatch.setattr(media, "picture_stamps", lambda *a: ([s + 1 for s in stamps(*a)[0]], stamps(*a)[1] + 1))
    decoded.clear()
    media.read_video(tmp_path / "v.mp4", 5)
    assert len(set(decoded)) > 80


@pytest.mark.parametrize("rest, cut", [(b"", True), (bytes(4), True), (bytes(8), False), (bytes(7) + b"\x20", True)])
def test_a_box_with_a_long_length_ends_the_search(tmp_path, rest, cut):
    """Of 64 bits, behind the name: absent, cut, 0 or beyond the end."""
    path = tmp_path / "v.mp4"
    path.write_bytes(b"\0\0\0\x10ftypisom\0\0\2\0" + b"\0\0\0\1mdat" + rest)
    assert containers._box_cut(path) is cut


# ---------------------------------------------------------------- sound, images, masks


@pytest.mark.parametrize("size", [0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_a_wav_whose_writer_could_not_seek_is_whole_and_half_a_wav_is_not(tmp_path, size):
    soundfile.write(tmp_path / "a.wav", tone(10), 16000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    (tmp_path / "half.wav").write_bytes(content[: len(content) // 2])
    content[4:8], content[40:44] = struct.pack("<I", min(size + 36, 0xFFFFFFFF)), struct.pack("<I", size)
    (tmp_path / "open.wav").write_bytes(content)
    assert media.read_audio(tmp_path / "open.wav").shape == (160000,)
    with pytest.raises(MediaError, match="is truncated: it ends before the 10.0 s that it promises"):
        media.read_audio(tmp_path / "half.wav")


@pytest.mark.parametrize("suffix, floor", [(".wav", 60), (".mp3", 20)])
def test_sound_survives_the_round_trip(tmp_path, suffix, floor):
    media.write_audio(tmp_path / f"a{suffix}", tone(3))
    read = media.read_audio(tmp_path / f"a{suffix}")
    assert read.dtype == np.float32 and read.shape == (48000,)  # the delay of the mp3 encoder is cut off again
    assert snr(tone(3), read) > floor


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_and_channels_become_16_khz_mono(tmp_path, rate):
    wave = tone(2, rate)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, 0 * wave], 1), rate)
    read = media.read_audio(tmp_path / "a.wav")
    middle = slice(1000, -1000)  # without the edges of the filter
    assert read.shape == (32000,) and snr(tone(2)[middle] / 2, read[middle]) > 35


def test_a_window_of_sound(tmp_path):
    wave = np.concatenate([np.zeros(16000), tone(1), np.zeros(8000)])
    media.write_audio(tmp_path / "a.wav", wave)
    np.testing.assert_allclose(media.read_audio(tmp_path / "a.wav", 1, 2), wave[16000:32000], atol=1e-4)
    assert media.read_audio(tmp_path / "a.wav", 2, 3).shape == (8000,)  # cut at the end


def test_the_sound_of_a_video_file(tmp_path):
    path = muxed(tmp_path / "a.mp4", sound=("aac", tone(1, 44100)[None], 44100, "mono", 0, 0))
    read = media.read_audio(path)
    assert abs(len(read) - 16000) < 1500  # aac pads
    assert np.abs(np.fft.rfft(read[:16000])).argmax() == pytest.approx(440, abs=8)


def test_images_and_masks(tmp_path):
    picture, mask = blocks(1)[0], np.zeros((224, 224), bool)
    mask[10:50, 20:30] = True
    media.write_image(tmp_path / "a.jpg", picture)
    assert psnr(media.read_image(tmp_path / "a.jpg"), picture) > 30
    Image.fromarray(picture).convert("L").resize((640, 360)).save(tmp_path / "b.png")
    assert media.read_image(tmp_path / "b.png").shape == (224, 224, 3)
    media.write_mask(tmp_path / "m.png", mask)
    Image.fromarray(np.where(mask[..., None], [0, 128, 0], 0).astype(np.uint8)).save(tmp_path / "rgb.png")
    Image.fromarray(mask).resize((448, 448), Image.Resampling.NEAREST).save(tmp_path / "big.png")
    for name in ("m.png", "rgb.png", "big.png"):
        assert (media.read_mask(tmp_path / name) == mask).all()


# ---------------------------------------------------------------- writers and faults


def test_the_same_input_gives_the_same_bytes(tmp_path):
    frames = blocks(6)
    for name in ("a", "b"):
        media.write_video(tmp_path / f"{name}.mp4", frames, 2)
        media.write_video(tmp_path / f"{name}.avi", frames, 2)
        media.write_audio(tmp_path / f"{name}.mp3", tone(1))
        media.write_audio(tmp_path / f"{name}.wav", tone(1))
        media.write_image(tmp_path / f"{name}.jpg", frames[0])
        media.write_mask(tmp_path / f"{name}.png", frames[0, :, :, 0] > 99)
    for suffix in ("mp4", "avi", "mp3", "wav", "jpg", "png"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 12  # nothing is left beside them


@pytest.mark.parametrize(
    "read, name, fault, problem",
    [
        (media.read_image, "missing.png", "does not exist", "missing"),
        (lambda path: media.read_video(path, 10), ".", "is a folder", "not a file"),
        (lambda path: media.read_audio(path, 1, 2), "a.wav", "no sound between", "no such second"),
        (media.read_audio, "nan.wav", "not numbers", "undecodable"),
    ],
)
def test_an_error_names_file_fault_and_fix(tmp_path, read, name, fault, problem):
    """`test_data_probe` has more files that readers refuse."""
    media.write_audio(tmp_path / "a.wav", tone(1))
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(MediaError, match=fault) as caught:
        read(tmp_path / name)
    assert re.match(rf"{re.escape(str(tmp_path / name))}: .+; .+", str(caught.value))
    assert caught.value.problem == problem
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # it crosses a process pool


@pytest.mark.parametrize(
    "write, name, value, words",
    [
        (write_clip, "v.mp4", [*blocks(2), np.zeros((10, 10, 3), np.uint8)], "a frame is"),
        (write_clip, "v.mp4", [], "first frame"),
        (write_clip, "v.webm", blocks(2), "v.webm: a clip is written as .mp4 or .avi"),
        (media.write_audio, "a.ogg", tone(1), "a.ogg: sound is written as"),
        (media.write_audio, "a.wav", np.zeros(0), "a.wav: sound has shape"),
        (media.write_audio, "a.wav", np.zeros((2, 5)), "a.wav: sound has shape"),
    ],
)
def test_wrong_input_leaves_no_file(tmp_path, write, name, value, words):
    with pytest.raises(ValueError, match=words):
        write(tmp_path / name, value)
    assert not list(tmp_path.iterdir())
