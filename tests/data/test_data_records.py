import json
import shutil
from pathlib import Path

import pytest

from crab import tasks
from crab.data import media, records
from crab.data.records import RecordError
from crab.tasks.referring import NULL

PARTS = [(slot.name, split) for slot in tasks.SLOTS.values() for split in ("train", "test") if split == "train" or slot.test]


@pytest.mark.parametrize("slot, split", PARTS)
def test_every_record_reads_and_its_media_decode(tree, slot, split):
    found = records.read(tree.root, slot, split)
    assert len(found) == (tree.caption if slot == "avcap" else getattr(tree, split))
    for index, record in enumerate(found):
        assert record["id"] == (f"{split}_{index:05d}" if slot == "avqa_thu" else f"{slot}/{split}/{index:05d}")
        frames = tasks.get_slot(slot).frames
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
                silent = tasks.target(slot, record, "explicit").find("i hear nothing") >= 0  # as dfew is at times
                assert (abs(value).max() > 0.02) == (not silent)
        assert ("mask" in record) == tasks.get_slot(slot).masks
        if "mask" in record:
            nothing = slot == "ref_avs" and tasks.truth(slot, record) == NULL
            assert nothing != Path(record["mask"]).exists()
            assert nothing or media.read_mask(record["mask"]).any()
        assert tasks.parse(slot, tasks.target(slot, record, "bare")) is not None


@pytest.fixture
def copy(tree, tmp_path):
    """A copy of ave's records alone, to spoil."""
    (tmp_path / "AVUIE_2/ave").mkdir(parents=True)
    shutil.copy(tree.root / "AVUIE_2/ave/train.json", tmp_path / "AVUIE_2/ave/train.json")
    return tmp_path, tmp_path / "AVUIE_2/ave/train.json"


def spoiled(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize("change, words", [
    (lambda r: r[1].pop("event"), ["record 1", "'event'"]),
    (lambda r: r[2].update(vid=None), ["record 2", "'vid'", "null"]),
    (lambda r: r[2].update(video_path="../../../etc/passwd"), ["record 2", "video_path", "leaves its folder"]),
    (lambda r: r[0].update(audio_path="/etc/passwd"), ["record 0", "audio_path", "leaves its folder"]),
    (lambda r: r[0].update(audio_path=3), ["record 0", "audio_path"]),
    (lambda r: r[0].update(media=[]), ["record 0", "'media'"]),
    (lambda r: r.append("text"), ["record 4", "str"]),
    (lambda r: [x.update(id="same") for x in r], ["record 1", "'same'", "record 0"]),
])
def test_a_bad_record_is_named(copy, change, words):
    root, path = copy
    spoiled(path, change)
    with pytest.raises(RecordError) as caught:
        records.read(root, "ave", "train")
    for word in [str(path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("content, words", [
    (b'[\n {"vid": "a",\n', ["malformed JSON", "line 3"]),
    (b"", ["malformed JSON", "line 1"]),
    (b'{"vid": "a"}', ["dict", "list"]),
    (b'["\xff"]', ["UTF-8", "byte 2"]),
    (b"[" * 200_000, ["nested"]),
    (b'[{"vid": "a", "event": "cat", "event": "dog"}]', ["'event' stands twice", "'vid' 'a'", "'cat' and 'dog'", "keep one"]),
    (b'[{"vid": "a", "more": {"x": 1, "y": 2, "x": 1}}]', ["'x' stands twice"]),
])
def test_a_bad_file_is_named(copy, content, words):
    root, path = copy
    path.write_bytes(content)
    with pytest.raises(RecordError) as caught:
        records.read(root, "ave", "train")
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_missing_files_and_unknown_slots(copy):
    with pytest.raises(RecordError, match="no such file; run the build stage"):
        records.read(copy[0], "ks", "train")
    with pytest.raises(ValueError, match="unknown slot 'avee'; did you mean 'ave'"):
        records.read(copy[0], "avee", "train")
    with pytest.raises(ValueError, match="no split 'test'"):
        records.read(copy[0], "avcap", "test")
    record = records.read(copy[0], "ave", "train")[0]
    with pytest.raises(media.MediaError, match="train_00000.mp4: does not exist"):
        records.load(record, 10)


def test_written_records_read_back(tree, tmp_path):
    for slot in ("s4", "avqa_thu"):  # the latter has an id of its own
        path = records.write(tmp_path, slot, "test", records.read(tree.root, slot, "test"))
        assert path.read_bytes() == (tree.root / f"AVUIE_2/{slot}/test.json").read_bytes()
