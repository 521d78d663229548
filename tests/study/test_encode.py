"""Encoding real files of a small world, and reading the result back."""

import pytest
import torch

from crab import tasks
from crab.data import generate, records
from crab.data.media import MediaError
from crab.models import omni
from crab.study.dataset import benchmarks, examples, load_base, overview, read_slot, write_slot
from crab.study.encode import encode_all, encode_slot, load_media

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


def test_missing_file_is_named_and_nothing_is_left(world, base, tmp_path, monkeypatch):
    good = records.read(world, "cremad", "train")
    gone = good[1]["media"][0]._replace(path=str(world / "gone.mp4"))
    bad = [good[0], good[1] | {"media": [gone, good[1]["media"][1]]}]
    monkeypatch.setattr(records, "read", lambda *args: bad)
    with pytest.raises(MediaError, match="gone.mp4"):
        encode_slot(world, "cremad", "train", base, tmp_path)
    assert not list(tmp_path.rglob("*.*"))
