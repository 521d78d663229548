"""The built tree: its files show and sound what the scenes say, and a build is reproducible and safe."""

import json
from pathlib import Path

import numpy as np
import pytest
from trees import PARTS, digests

from crab import tasks
from crab.data import media, records
from crab.world import generate, render
from crab.world.views import view

TINY = {"train": 1, "test": 1, "caption": 1, "workers": 1, "progress": False}


def decibels(signal, error):
    return 10 * np.log10(signal / np.mean(np.square(error)))


def test_two_workers_build_the_same_bytes(tree, tmp_path):
    generate.build(tmp_path / "two", **tree.counts, workers=2, progress=False)
    assert digests(tmp_path / "two") == digests(tree.root)
    assert [p.name for p in tmp_path.iterdir()] == ["two"]


def test_a_build_replaces_another_and_a_larger_one_keeps_its_records(tmp_path):
    def build(seed, slots, train):
        generate.build(tmp_path / "tree", seed, slots=slots, **{**TINY, "train": train})
        return {p.parent.name: json.loads(p.read_bytes()) for p in (tmp_path / "tree").rglob("train.json")}

    small, large, other = build(0, ["ks"], 2), build(0, ["cremad", "ks"], 3), build(1, ["ks"], 2)
    assert large["ks"][:2] == small["ks"] != other["ks"] and (set(large), set(other)) == ({"cremad", "ks"}, {"ks"})


def test_train_test_and_base_scenes_are_disjoint(tree):
    scenes = {"base": set(), "train": set(), "test": set()}
    for slot, split in PARTS:
        for record in records.read(tree.root, slot, split):
            ids = record["scene"] if isinstance(record["scene"], list) else [record["scene"]]
            scenes["base" if slot == "avcap" else split].update(ids)
    assert not scenes["train"] & scenes["test"] and not scenes["base"] & (scenes["train"] | scenes["test"])


@pytest.mark.parametrize("slot", ["ave", "ucf"])  # mp4 and avi
def test_clips_show_and_sound_what_the_scene_says(tree, slot):
    for index, record in enumerate(records.read(tree.root, slot, "train")):
        (scene,) = view(slot, "train", index, tree.seed).scenes
        (pictures, times), wave = records.load(record, 10)
        np.testing.assert_allclose(times, np.arange(10) + 0.5)
        truth = np.stack([render.frame(scene, int(t)) for t in times]).astype(float)
        assert decibels(255**2, truth - pictures) > 30
        loud = np.sqrt((wave.reshape(10, -1)[:, 2000:-2000] ** 2).mean(1)) > 0.005  # off the edges, where mp3 smears
        assert loud.tolist() == [any(t.heard_at(s) for t in scene.things) for s in range(10)]
        assert decibels(np.mean(render.waveform(scene) ** 2), render.waveform(scene) - wave) > 8  # noise has the least
        if slot == "ucf":
            path = record["media"][0].path
            assert path.startswith(f"{tree.root}/AVUIE_2/ucf/video/") and path.endswith(".avi")


@pytest.mark.parametrize("slot", ["s4", "ms3", "ref_avs"])
def test_images_sounds_and_masks_are_of_the_second(tree, slot):
    for index, record in enumerate(records.read(tree.root, slot, "test")):
        (scene,) = view(slot, "test", index, tree.seed).scenes
        picture, wave = records.load(record, 1)
        second, truth = record["second"], tasks.truth(slot, record)
        assert np.abs(picture.astype(int) - render.frame(scene, second)).mean() < 4
        expected = render.waveform(scene)[second * 16000 : (second + 1) * 16000]
        np.testing.assert_allclose(wave, expected, atol=1e-3)
        if truth != tasks.NULL:
            target = [t for t in scene.visible if t.box(second) == truth.box] if slot == "ref_avs" else scene.sounding
            assert (media.read_mask(record["mask"]) == sum(render.mask(t, second) for t in target)).all()


def test_every_file_is_named_by_a_record_and_counted_once(tree):
    named = {tree.root / "build.json", tree.root / "vocabulary.json"}
    for slot, split in PARTS:
        named.add(tree.root / tasks.json_path(slot, split))
        for record in records.read(tree.root, slot, split):
            named |= {Path(item.path) for item in record["media"]}
            if "mask" in record and tasks.truth(slot, record) != tasks.NULL:
                named.add(Path(record["mask"]))
    files = {p for p in tree.root.rglob("*") if p.is_file()}
    assert files == named
    summary = json.loads((tree.root / "build.json").read_text(encoding="utf-8"))
    assert {**summary, "seconds": tree.summary["seconds"]} == tree.summary
    assert summary["files"] == sum(p.suffix != ".json" for p in files)
    assert summary["bytes"] == sum(p.stat().st_size for p in files if p.suffix != ".json")
    row = summary["slots"]["ave"]["train"]
    assert (row["records"], row["scenes"], row["files"]) == (tree.train, tree.train, 2 * tree.train)
    row = summary["slots"]["a2v"]["train"]  # both records of a pair use the same two videos
    assert (row["records"], row["scenes"], row["files"]) == (tree.train, tree.train, 2 * tree.train)


def test_a_small_build_is_quick(tree):
    assert tree.cost < 20  # seconds of processor time on a loaded machine; an idle one needs 4


NUMBERS = [("train", 0), ("test", -1), ("workers", 0), ("train", 2.5), ("seed", "x"), ("caption", True)]
SLOTS = [("slots", ["avee"], "mean 'ave'"), ("slots", [], "slots is empty"), ("slots", "ave", "list of names")]


@pytest.mark.parametrize("name, value, words", [*((*n, "{} is {!r}".format(*n)) for n in NUMBERS), *SLOTS])
def test_a_wrong_parameter_is_named(tmp_path, name, value, words):
    with pytest.raises(ValueError, match=words):
        generate.build(tmp_path / "x", **{**TINY, name: value})
    assert not list(tmp_path.iterdir())


def test_other_data_is_not_replaced(tmp_path):
    (tmp_path / "AVUIE_2").mkdir()
    with pytest.raises(ValueError, match="not built here"):
        generate.build(tmp_path, workers=1)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        generate.build(tmp_path / "file", workers=1)


@pytest.mark.parametrize("workers, module, name", [(1, media, "write_audio"), (2, records, "write")])
def test_a_failed_build_leaves_the_old_one(tmp_path, monkeypatch, workers, module, name):
    def fail(*_):
        raise OSError("disk full")

    root = tmp_path / "tree"
    generate.build(root, 0, slots=["ks"], **TINY)
    before = digests(root)
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(OSError, match="disk full"):
        generate.build(root, 1, slots=["ks"], **{**TINY, "workers": workers})
    assert digests(root) == before and [p.name for p in tmp_path.iterdir()] == ["tree"]
