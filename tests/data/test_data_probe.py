"""Probing of one file, against what the readers do with it; and of many, with decoders that never end."""

import os
import signal
import sqlite3
import time

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from crab.data import media, probe
from crab.data.media import MediaError


def noise(count, size=64):
    return np.random.default_rng(0).integers(0, 255, (count, size, size, 3), dtype=np.uint8)


def tone(seconds, rate=16000):
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)


def remux(source, target, **options):
    with av.open(str(source)) as old, av.open(str(target), "w", **options) as new:
        stream = new.add_stream_from_template(old.streams[0])
        for packet in old.demux(old.streams[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


def sparse(path, head):
    """A file of 200 GB that takes no room: zeros, which FFmpeg reads in search of the next part."""
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(200 << 30)


def endless(folder):
    """A clip that keeps FFmpeg busy for hours; skips the test where files cannot have holes."""
    try:
        sparse(folder / "endless.avi", b"RIFF\xff\xff\xff\x7fAVI ")
    except OSError:
        pytest.skip("this file system has no sparse files")
    return folder / "endless.avi"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for name in ("v.mp4", "v.avi"):
        media.write_video(folder / name, noise(20), 2)
    remux(folder / "v.mp4", folder / "front.mp4", options={"movflags": "faststart"})
    remux(folder / "v.mp4", folder / "pieces.mp4", options={"movflags": "frag_keyframe+empty_moov"})
    remux(folder / "v.mp4", folder / "v.mkv")
    for name in ("a.wav", "a.mp3"):
        media.write_audio(folder / name, tone(3))
    remux(folder / "a.mp3", folder / "a.mkv")
    soundfile.write(folder / "a.flac", tone(3), 16000)
    for name in ("i.png", "i.jpg"):
        media.write_image(folder / name, noise(1)[0])
    return folder


@pytest.mark.parametrize("name, kind, seconds", [
    ("v.mp4", "video", 10), ("v.avi", "video", 10), ("front.mp4", "video", 10), ("pieces.mp4", "video", 10), ("v.mkv", "video", 10),
    ("a.wav", "audio", 3), ("a.mp3", "audio", 3), ("a.mkv", "audio", 3), ("a.flac", "audio", 3),
    ("i.png", "image", None), ("i.jpg", "image", None), ("i.png", "mask", None),
])  # fmt: skip
def test_good_files_and_their_lengths(good, name, kind, seconds):
    found = probe.probe(str(good / name), kind)
    assert found.problem == found.words == found.named == ""
    assert found.seconds == (None if seconds is None else pytest.approx(seconds, abs=0.2))


READ = {"video": lambda p: media.read_video(p, 10), "audio": media.read_audio, "image": media.read_image, "mask": media.read_mask}


@pytest.mark.parametrize("name, kind", [
    ("v.mp4", "video"), ("front.mp4", "video"), ("v.avi", "video"), ("i.png", "image"), ("i.jpg", "mask"),
])  # fmt: skip
def test_whatever_a_reader_refuses_of_a_cut_file_the_probe_refuses(good, tmp_path, name, kind):
    whole = (good / name).read_bytes()
    for part in (0, 1, 3, 10, 25, 50, 75, 90, 97, 99):
        path = tmp_path / f"{part}{name}"
        path.write_bytes(whole[: len(whole) * part // 100])
        found = probe.probe(str(path), kind)
        try:
            READ[kind](path)
        except MediaError:
            assert found.problem in ("empty", "truncated", "undecodable", "no frames") and "; " in found.words, part
            assert str(tmp_path) not in found.words  # findings name files under the root only


@pytest.mark.parametrize("name", ["a.wav", "a.mp3"])
def test_a_sound_that_ends_early_is_truncated(good, tmp_path, name):
    whole = (good / name).read_bytes()
    for part in (30, 60, 80):  # of three seconds
        (tmp_path / name).write_bytes(whole[: len(whole) * part // 100])
        found = probe.probe(str(tmp_path / name), "audio")
        assert (found.problem, "truncated" in found.words) == ("truncated", True), part


def holed(source, target):
    """A copy of a file with zeros in its middle, its index and its end as they were."""
    content = bytearray(source.read_bytes())
    start, end = len(content) * 45 // 100, len(content) * 55 // 100
    content[start:end] = bytes(end - start)
    target.write_bytes(content)
    return target


def test_damage_inside_a_clip_is_found_where_it_is_decoded_whole(good, tmp_path):
    path = holed(good / "v.mp4", tmp_path / "v.mp4")
    with pytest.raises(MediaError):
        media.read_video(path, 10)
    assert probe.probe(str(path), "video").problem == ""
    found = probe.probe(str(path), "whole video")
    assert found.problem == "undecodable" and "breaks off inside: " in found.words and "; copy or build it again" in found.words
    for name, kind in (("v.mp4", "video"), ("v.avi", "video"), ("v.mkv", "video"), ("a.mp3", "audio"), ("a.mkv", "audio")):
        assert probe.probe(str(good / name), f"whole {kind}") == probe.probe(str(good / name), kind)


def test_values_that_are_no_numbers_are_found_in_a_sound_that_is_decoded_whole(tmp_path):
    wave = tone(3)
    wave[20_000] = np.nan
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    assert probe.probe(str(tmp_path / "a.wav"), "audio").problem == ""
    found = probe.probe(str(tmp_path / "a.wav"), "whole audio")
    assert found.problem == "undecodable" and "not numbers" in found.words


def test_a_wav_whose_writer_left_its_size_open_is_whole(good, tmp_path):
    whole = bytearray((good / "a.wav").read_bytes())
    whole[4:8] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(whole)
    assert probe.probe(str(tmp_path / "a.wav"), "audio").problem == ""


def bad(good, folder):
    for name in ("empty.wav", "empty.mp4", "empty.png"):
        (folder / name).touch()
    soundfile.write(folder / "zero.wav", np.zeros(0), 16000)
    (folder / "text.mp4").write_text("not a clip")
    (folder / "text.wav").write_text("not sound")
    (folder / "text.png").write_text("not an image")
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile v.mp4\n")
    (folder / "v.mp4").write_bytes((good / "v.mp4").read_bytes())
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(1)[None].astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])
    with av.open(str(folder / "none.mp4"), "w", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.start_encoding()


@pytest.mark.parametrize("name, kind, problem, words", [
    ("empty.wav", "audio", "empty", "0 bytes"), ("empty.mp4", "video", "empty", "0 bytes"), ("empty.png", "image", "empty", "0 bytes"),
    ("zero.wav", "audio", "no sound", "zero length"), ("v.mp4", "audio", "no sound", "no sound stream"),
    ("sound.mp4", "video", "no video", "no video stream"), ("none.mp4", "video", "no frames", "without frames"),
    ("text.mp4", "video", "undecodable", "as a video"), ("text.wav", "audio", "undecodable", "as sound"),
    ("text.png", "mask", "undecodable", "as an image"), ("list.mp4", "video", "undecodable", "as a video"),
    ("gone.mp4", "video", "undecodable", "No such file"),
])  # fmt: skip
def test_bad_files_are_told_apart(good, tmp_path, name, kind, problem, words):
    bad(good, tmp_path)
    found = probe.probe(str(tmp_path / name), kind)
    assert found.problem == problem and words in found.words and "; " in found.words


@pytest.mark.parametrize("old, new, kind, words", [
    ("v.avi", "v.mp4", "video", "holds avi, is named '.mp4'"), ("v.mp4", "v.avi", "video", "holds mov, is named '.avi'"),
    ("a.mp3", "a.wav", "audio", "holds mp3, is named '.wav'"), ("i.jpg", "i.png", "image", "holds jpeg, is named '.png'"),
    ("i.png", "i", "image", "holds png, is named ''"),
])  # fmt: skip
def test_a_wrong_name_is_said_and_the_file_is_usable(good, tmp_path, old, new, kind, words):
    (tmp_path / new).write_bytes((good / old).read_bytes())
    found = probe.probe(str(tmp_path / new), kind)
    assert found.problem == "" and found.named.startswith(words)
    READ[kind](tmp_path / new)


def test_a_picture_too_large_to_be_one(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert probe.probe(str(tmp_path / "bomb.png"), "image").problem == "undecodable"


def test_a_decoder_that_hangs_is_killed_and_the_others_go_on(good, tmp_path):
    jobs = [(str(good / "v.mp4"), "video")] * 3 + [(str(endless(tmp_path)), "video")] + [(str(good / "a.wav"), "audio")] * 40
    began = time.monotonic()
    found = list(probe.probe_all(jobs, 1, 1.5))
    assert sorted(job for job, _ in found) == sorted(jobs)
    assert [job[0] for job, p in found if p.problem] == [str(tmp_path / "endless.avi")]
    (hung,) = (p for _, p in found if p.problem)
    assert hung.problem == "hangs" and "more than 1.5 s" in hung.words and "time_limit" in hung.words
    assert time.monotonic() - began < 40


def crash(path, kind):
    os.kill(os.getpid(), signal.SIGSEGV) if "crash" in path else None
    return probe.Probe()


def work_that_crashes(pipe):
    probe.probe = crash
    probe._work(pipe)


def test_a_decoder_that_crashes_costs_its_file_only(monkeypatch):
    context = probe.get_context("spawn")

    class Context:
        Pipe = context.Pipe

        @staticmethod
        def Process(target, **options):
            return context.Process(target=work_that_crashes, **options)

    monkeypatch.setattr(probe, "get_context", lambda _: Context)
    jobs = [("a", "video"), ("crash 1", "video"), ("b", "video"), ("crash 2", "video"), ("c", "video")]
    found = dict(probe.probe_all(jobs, 1, 30))
    assert {job[0]: p.problem for job, p in found.items()} == {"a": "", "crash 1": "crashes", "b": "", "crash 2": "crashes", "c": ""}
    assert f"exit code -{int(signal.SIGSEGV)}" in found["crash 1", "video"].words


def test_a_process_that_cannot_start_is_an_error(monkeypatch):
    context = probe.get_context("spawn")

    class Context:
        Pipe = context.Pipe

        @staticmethod
        def Process(target, args, daemon):
            return context.Process(target=os._exit, args=(3,), daemon=daemon)

    monkeypatch.setattr(probe, "get_context", lambda _: Context)
    with pytest.raises(RuntimeError, match="could not be started .exit code 3.*__main__"):
        list(probe.probe_all([("a", "video")], 1, 30))


def test_no_files_need_no_process():
    assert list(probe.probe_all([], 2, 1)) == []


def test_the_cache_knows_a_file_until_it_changes(tmp_path):
    path = tmp_path / "folder/cache"
    found = probe.Probe("truncated", "is truncated; copy it", 2.5, "")
    with probe.Cache(path) as cache:
        cache.put("/a", "video", 10, 5, found)
        cache.put("/b", "video", 10, 5, probe.Probe("hangs", "", None))
        cache.put("/c", "video", 10, 5, probe.Probe(seconds=1.0))
        assert cache.get("/c", "video", 10, 5) == probe.Probe(seconds=1.0)
    with probe.Cache(path) as cache:
        assert cache.get("/a", "video", 10, 5) == found
        for other in (("/a", "audio", 10, 5), ("/a", "video", 11, 5), ("/a", "video", 10, 6), ("/b", "video", 10, 5)):
            assert cache.get(*other) is None
        cache.put("/a", "video", 11, 6, probe.Probe())
    with probe.Cache(path) as cache:
        assert cache.get("/a", "video", 11, 6) == probe.Probe() and cache.get("/a", "video", 10, 5) is None


def test_a_damaged_cache_or_that_of_another_decoder_begins_anew(tmp_path):
    (tmp_path / "cache").write_bytes(b"no data base" * 1000)
    with probe.Cache(tmp_path / "cache") as cache:
        cache.put("/a", "video", 1, 1, probe.Probe())
    with sqlite3.connect(tmp_path / "cache") as base:
        base.execute("UPDATE made_by SET version = 'older'")
    with probe.Cache(tmp_path / "cache") as cache:
        assert cache.get("/a", "video", 1, 1) is None
