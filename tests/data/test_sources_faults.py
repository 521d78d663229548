"""Raw sets at fault: each fault is named with file, line, field and fix, or counted; nothing is dropped silently."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_sets import SETS, write

from crab.data.sources import Draft, Raw, SourceError, convert, convert_all, drafts

FAULTS = yaml.safe_load((Path(__file__).parent / "raw_faults.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("slot, changes, words", FAULTS)
def test_a_fault_is_named_or_counted(tmp_path, slot, changes, words):
    if slot in ("ave", "a2v") and changes.get("Annotations.txt"):
        changes = changes | {"trainSet.txt": changes["Annotations.txt"][1:]}
    root = write(tmp_path, slot, changes)
    with pytest.raises(SourceError) as error:
        list(drafts(slot, Raw(root), "train"))
    for word in words:
        assert word in str(error.value)
    raw = Raw(root, faults="skip-and-record")
    try:
        list(drafts(slot, raw, "train"))
    except SourceError as fatal:  # a file that cannot be read at all
        assert str(fatal) == str(error.value)
    else:
        assert str(error.value) in raw.left_out["fault"]


def test_text_that_is_not_utf8_is_named_by_line(tmp_path):
    root = write(tmp_path, "ave")
    (root / "trainSet.txt").write_bytes(b"Bark&x&good&0&3\nBark&\xff&good&0&3\n")
    with pytest.raises(SourceError, match=r"trainSet.txt, line 2: not UTF-8 at byte 21; save it as UTF-8"):
        list(drafts("ave", Raw(root), "train"))


def test_names_and_texts_that_no_list_can_hold_are_named_or_counted(tmp_path):
    root, out = write(tmp_path / "raw", "ks"), tmp_path / "data"
    clip = next(root.rglob("ghi_*.mp4"))
    clip.rename(os.fsdecode(os.fsencode(clip.parent) + b"/\xff.mp4"))
    with pytest.raises(SourceError, match=r"\\udcff.mp4: a file's name is not UTF-8"):
        convert("ks", root, out, progress=False)
    report = convert("ks", root, out, faults="skip-and-record", progress=False)["splits"]["train"]
    assert report["records"] == 1 and len(report["left_out"]["fault"]) == 1
    write(root, "avqa", {"json/avqa-train.json": {"anser": "\ud800"}})
    with pytest.raises(SourceError, match="record 0: .*half a character"):
        list(drafts("avqa", Raw(root), "train"))


@pytest.mark.parametrize(
    "slot, path, split, reason",
    [
        ("ave", "AVE/RUhOCu3LNXM.mp4", "train", "no video file"),
        ("meld", "test/output_repeated_splits_test/dia0_utt0.mp4", "test", "no video file"),
        ("s4", "v1s/two_0_5000/frames/2.jpg", "test", "no image file"),
        ("s4", "v1s/two_0_5000/labels_rgb/2.png", "test", "no mask file"),
        ("ref_avs", "media/v1_0_10000/audio.wav", "train", "no sound file"),
        ("ref_avs", "media/v1_0_10000/frames/0.jpg", "train", "no image file"),
        ("a2v", "AVE/RUhOCu3LNXM.mp4", "train", "no video file"),
    ],
)
def test_missing_media_are_counted_with_their_place(tmp_path, slot, path, split, reason):
    root = write(tmp_path, slot)
    before = len(list(drafts(slot, Raw(root), split)))
    (root / path).unlink()
    raw = Raw(root)
    after = len(list(drafts(slot, raw, split)))
    assert len(raw.left_out[reason]) >= 1 and re.search(r"line \d", raw.left_out[reason][0])
    assert after < before and (slot == "a2v" or after + len(raw.left_out[reason]) == before)


@pytest.mark.parametrize(
    "slot, changes, split, records, left_out",
    [
        ("ave", {}, "train", 2, {}),
        ("avvp", {}, "train", 1, {"labels without modality and times": 1}),
        ("avqa", {}, "train", 2, {"deleted by the set's authors": 1}),
        ("ucf", {}, "train", 1, {"no sound": 1}),
        ("ave", {"trainSet.txt": "Bark&-aaaaaaaaa1&good&3&3\nHorse&bbbbbbbbbb2&good&1&4\n",
                 "Annotations.txt": "Bark&-aaaaaaaaa1&good&3&3\nHorse&bbbbbbbbbb2&good&1&4\n",
                 "testSet.txt": "Horse&bbbbbbbbbb2&good&1&4\n"}, "train", 1, {"an event of no length": 1}),
        ("avvp", {"AVVP_eval_audio.csv": "+bbbbbbbbb_2_30_40\t3\t3\tCello"}, "test", 1, {"an event of no length": 1}),
        ("ave", {"AVE/RUhOCu3LNXM.mp4": "no video"}, "train", 1, {"sound cannot be decoded": 1}),
        # known defects of the official files
        ("ave", {"trainSet.txt": "Bark&-aaaaaaaaa1&good&2&6&\nChurch bell&RUhOCu3LNXM&good&0&10\n"}, "train", 2, {}),
        ("ave", {"Annotations.txt": "Bark&-aaaaaaaaa1&good&2&6&\nHorse&bbbbbbbbbb2&good&1&4&\n",
                 "trainSet.txt": "Bark&-aaaaaaaaa1&good&2&6&\n", "testSet.txt": "Horse&bbbbbbbbbb2&good&1&4\n"},
         "train", 1, {}),
        ("avvp", {"AVVP_eval_audio.csv": "+bbbbbbbbb_2_30_40\t9\t0\tCello"}, "test", 1,
         {"an event that ends before it starts": 1}),
        ("ref_avs", {"metadata.csv": "+v1_0_10000,v1_0_10000_hair-dryer_1,TODO,1,x\n"
                     "v1_0_10000,v1_0_10000_hair-dryer_1,train,1,x\nv2_0_10000,v2_0_10000_null_1,test_n,0,x"},
         "train", 1, {"no split": 1}),
        ("ref_avs", {"metadata.csv": "+v1_0_10000,v1_0_10000_hair-dryer_1,TODO,1,x\n"
                     "v1_0_10000,v1_0_10000_hair-dryer_1,train,1,x\nv2_0_10000,v2_0_10000_null_1,test_n,0,x"},
         "test", 2, {}),
        ("avqa", {"json/avqa-train.json": {"type": "['Audio-Visual', 'Counting']"}}, "train", 1, {}),
    ],
)  # fmt: skip
def test_what_is_left_out_is_counted_by_reason(tmp_path, slot, changes, split, records, left_out):
    root = write(tmp_path / "raw", slot, changes)
    part = convert(slot, root, tmp_path / "data", progress=False)["splits"][split]
    assert {reason: len(places) for reason, places in part["left_out"].items()} == left_out
    assert part["records"] == records
    for (place,) in part["left_out"].values():
        assert str(root) in place


def test_a_split_without_records_is_an_error_that_leaves_the_old_files(tmp_path):
    root, out = write(tmp_path / "raw", "ave"), tmp_path / "data"
    convert("ave", root, out, progress=False)
    before = (out / "AVUIE_2/ave/train.json").read_bytes()
    for clip in ("bbbbbbbbbb2", "cccccccccc3"):
        (root / f"AVE/{clip}.mp4").unlink()
    with pytest.raises(SourceError, match=r"no record of ave/test can be made of it; left out: \{'no video file': 2\}"):
        convert("ave", root, out, progress=False)
    assert (out / "AVUIE_2/ave/train.json").read_bytes() == before


def test_lists_that_no_converter_wrote_stay(tmp_path):
    root, own = write(tmp_path / "raw", "ave"), tmp_path / "data/AVUIE_2/ave/train.json"
    own.parent.mkdir(parents=True)
    own.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="AVUIE_2/ave: holds lists that no converter wrote; give another root"):
        convert("ave", root, tmp_path / "data", progress=False)
    assert [path.name for path in own.parent.iterdir()] == ["train.json"] and own.read_text(encoding="utf-8") == "[]"


@pytest.mark.parametrize("link", ["hardlink", "copy"])
def test_a_clip_that_was_replaced_by_an_older_file_is_placed_with_its_sound(tmp_path, link):
    root, out = write(tmp_path / "raw", "ave"), tmp_path / "data"
    clips = sorted((root / "AVE").glob("*.mp4"))
    convert("ave", root, out, link=link, progress=False)
    sound = out / f"AVUIE_2/ave/audio/{clips[0].stem}.wav"
    before = sound.stat().st_mtime_ns
    clips[0].unlink()
    shutil.copy(clips[1], clips[0])
    os.utime(clips[0], (1e9, 1e9))
    convert("ave", root, out, link=link, progress=False)
    assert (out / f"AVUIE_2/ave/video/{clips[0].name}").read_bytes() == clips[0].read_bytes()
    assert sound.stat().st_mtime == 1e9 and sound.stat().st_mtime_ns != before


def test_of_several_containers_the_first_in_order_is_taken(tmp_path):
    root = write(tmp_path, "ave", {"mp3/RUhOCu3LNXM.mp3": "sound"}, ["AVE/RUhOCu3LNXM.{mkv,wav}"])
    assert next(drafts("ave", Raw(root), "train")).files == {
        f"{kind}/RUhOCu3LNXM{suffix}": root / f"AVE/RUhOCu3LNXM{suffix}"
        for kind, suffix in {"video": ".mp4", "audio": ".wav"}.items()
    }


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda raw, out: convert("mafw", raw, out), ValueError, "slot mafw: has no converter"),
        (lambda raw, out: convert("avee", raw, out), ValueError, "did you mean 'ave'"),
        (lambda raw, out: convert("ave", raw, out, link="move"), ValueError, "link is 'move'; give one of hardlink"),
        (lambda raw, out: convert("ave", raw, out, faults="none"), ValueError, "faults is 'none'; give one of error"),
        (lambda raw, out: convert("ave", raw / "gone", out), SourceError, "no such folder"),
        (lambda raw, out: convert("ave", raw, raw / "data"), ValueError, "lies in the raw data set"),
        (lambda raw, out: convert_all({"ave": raw, "dfew": raw}, out), ValueError, "slot dfew: has no converter"),
        (lambda raw, out: list(drafts("unav", Raw(raw), "test")), ValueError, "slot unav has no split 'test'"),
    ],
)
def test_what_cannot_be_asked_for(tmp_path, call, error, words):
    with pytest.raises(error, match=words):
        call(write(tmp_path / "raw", "ave"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_links_that_loop_and_hidden_files_do_no_harm(tmp_path):
    root = write(tmp_path, "ave", {"AVE/._RUhOCu3LNXM.mp4": "what another system leaves", "Annotations.txt.bak": "x"})
    (root / "AVE/loop").symlink_to(root)
    assert len(list(drafts("ave", Raw(root), "train"))) == 2


TEXT = st.text(st.sampled_from("&\t,\n\"'{}[]:0123456789abANG_<>/.\0\x85é"), max_size=80)
SLOTS = ["ave", "avvp", "unav", "avqa", "avqa_thu", "meld", "cremad", "ucf", "s4", "ref_avs"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
quick = settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(text=TEXT, slot=st.sampled_from(SLOTS), header=st.booleans())
def test_no_annotation_file_breaks_the_readers(tmp_path, text, slot, header):
    """Whatever the files hold, the result is records, left-out rows or a SourceError."""
    files = SETS[slot]["files"] | {"train.csv": "", "test.csv": ""}
    for name, old in files.items():
        first = f"{old.splitlines()[0]}\n" if header and isinstance(old, str) and old and name != "mute.avi" else ""
        around = ('{"database": ', "}") if slot == "unav" else ("[", "]")
        around = around if header and not isinstance(old, str) else ("", "")
        (tmp_path / Path(name).name).write_text(first + text.join(around), encoding="utf-8", newline="")
    for faults in ("error", "skip-and-record"):
        try:
            assert all(isinstance(draft, Draft) for draft in drafts(slot, Raw(tmp_path, faults), "train"))
        except SourceError as error:
            assert str(tmp_path) in str(error)


@quick
@given(data=st.data(), value=JSON)
def test_no_json_value_breaks_the_readers(tmp_path, data, value):
    slot, name = data.draw(st.sampled_from([("avqa", "json/avqa-train.json"), ("avqa_thu", "train_qa.json")]))
    unav = data.draw(st.booleans())
    slot, name = ("unav", "data/unav100_annotations.json") if unav else (slot, name)
    old = SETS[slot]["files"][name]
    entry = next(iter(old["database"].values())) if unav else old[0]
    entry = entry | {data.draw(st.sampled_from(sorted(entry))): value}
    text = json.dumps({"database": {"v": entry}} if unav else [entry])
    (tmp_path / Path(name).name).write_text(text, encoding="utf-8")
    raw = Raw(tmp_path, faults="skip-and-record")
    assert list(drafts(slot, raw, "train")) == []  # there are no media
    counted = entry.get("subset", "train") == "train" or "fault" in raw.left_out
    assert sum(map(len, raw.left_out.values())) == counted
