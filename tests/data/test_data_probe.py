"""Probes of one file, against its reader; and of many, with decoders that never end."""

import functools
import json
import os
import signal
import time

import av
import numpy as np
import pytest
import soundfile
from made_media import READ, blocks, muxed, remux, tone
from PIL import Image

from crab.data import media, probe
from crab.data.media import MediaError


def endless(folder):
    """A clip of 200 GB of zeros that keeps FFmpeg busy for hours. Skips the test if files cannot have holes."""
    try:
        with open(folder / "endless.avi", "wb") as file:
            file.write(b"RIFF\xff\xff\xff\x7fAVI ")
            file.truncate(200 << 30)
    except OSError:
        pytest.skip("this file system has no sparse files")
    return folder / "endless.avi"


def holed(source, target):
    """A copy of a file with zeros in its middle. Its index and its end are whole."""
    content = bytearray(source.read_bytes())
    start, end = len(content) * 45 // 100, len(content) * 55 // 100
    content[start:end] = bytes(end - start)
    target.write_bytes(content)
    return target


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for name in ("v.mp4", "v.avi"):
        media.write_video(folder / name, blocks(20, 64), 2)
    remux(folder / "v.mp4", folder / "front.mp4", options={"movflags": "faststart"})
    remux(folder / "v.mp4", folder / "pieces.mp4", options={"movflags": "frag_keyframe+empty_moov"})
    remux(folder / "v.mp4", folder / "v.mkv")
    for name in ("a.wav", "a.mp3"):
        media.write_audio(folder / name, tone(3))
    remux(folder / "a.mp3", folder / "a.mkv")
    soundfile.write(folder / "a.flac", tone(3), 16000)
    for name in ("i.png", "i.jpg"):
        media.write_image(folder / name, np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    return folder


@pytest.mark.parametrize("name", "v.mp4 v.avi front.mp4 pieces.mp4 v.mkv a.wav a.mp3 a.mkv a.flac i.png i.jpg".split())
def test_good_files(good, name):
    kind, seconds = {"v": ("video", 10), "a": ("audio", 3), "i": ("image", None)}.get(name[0], ("video", 10))
    expected = probe.Probe(seconds=seconds and pytest.approx(seconds, abs=0.2))
    assert probe.probe(str(good / name), kind) == expected
    assert probe.probe(str(good / name), "mask" if kind == "image" else f"whole {kind}") == expected


@pytest.mark.parametrize("name, kind", [(n, "video") for n in ("v.mp4", "front.mp4", "v.avi")] + [("i.jpg", "mask")])
def test_the_probe_refuses_each_cut_file_that_the_reader_refuses(good, tmp_path, name, kind):
    whole = (good / name).read_bytes()
    refused = 0
    for part in (0, 1, 3, 10, 25, 50, 75, 90, 97, 99):
        path = tmp_path / f"{part}{name}"
        path.write_bytes(whole[: len(whole) * part // 100])
        result = probe.probe(str(path), kind)
        try:
            READ[kind](path)
        except MediaError:
            refused += 1
            assert result.problem in ("empty", "truncated", "undecodable", "no frames") and "; " in result.words, part
            assert str(tmp_path) not in result.words  # findings only name files under the root
    assert refused > 4


@pytest.mark.parametrize("name", ["a.wav", "a.mp3"])
@pytest.mark.parametrize("part", [30, 60, 80])  # percent of three seconds
def test_a_sound_that_ends_early_is_truncated(good, tmp_path, name, part):
    whole = (good / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * part // 100])
    result = probe.probe(str(tmp_path / name), "audio")
    assert result.problem == "truncated" and "truncated" in result.words


def test_damage_inside_a_clip_is_found_if_it_is_decoded_completely(good, tmp_path):
    path = holed(good / "v.mp4", tmp_path / "v.mp4")
    with pytest.raises(MediaError):
        media.read_video(path, 10)
    assert probe.probe(str(path), "video").problem == ""
    result = probe.probe(str(path), "whole video")
    assert result.problem == "undecodable" and "breaks off inside: " in result.words and "; copy or" in result.words


def test_values_that_are_not_numbers_are_found_in_a_sound_that_is_decoded_completely(tmp_path):
    wave = tone(3)
    wave[20_000] = np.nan
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    assert probe.probe(str(tmp_path / "a.wav"), "audio").problem == ""
    result = probe.probe(str(tmp_path / "a.wav"), "whole audio")
    assert result.problem == "undecodable" and "not numbers" in result.words


def test_a_wav_whose_writer_left_its_size_open_is_whole(good, tmp_path):
    content = bytearray((good / "a.wav").read_bytes())
    content[4:8] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(content)
    assert probe.probe(str(tmp_path / "a.wav"), "audio").problem == ""


@pytest.mark.parametrize(
    "name, kind, problem, words",
    [
        ("empty.wav", "audio", "empty", "0 bytes"),
        ("empty.mp4", "video", "empty", "0 bytes"),
        ("empty.png", "image", "empty", "0 bytes"),
        ("zero.wav", "audio", "no sound", "zero length"),
        ("v.mp4", "audio", "no sound", "no sound stream"),
        ("sound.mp4", "video", "no video", "no video stream"),
        ("none.mp4", "video", "no frames", "without frames"),
        ("text.mp4", "video", "undecodable", "as a video"),
        ("text.wav", "audio", "undecodable", "as sound"),
        ("text.png", "mask", "undecodable", "as an image"),
        ("list.mp4", "video", "undecodable", "as a video"),
        ("gone.mp4", "video", "missing", "does not exist"),
        ("bomb.png", "image", "undecodable", "as an image"),
    ],
)
def test_problems_are_told_apart(good, tmp_path, name, kind, problem, words):
    for empty in ("empty.wav", "empty.mp4", "empty.png"):
        (tmp_path / empty).touch()
    for text in ("text.mp4", "text.wav", "text.png"):
        (tmp_path / text).write_text("text", encoding="utf-8")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile v.mp4\n", encoding="utf-8")
    (tmp_path / "v.mp4").write_bytes((good / "v.mp4").read_bytes())
    soundfile.write(tmp_path / "zero.wav", np.zeros(0), 16000)
    muxed(tmp_path / "sound.mp4", sound=("aac", tone(1)[None], 16000, "mono", 0, 0))
    with av.open(str(tmp_path / "none.mp4"), "w", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    if name == "bomb.png":
        Image.new("1", (20_000, 20_000)).save(tmp_path / name)
    result = probe.probe(str(tmp_path / name), kind)
    assert result.problem == problem and words in result.words and "; " in result.words
    if name not in ("list.mp4", "bomb.png"):  # only the probe refuses these
        with pytest.raises(MediaError, match=f"{name}: .+; .+"):
            READ[kind](tmp_path / name)


@pytest.mark.parametrize(
    "old, new, kind, words",
    [
        ("v.avi", "v.mp4", "video", "holds avi, is named '.mp4'"),
        ("v.mp4", "v.avi", "video", "holds mov, is named '.avi'"),
        ("a.mp3", "a.wav", "audio", "holds mp3, is named '.wav'"),
        ("i.jpg", "i.png", "image", "holds jpeg, is named '.png'"),
        ("i.png", "i", "image", "holds png, is named ''"),
    ],
)
def test_a_file_with_a_wrong_name_can_be_used(good, tmp_path, old, new, kind, words):
    (tmp_path / new).write_bytes((good / old).read_bytes())
    result = probe.probe(str(tmp_path / new), kind)
    assert result.problem == "" and result.named.startswith(words)
    READ[kind](tmp_path / new)


# ---------------------------------------------------------------- many files


def test_a_decoder_that_hangs_is_killed_and_the_others_go_on(good, tmp_path):
    clips, sounds = [(str(good / "v.mp4"), "video")] * 3, [(str(good / "a.wav"), "audio")] * 40
    jobs = [*clips, (str(endless(tmp_path)), "video"), *sounds]
    began = time.monotonic()
    results = list(probe.probe_all(jobs, 1, 1.5))
    assert sorted(job for job, _ in results) == sorted(jobs)
    ((job, hung),) = ((job, result) for job, result in results if result.problem)
    assert job == (str(tmp_path / "endless.avi"), "video") and time.monotonic() - began < 40
    assert hung.problem == "hangs" and "more than 1.5 s" in hung.words and "time_limit" in hung.words


def crash(path, kind):
    if "crash" in path:
        os.kill(os.getpid(), signal.SIGSEGV)
    return probe.Probe()


def test_a_decoder_that_crashes_only_costs_its_file(monkeypatch):
    monkeypatch.setattr(probe, "probe", crash)  # workers import it by the name of this module
    jobs = [("a", "video"), ("crash 1", "video"), ("b", "video"), ("crash 2", "video"), ("c", "video")]
    results = {job[0]: result for job, result in probe.probe_all(jobs, 1, 30)}
    problems = {name: result.problem for name, result in results.items()}
    assert problems == {"a": "", "crash 1": "crashes", "b": "", "crash 2": "crashes", "c": ""}
    assert f"exit code -{int(signal.SIGSEGV)}" in results["crash 1"].words


def test_a_process_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(probe, "_start_worker", functools.partial(os._exit, 3))
    with pytest.raises(RuntimeError, match="could not be started.*__main__"):
        list(probe.probe_all([("a", "video")], 1, 30))


def test_no_files_need_no_process():
    assert list(probe.probe_all([], 2, 1)) == []


# ---------------------------------------------------------------- the cache


@pytest.fixture
def counted(good, tmp_path, probed_here, monkeypatch):
    """A function that probes a clip and a sound of a tree with a cache: (files opened, files known)."""
    for name in ("v.mp4", "a.wav"):
        (tmp_path / name).write_bytes((good / name).read_bytes())

    def run(decode=False):
        files = probe.Files(tmp_path, tmp_path / "folder/cache.json")
        counts = files.probe([("v.mp4", "video"), ("a.wav", "audio"), ("gone", "image")], decode, 9, 1, False)
        assert files.probes["gone", "image"].problem == "missing"
        return counts

    return run


def test_a_file_is_known_until_it_changes(counted, tmp_path):
    assert counted() == (2, 0) and counted() == (0, 2)
    os.utime(tmp_path / "v.mp4", ns=(1, 1))
    assert counted() == (1, 1) and counted() == (0, 2)
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content + b"x")
    os.utime(tmp_path / "a.wav", ns=(1, 1))
    assert counted() == (1, 1)
    assert counted(decode=True) == (2, 0) and counted(decode=True) == (0, 2) and counted() == (0, 2)


def test_a_file_with_several_names_is_opened_once(good, tmp_path, probed_here):
    (tmp_path / "one.mp4").write_bytes((good / "v.mp4").read_bytes())
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    for old, new in (("one.mp4", "two.mp4"), ("one.mp4", "one.avi"), ("broken.mp4", "broken too.mp4")):
        os.link(tmp_path / old, tmp_path / new)
    jobs = [(path.name, "video") for path in sorted(tmp_path.iterdir())]
    files = probe.Files(tmp_path, tmp_path / "folder/cache.json")
    assert files.probe(jobs, False, 9, 1, False) == (3, 0)  # the wrong suffix is a finding of its own
    assert files.probes["two.mp4", "video"] == files.probes["one.mp4", "video"] == probe.Probe(seconds=10.0)
    assert files.probes["one.avi", "video"].named and not files.probes["one.mp4", "video"].named
    assert files.probes["broken too.mp4", "video"] == files.probes["broken.mp4", "video"]
    assert files.probes["broken.mp4", "video"].problem
    assert probe.Files(tmp_path, tmp_path / "folder/cache.json").probe(jobs, False, 9, 1, False) == (0, 5)


def test_a_decoder_that_failed_is_tried_again(counted, monkeypatch):
    for problem in ("hangs", "crashes"):
        result = probe.Probe(problem)
        monkeypatch.setattr(probe, "probe_all", lambda jobs, *_, result=result: [(job, result) for job in jobs])
        assert counted() == (2, 0) and counted() == (2, 0)


def test_a_damaged_cache_or_one_of_other_decoders_begins_again(counted, tmp_path, monkeypatch):
    cache = tmp_path / "folder/cache.json"
    counted()
    for content in (b"", b"\xff\xfe", b"[]", b'{"version": 1}', cache.read_bytes()[:-9]):
        cache.write_bytes(content)
        assert counted() == (2, 0)
    monkeypatch.setattr(probe.Files, "_VERSION", "others")
    assert counted() == (2, 0) and json.loads(cache.read_bytes())["version"] == "others"


def test_a_killed_walk_leaves_a_whole_cache(counted, tmp_path, monkeypatch):
    def killed(jobs, *_):
        yield next(iter(jobs)), probe.Probe(seconds=1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "probe_all", killed)
    monkeypatch.setattr(probe, "_SAVE_EVERY", 0)
    with pytest.raises(KeyboardInterrupt):
        counted()
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["cache.json"]
    monkeypatch.setattr(probe, "probe_all", lambda jobs, *_: [(job, probe.Probe()) for job in jobs])
    assert counted() == (1, 1)
