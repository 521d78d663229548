import hashlib
import json

import numpy as np
import pytest

from crab import tasks
from crab.world import generate, render
from crab.data import media, records
from crab.world.views import VIEWS, view
from crab.tasks.referring import NULL


def digests(root):
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}


def test_two_workers_build_the_same_bytes(tree, tmp_path):
    generate.build(tmp_path / "two", **tree.counts, workers=2, progress=False)
    assert digests(tmp_path / "two") == digests(tree.root)
    assert [p.name for p in tmp_path.iterdir()] == ["two"]


def test_another_seed_builds_another_tree_and_replaces_the_first(tmp_path):
    root = tmp_path / "tree"
    generate.build(root, 0, 1, 1, 1, workers=1, slots=["ks"], progress=False)
    first = digests(root)
    generate.build(root, 1, 1, 1, 1, workers=1, slots=["cremad", "ks"], progress=False)
    second = digests(root)
    assert first["AVUIE_2/ks/train.json"] != second["AVUIE_2/ks/train.json"] and "AVUIE_2/cremad/train.json" in second


def test_a_bigger_build_keeps_the_smaller_ones_records(tmp_path):
    for count in (2, 3):
        generate.build(tmp_path / str(count), 0, count, 1, 1, workers=1, slots=["ave"], progress=False)
    small, big = (json.loads((tmp_path / n / "AVUIE_2/ave/train.json").read_text()) for n in ("2", "3"))
    assert big[:2] == small


def test_train_test_and_base_scenes_are_disjoint(tree):
    scenes = {}
    for slot in VIEWS:
        for split in ("train", "test") if tasks.get_slot(slot).test else ("train",):
            for record in records.read(tree.root, slot, split):
                ids = record["scene"] if isinstance(record["scene"], list) else [record["scene"]]
                scenes.setdefault("base" if slot == "avcap" else split, set()).update(ids)
    assert not scenes["train"] & scenes["test"] and not scenes["base"] & (scenes["train"] | scenes["test"])


def test_files_show_and_sound_what_the_scene_says(tree):
    for index in range(tree.train):
        (scene,) = view("ave", "train", index, tree.seed).scenes
        record = records.read(tree.root, "ave", "train")[index]
        (pictures, times), wave = records.load(record, 10)
        np.testing.assert_allclose(times, np.arange(10) + 0.5)
        truth = np.stack([render.frame(scene, int(t)) for t in times]).astype(float)
        assert 10 * np.log10(255**2 / np.mean((truth - pictures) ** 2)) > 30
        loud = np.sqrt((wave.reshape(10, -1)[:, 2000:-2000] ** 2).mean(1)) > 0.005  # off the edges, where mp3 smears
        assert loud.tolist() == [any(t.heard_at(s) for t in scene.things) for s in range(10)]
        assert 10 * np.log10(np.mean(render.waveform(scene) ** 2) / np.mean((render.waveform(scene) - wave) ** 2)) > 10


@pytest.mark.parametrize("slot", ["s4", "ms3", "ref_avs"])
def test_images_sounds_and_masks_are_of_the_second(tree, slot):
    for index, record in enumerate(records.read(tree.root, slot, "test")):
        (scene,) = view(slot, "test", index, tree.seed).scenes
        picture, wave = records.load(record, 1)
        second = record["second"]
        assert np.abs(picture.astype(int) - render.frame(scene, second)).mean() < 4
        np.testing.assert_allclose(wave, render.waveform(scene)[second * 16000 : (second + 1) * 16000], atol=1e-3)
        if tasks.truth(slot, record) != NULL:
            meant = scene.sounding if slot != "ref_avs" else [
                t for t in scene.visible if t.box(second) == tasks.truth(slot, record).box]
            assert (media.read_mask(record["mask"]) == sum(render.mask(t, second) for t in meant)).all()


def test_avi_clips_are_in_folders_of_their_class_and_show_the_scene(tree):
    for index, record in enumerate(records.read(tree.root, "ucf", "train")):
        (scene,) = view("ucf", "train", index, tree.seed).scenes
        (pictures, times), _ = records.load(record, 10)
        truth = np.stack([render.frame(scene, int(t)) for t in times]).astype(float)
        assert 10 * np.log10(255**2 / np.mean((truth - pictures) ** 2)) > 30
        assert record["media"][0].path.startswith(f"{tree.root}/AVUIE_2/ucf/video/") and record["media"][0].path.endswith(".avi")


def test_every_file_is_named_by_a_record_once(tree):
    root, summary = tree.root, tree.summary
    named = {root / "build.json", root / "vocabulary.json"}
    for slot in VIEWS:
        for split in ("train", "test") if tasks.get_slot(slot).test else ("train",):
            named.add(root / tasks.json_path(slot, split))
            for record in records.read(root, slot, split):
                named |= {type(root)(item.path) for item in record["media"]}
                if "mask" in record and tasks.truth(slot, record) != NULL:
                    named.add(type(root)(record["mask"]))
    there = {p for p in root.rglob("*") if p.is_file()}
    assert there == named
    kept = json.loads((root / "build.json").read_text())
    assert "seconds" not in kept and kept == {k: v for k, v in summary.items() if k != "seconds"}
    assert kept["files"] == len(there) - 2 - (len(VIEWS) * 2 - 3)
    assert kept["bytes"] == sum(p.stat().st_size for p in there if p.suffix != ".json")
    assert kept["slots"]["ave"]["train"] == {**kept["slots"]["ave"]["train"], "records": tree.train, "scenes": tree.train, "files": 2 * tree.train}
    assert kept["slots"]["a2v"]["train"]["files"] == 2 * tree.train  # a pair's videos are written once


@pytest.mark.parametrize("wrong, words", [
    ({"train": 0}, "train is 0"), ({"test": -1}, "test is -1"), ({"workers": 0}, "workers is 0"),
    ({"train": 2.5}, "train is 2.5"), ({"seed": "x"}, "seed is 'x'"), ({"caption": True}, "caption is True"),
    ({"slots": ["avee"]}, "did you mean 'ave'"), ({"slots": []}, "slots is empty"), ({"slots": "ave"}, "list of names"),
])
def test_bad_parameters_are_named(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        generate.build(tmp_path / "x", **{"workers": 1, "progress": False, **wrong})
    assert not list(tmp_path.iterdir())


def test_foreign_data_is_not_replaced(tmp_path):
    (tmp_path / "AVUIE_2").mkdir()
    with pytest.raises(ValueError, match="not built here"):
        generate.build(tmp_path, workers=1)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        generate.build(tmp_path / "file", workers=1)


def test_a_failed_build_leaves_the_old_one(tmp_path, monkeypatch):
    root = tmp_path / "tree"
    generate.build(root, 0, 1, 1, 1, workers=1, slots=["ks"], progress=False)
    before = digests(root)
    monkeypatch.setattr(media, "write_audio", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        generate.build(root, 1, 1, 1, 1, workers=1, slots=["ks"], progress=False)
    assert digests(root) == before and [p.name for p in tmp_path.iterdir()] == ["tree"]
