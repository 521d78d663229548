import pickle
import re
import struct

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from crab.data import media, probe, records
from crab.data.media import MediaError


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def snr(clean, noisy):
    return 10 * np.log10(np.mean(clean**2) / np.mean((clean - noisy) ** 2))


def blocks(count, size=224):
    """Frames of 16-pixel grey-to-colour blocks, each frame different."""
    rng = np.random.default_rng(0)
    return np.repeat(np.repeat(rng.integers(40, 200, (count, size // 16, size // 16, 3)), 16, 1), 16, 2).astype(np.uint8)


def tone(seconds, rate, hertz=440):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
def test_a_video_survives_the_round_trip(tmp_path, name):
    frames = blocks(20)
    media.write_video(tmp_path / name, frames, 2)
    read, times = media.read_video(tmp_path / name, 20)
    assert read.shape == (20, 224, 224, 3) and read.dtype == np.uint8
    assert psnr(read, frames) > 30
    np.testing.assert_allclose(times, np.arange(20) / 2)


@pytest.mark.parametrize("count, expected", [
    (10, np.arange(10) + 0.5),  # two frames a second: the second of each pair begins at the middle
    (4, [1.0, 3.5, 6.0, 8.5]),  # middles 1.25, 3.75, 6.25, 8.75; a frame shows until the next one begins
    (1, [5.0]),
])
def test_frames_are_those_on_display_at_the_middles_and_their_times_are_their_own(tmp_path, count, expected):
    frames = blocks(20)
    media.write_video(tmp_path / "v.mp4", frames, 2)
    read, times = media.read_video(tmp_path / "v.mp4", count)
    np.testing.assert_allclose(times, expected)
    for picture, second in zip(read, times, strict=True):
        nearest = min(range(20), key=lambda i: np.abs(frames[i].astype(float) - picture).mean())
        assert nearest == second * 2


def test_uneven_time_stamps_are_the_files_own(tmp_path):
    path = tmp_path / "v.mp4"
    stamps = [0, 100, 900, 1000, 2900, 3000]  # milliseconds
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for stamp, picture in zip(stamps, blocks(6, 64), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = stamp
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    _, times = media.read_video(path, 3)  # about 3 s: middles near 0.5, 1.5, 2.5
    np.testing.assert_allclose(times, [0.1, 1.0, 1.0], atol=1e-6)


def test_an_avi_without_presentation_times(tmp_path):
    path = tmp_path / "v.avi"
    frames = blocks(20)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4, bit_rate=4_000_000)
        stream.width = stream.height = 224
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    read, times = media.read_video(path, 5)
    np.testing.assert_allclose(times, np.arange(5) + 0.5)
    assert psnr(read, frames[2::4]) > 25


def cut(source, target, start, end):
    """A copy of the packets from the key frame before `start` s to `end` s; an edit list says to show them from `start` on."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream, into = old.streams.video[0], new.add_stream_from_template(old.streams.video[0])
        old.seek(int(start * 1e6))
        for packet in old.demux(stream):
            if packet.pts is not None and packet.pts * stream.time_base < end:
                packet.pts, packet.dts = (stamp - int(start / stream.time_base) for stamp in (packet.pts, packet.dts))
                packet.stream = into
                new.mux(packet)
    return target


@pytest.mark.parametrize("bframes", [0, 3])
def test_a_clip_cut_without_encoding_it_anew_is_its_own_part_alone(tmp_path, bframes):
    """20 s at 4 frames/s with a key frame every 10 s, cut to 6 to 16 s: the 24 frames from 0 to 6 s are decoded and not shown."""
    with av.open(str(tmp_path / "whole.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"g": "40", "sc_threshold": "0", "bf": str(bframes), "crf": "5"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(80):
            picture = np.full((64, 64, 3), 20 + 10 * (i // 4), np.uint8)  # the second, in grey
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    path = cut(tmp_path / "whole.mp4", tmp_path / "v.mp4", 6, 16)
    read, times = media.read_video(path, 10)
    np.testing.assert_allclose(times, np.arange(10) + 0.5, atol=1e-6)
    np.testing.assert_allclose(read.mean((1, 2, 3)), 20 + 10 * np.arange(6, 16), atol=3)
    assert records.clip_seconds(path) == pytest.approx(10)
    assert probe.probe(str(path), "video") == probe.probe(str(path), "whole video") == probe.Probe(seconds=pytest.approx(10))
    content = bytearray(path.read_bytes())
    at = content.find(b"elst") + 12  # the length of the one edit, in ms: now it also ends before the next key frame, 4 s on
    content[at:at + 4] = struct.pack(">I", 2000)
    path.write_bytes(content)
    np.testing.assert_allclose(media.read_video(path, 2)[0].mean((1, 2, 3)), [80, 90], atol=3)
    assert probe.probe(str(path), "video") == probe.Probe(seconds=pytest.approx(2))


def turned(path, matrix):
    """Mark an mp4 as to be shown turned: the matrix (a, b, c, d) of its track header."""
    content = bytearray(path.read_bytes())
    at = content.find(b"tkhd") + 4 + 4 + 20 + 16  # version and flags; times, number and length; layer, group and loudness
    a, b, c, d = (v << 16 for v in matrix)
    content[at:at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("matrix, exif, sides", [  # where the white left half and the black right half come to lie
    ((1, 0, 0, 1), 1, "left right"), ((0, 1, -1, 0), 6, "top bottom"), ((-1, 0, 0, -1), 3, "right left"), ((0, -1, 1, 0), 8, "bottom top"),
])  # fmt: skip
def test_what_is_marked_as_turned_is_shown_upright(tmp_path, matrix, exif, sides):
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, :64] = 255
    media.write_video(tmp_path / "v.mp4", [picture] * 4, 2)
    turned(tmp_path / "v.mp4", matrix)
    mark = Image.Exif()
    mark[0x0112] = exif
    Image.fromarray(picture).save(tmp_path / "i.png", exif=mark)
    part = {"left": np.s_[:, :100], "right": np.s_[:, 124:], "top": np.s_[:100], "bottom": np.s_[124:]}
    white, black = map(part.get, sides.split())
    for shown in (media.read_video(tmp_path / "v.mp4", 2)[0][1], media.read_image(tmp_path / "i.png")):
        assert shown.shape == (224, 224, 3) and shown[white].min() > 200 and shown[black].max() < 50


def filmed(path, count, codec="libx264", **options):
    """A clip of `count` frames of moving blocks, 30 a second."""
    scene = blocks(1, 64)[0]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(scene, 3 * i, 1), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name, options", [
    ("v.mp4", {"bf": "3"}),
    ("v.mp4", {"bf": "0"}),
    ("v.mp4", {"bf": "8", "x264-params": "b-pyramid=strict:b-adapt=0:keyint=20:open-gop=1"}),
    ("v.mp4", {"bf": "3", "flags": "+ildct+ilme", "x264-params": "tff=1"}),
    ("v.mkv", {"bf": "3"}),  # time stamps in milliseconds
    ("v.ts", {"bf": "3"}),  # first time stamp not 0
    ("v.avi", {"bf": "3"}),  # its frames seem to go back in time
    ("v.mp4", {"codec": "mpeg4", "bf": "2"}),
    ("v.webm", {"codec": "libvpx-vp9", "deadline": "realtime"}),
])
@pytest.mark.parametrize("count, frames", [(90, 10), (47, 7), (5, 8), (1, 2)])
def test_frames_that_are_skipped_change_nothing(tmp_path, name, options, count, frames):
    path = filmed(tmp_path / name, count, **options)
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


def test_frames_that_nothing_hangs_on_are_not_decoded(tmp_path, monkeypatch):
    decoded, count = [], media._decoded
    monkeypatch.setattr(media, "_decoded", lambda *a: (decoded.append(f.pts) or f for f in count(*a)))
    media.read_video(filmed(tmp_path / "v.mp4", 90, bf="3"), 5)
    assert len(decoded) < 60
    # packets whose time stamps are not those of the frames they hold: all frames are decoded, none is missed
    stamps = media._stamps
    monkeypatch.setattr(media, "_stamps", lambda *a: ([s + 1 for s in stamps(*a)[0]], stamps(*a)[1] + 1))
    decoded.clear()
    media.read_video(tmp_path / "v.mp4", 5)
    assert len(set(decoded)) > 80  # up to the last one taken


def test_a_clip_with_too_few_frames_repeats_some(tmp_path):
    media.write_video(tmp_path / "v.mp4", blocks(2), 1)
    read, times = media.read_video(tmp_path / "v.mp4", 4)
    np.testing.assert_allclose(times, [0, 0, 1, 1])
    assert (read[0] == read[1]).all()


def test_writing_twice_gives_the_same_bytes(tmp_path):
    frames, wave = blocks(6), tone(1, 16000)
    for name in ("a", "b"):
        media.write_video(tmp_path / f"{name}.mp4", frames, 2)
        media.write_video(tmp_path / f"{name}.avi", frames, 2)
        media.write_audio(tmp_path / f"{name}.mp3", wave)
        media.write_audio(tmp_path / f"{name}.wav", wave)
        media.write_image(tmp_path / f"{name}.jpg", frames[0])
        media.write_mask(tmp_path / f"{name}.png", frames[0, :, :, 0] > 99)
    for suffix in ("mp4", "avi", "mp3", "wav", "jpg", "png"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 12  # nothing left beside them


@pytest.mark.parametrize("suffix, floor", [(".wav", 60), (".mp3", 20)])
def test_sound_survives_the_round_trip(tmp_path, suffix, floor):
    wave = tone(3, 16000)
    media.write_audio(tmp_path / f"a{suffix}", wave)
    read = media.read_audio(tmp_path / f"a{suffix}")
    assert read.dtype == np.float32 and read.shape == wave.shape  # mp3's encoder delay is cut off again
    assert snr(wave, read) > floor


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_and_channels_become_16_khz_mono(tmp_path, rate):
    wave = tone(2, rate)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, 0 * wave], 1), rate)
    read = media.read_audio(tmp_path / "a.wav")
    assert read.shape == (32000,)
    middle = slice(1000, -1000)  # the filter's edges
    assert snr(tone(2, 16000)[middle] / 2, read[middle]) > 35


def test_a_window_of_sound(tmp_path):
    wave = np.concatenate([np.zeros(16000), tone(1, 16000), np.zeros(8000)])
    media.write_audio(tmp_path / "a.wav", wave)
    np.testing.assert_allclose(media.read_audio(tmp_path / "a.wav", 1, 2), wave[16000:32000], atol=1e-4)
    assert media.read_audio(tmp_path / "a.wav", 2, 3).shape == (8000,)  # cut at the end


def test_the_sound_of_a_video_file(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(1, 44100)[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    read = media.read_audio(path)
    assert abs(len(read) - 16000) < 1500  # aac pads
    assert np.abs(np.fft.rfft(read[:16000])).argmax() == pytest.approx(440, abs=8)


def test_images_and_masks(tmp_path):
    picture = blocks(1)[0]
    media.write_image(tmp_path / "a.jpg", picture)
    assert psnr(media.read_image(tmp_path / "a.jpg"), picture) > 30
    Image.fromarray(picture).convert("L").resize((640, 360)).save(tmp_path / "b.png")
    assert media.read_image(tmp_path / "b.png").shape == (224, 224, 3)
    mask = np.zeros((224, 224), bool)
    mask[10:50, 20:30] = True
    media.write_mask(tmp_path / "m.png", mask)
    assert (media.read_mask(tmp_path / "m.png") == mask).all()
    Image.fromarray(np.where(mask[..., None], [0, 128, 0], 0).astype(np.uint8)).save(tmp_path / "rgb.png")
    assert (media.read_mask(tmp_path / "rgb.png") == mask).all()
    Image.fromarray(mask).resize((448, 448), Image.Resampling.NEAREST).save(tmp_path / "big.png")
    assert (media.read_mask(tmp_path / "big.png") == mask).all()


def spoil(folder):
    """One bad file for each fault."""
    media.write_video(folder / "good.mp4", blocks(20), 2)
    whole = (folder / "good.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with av.open(str(folder / "good.mp4")) as source, av.open(
        str(folder / "front.mp4"), "w", options={"movflags": "faststart"}
    ) as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    whole = (folder / "front.mp4").read_bytes()
    (folder / "front.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").touch()
    (folder / "empty.wav").touch()
    soundfile.write(folder / "zero.wav", np.zeros(0), 16000)
    media.write_audio(folder / "sound.wav", tone(1, 16000))
    media.write_audio(folder / "sound.mp3", tone(1, 16000))
    soundfile.write(folder / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    (folder / "text.wav").write_text("not sound")
    (folder / "text.png").write_text("not an image")
    media.write_image(folder / "image.png", blocks(1)[0])
    (folder / "cut.png").write_bytes((folder / "image.png").read_bytes()[:200])


@pytest.mark.parametrize("read, name, fault", [
    (lambda p: media.read_video(p, 10), "missing.mp4", "does not exist"),
    (lambda p: media.read_video(p, 10), ".", "is a folder"),
    (lambda p: media.read_video(p, 10), "cut.mp4", "cannot be decoded as video"),
    (lambda p: media.read_video(p, 10), "front.mp4", "truncated"),
    (lambda p: media.read_video(p, 10), "empty.mp4", "cannot be decoded as video"),
    (lambda p: media.read_video(p, 10), "sound.mp3", "no video stream"),
    (media.read_audio, "missing.wav", "does not exist"),
    (media.read_audio, "empty.wav", "is empty"),
    (media.read_audio, "zero.wav", "zero length"),
    (media.read_audio, "text.wav", "cannot be decoded as sound"),
    (media.read_audio, "nan.wav", "not numbers"),
    (media.read_audio, "good.mp4", "no sound stream"),
    (lambda p: media.read_audio(p, 1, 2), "sound.wav", "no sound between"),
    (media.read_image, "missing.png", "does not exist"),
    (media.read_image, "text.png", "cannot be decoded as an image"),
    (media.read_mask, "cut.png", "cannot be decoded as an image"),
])
def test_bad_media_is_named_with_its_mend(tmp_path, read, name, fault):
    spoil(tmp_path)
    with pytest.raises(MediaError, match=fault) as caught:
        read(tmp_path / name)
    assert re.match(rf"{re.escape(str(tmp_path / name))}: .+; .+", str(caught.value), re.S)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # crosses a process pool


def test_nothing_half_written_stays(tmp_path):
    frames = [*blocks(2), np.zeros((10, 10, 3), np.uint8)]
    with pytest.raises(ValueError, match="a frame is"):
        media.write_video(tmp_path / "v.mp4", frames, 2)
    for path, wave in (("a.ogg", tone(1, 8000)), ("a.wav", np.zeros(0)), ("a.wav", np.zeros((2, 5)))):
        with pytest.raises(ValueError, match=re.escape(path)):
            media.write_audio(tmp_path / path, wave)
    with pytest.raises(ValueError, match="first frame"):
        media.write_video(tmp_path / "v.mp4", [], 2)
    with pytest.raises(ValueError, match="v.webm: a clip is written as .mp4 or .avi"):
        media.write_video(tmp_path / "v.webm", blocks(2), 2)
    assert not list(tmp_path.iterdir())
