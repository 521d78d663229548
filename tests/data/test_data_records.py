"""Records read from a tree, bad ones named, and the manifest of a data root."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from trees import PARTS

from crab import tasks
from crab.data import media, records
from crab.data.records import RecordError


@pytest.mark.parametrize("slot, split", PARTS)
def test_every_record_reads_and_its_media_decode(tree, slot, split):
    rows = records.read(tree.root, slot, split)
    assert len(rows) == (tree.caption if slot == "avcap" else getattr(tree, split))
    frames, masks = tasks.get_slot(slot).frames, tasks.get_slot(slot).masks
    for index, record in enumerate(rows):
        assert record["id"] == (f"{split}_{index:05d}" if slot == "avqa_thu" else f"{slot}/{split}/{index:05d}")
        loaded = records.load(record, frames)
        assert len(loaded) == len(record["media"]) >= 2
        for item, value in zip(record["media"], loaded, strict=True):
            if item.kind == "video":
                assert value[0].shape == (frames, 224, 224, 3) and value[0].std() > 5
                assert (value[1] >= 0).all() and (value[1] < 10).all()
            elif item.kind == "image":
                assert value.shape == (224, 224, 3) and value.std() > 5
            else:
                assert value.shape == ((160000,) if item.second is None else (16000,))
                silent = "i hear nothing" in tasks.target(slot, record, "explicit")  # sometimes in dfew
                assert (abs(value).max() > 0.02) == (not silent)
        assert ("mask" in record) == masks
        if masks:
            nothing = slot == "ref_avs" and tasks.truth(slot, record) == tasks.NULL
            assert nothing != Path(record["mask"]).exists()
            assert nothing or media.read_mask(record["mask"]).any()
        assert tasks.parse(slot, tasks.target(slot, record, "bare")) is not None


@pytest.fixture
def copy(tree, tmp_path):
    """The records of ave alone, to spoil: (root, list)."""
    (tmp_path / "AVUIE_2/ave").mkdir(parents=True)
    shutil.copy(tree.root / "AVUIE_2/ave/train.json", tmp_path / "AVUIE_2/ave/train.json")
    return tmp_path, tmp_path / "AVUIE_2/ave/train.json"


def test_numbers_that_json_does_not_know_read_as_null(copy):
    copy[1].write_text('[{"a": NaN, "b": -Infinity, "c": 1e999, "d": 1.5}]', encoding="utf-8")
    assert records.parse(copy[1]) == [{"a": None, "b": None, "c": None, "d": 1.5}]


def test_missing_files_and_unknown_slots(copy):
    with pytest.raises(RecordError, match="no such file; run the build stage"):
        records.read(copy[0], "ks", "train")
    with pytest.raises(ValueError, match="unknown slot 'avee'; did you mean 'ave'"):
        records.read(copy[0], "avee", "train")
    with pytest.raises(ValueError, match="no split 'test'"):
        records.read(copy[0], "avcap", "test")
    with pytest.raises(media.MediaError, match="train_00000.mp4: does not exist"):
        records.load(records.read(copy[0], "ave", "train")[0], 10)


@pytest.mark.parametrize("slot", ["s4", "avqa_thu"])  # the latter publishes an id
def test_written_records_read_back(tree, tmp_path, slot):
    path = records.write(tmp_path, slot, "test", records.read(tree.root, slot, "test"))
    assert path.read_bytes() == (tree.root / f"AVUIE_2/{slot}/test.json").read_bytes()


# ---------------------------------------------------------------- the manifest


@pytest.fixture
def root(tree, tmp_path):
    """A copy of two slots, to change."""
    for slot in ("s4", "ref_avs"):
        shutil.copytree(tree.root / "AVUIE_2" / slot, tmp_path / "root/AVUIE_2" / slot)
    return tmp_path / "root"


def changed(root, before):
    """The lists whose digest is another one than before."""
    after = records.write_manifest(root)
    return {key for key in after if after[key] != before[key]}


def test_the_manifest_counts_what_decides_the_records(root, tmp_path):
    before = records.write_manifest(root)
    assert records.read_manifest(root) == before and len(before) == 4
    assert before["s4/train"]["records"] == 4 and before["s4/test"]["records"] == 3
    assert len({entry["digest"] for entry in before.values()}) == 4
    path = root / "AVUIE_2/s4/train.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(rows), encoding="utf-8")  # the same records, written otherwise
    for file in root.rglob("*.*"):
        os.utime(file, ns=(1, 1))
    assert changed(root, before) == set()
    shutil.copytree(root, tmp_path / "elsewhere")
    assert records.write_manifest(tmp_path / "elsewhere") == before
    path.write_text(json.dumps([{**rows[0], "a_obj": "x"}, *rows[1:]]), encoding="utf-8")
    assert changed(root, before) == {"s4/train"}
    path.write_text(json.dumps([*rows[1:], rows[0]]), encoding="utf-8")
    assert changed(root, before) == {"s4/train"}
    path.write_text(json.dumps(rows), encoding="utf-8")
    record = records.read(root, "s4", "test")[1]
    for file in map(Path, (*(item.path for item in record["media"]), record["mask"])):
        content = file.read_bytes()
        file.write_bytes(content + b"x")
        assert changed(root, before) == {"s4/test"}
        file.unlink()
        assert changed(root, before) == {"s4/test"}
        file.write_bytes(content)
    path.unlink()
    assert records.write_manifest(root).keys() == before.keys() - {"s4/train"}


def test_media_elsewhere_count_by_content_if_they_are_small_else_by_size_and_time(root, tmp_path, monkeypatch):
    own = records.write_manifest(root)
    lists = tmp_path / "lists"
    for slot in ("s4", "ref_avs"):
        for split in tasks.SPLITS:
            records.write(lists, slot, split, records.read(root, slot, split))
    records.write_root(lists, root)
    assert records.write_manifest(lists) == own
    monkeypatch.setattr(records, "_READ", 0)
    monkeypatch.setattr(records, "file_digest", None)  # nothing is read
    before = records.write_manifest(lists)
    assert records.write_manifest(lists) == before and not any(own[key] == before[key] for key in own)
    image = Path(records.read(lists, "s4", "test")[0]["media"][0].path)
    content = image.read_bytes()
    os.utime(image, ns=(1, 1))
    assert changed(lists, before) == {"s4/test"}
    before = records.write_manifest(lists)
    image.write_bytes(content + b"x")
    os.utime(image, ns=(1, 1))
    assert changed(lists, before) == {"s4/test"}


def test_the_digest_is_the_documented_one(root):
    """Records with paths under the root, and the SHA-256 of their files, in order."""
    digest = hashlib.sha256()
    for record in records.read(root, "ref_avs", "test"):
        files = [*(item.path for item in record["media"]), record["mask"]]
        marks = [hashlib.sha256(Path(f).read_bytes()).hexdigest() if Path(f).is_file() else None for f in files]
        relative = json.loads(json.dumps(record).replace(f"{root}/", ""))
        digest.update(json.dumps([relative, marks], sort_keys=True).encode())
    entry = {"records": 3, "digest": digest.hexdigest()[:16]}
    assert records.write_manifest(root)["ref_avs/test"] == entry


@pytest.mark.parametrize("content", [None, "{", "[]", '{"s4/train": 3}', '{"s4/train": {"records": 3}}'])
def test_a_manifest_that_cannot_be_used_is_named(root, content):
    if content is not None:
        (root / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest.json: .*run .* stage"):
        records.read_manifest(root)
