"""A whole tree walked: what is wrong is named, what is right is kept, and nothing stops the walk."""

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_probe import endless, holed

from crab import tasks
from crab.data import media, records, validate
from crab.data.findings import NOTES, PROBLEMS, TOLERABLE, ValidationError
from crab.data.records import RecordError
from crab.tasks.referring import NULL

pytestmark = pytest.mark.usefixtures("probed_here")
SOME = ("ks", "s4", "ucf", "avqa_thu", "a2v")


def walk(root, *slots, **options):
    return validate.validate(root, slots or None, **{"on_problem": "skip", "workers": 1, "progress": False, **options})


def listed(root, slot, split="train"):
    return root / "AVUIE_2" / slot / f"{split}.json"


def spoil(root, slot, change, split="train"):
    """Let `change` alter a list of records in place, or give another."""
    path = listed(root, slot, split)
    loaded = json.loads(path.read_text())
    path.write_text(json.dumps(change(loaded) or loaded))


@pytest.fixture
def copy(tree, tmp_path):
    """A copy of some slots, to spoil."""
    for slot in SOME:
        shutil.copytree(tree.root / "AVUIE_2" / slot, tmp_path / "AVUIE_2" / slot)
    return tmp_path


def named(report):
    return {(f.problem, f"{f.slot}/{f.split}", f.index) for f in report.findings}


# ---------------------------------------------------------------- what is right

def test_a_generated_tree_is_right_and_counted(tree, probed_apart):
    report = walk(tree.root, on_problem="error", workers=2)
    assert report.findings == [] and report.known == 0
    assert [(c.slot, c.split) for c in report.counts] == [(s.name, split) for s in tasks.SLOTS.values() for split in s.splits]
    for count in report.counts:
        made = tree.summary["slots"][count.slot][count.split]
        assert count.listed == count.kept == made["records"] and not count.left_out and count.published is None
        assert (count.files, count.bytes) == (made["files"], made["bytes"])
        assert count.seconds == pytest.approx([1.0 if tasks.get_slot(count.slot).media == "image_audio" else 10.0] * len(count.seconds))
        raws = json.loads(listed(tree.root, count.slot, count.split).read_text())
        assert report.lists[count.slot, count.split] == raws
    assert f"{sum(c.kept for c in report.counts)} kept, 0 left out. " in report.summary()


def test_records_with_the_published_fields_alone_are_right(tree, tmp_path):
    """Those that the generated tree adds are not needed; test records of the pixel slots then have a mask and no answer."""
    shutil.copytree(tree.root, tmp_path / "tree", copy_function=os.link)
    for slot in tasks.SLOTS.values():
        for split in slot.splits:
            path = listed(tmp_path / "tree", slot.name, split)
            raws = [{name: raw[name] for name in slot.fields(split)} for raw in json.loads(path.read_text())]
            path.unlink()
            path.write_text(json.dumps(raws))
    assert walk(tmp_path / "tree", on_problem="error").findings == []
    for slot in ("s4", "ref_avs", "arig"):
        assert all(item.second == 0 for r in records.read(tmp_path / "tree", slot, "test") for item in r["media"] if item.kind == "audio")


def test_published_counts_are_shown_where_they_are_known(tree, monkeypatch):
    monkeypatch.setitem(tasks.SLOTS, "ks", dataclasses.replace(tasks.SLOTS["ks"], published_train=20))
    assert [c.published for c in walk(tree.root, "ks", "ucf").counts] == [20, None, None, None]


# ---------------------------------------------------------------- what is wrong

FIELDS = [  # change to ks/train, problem, place, words
    (lambda r: r[1].pop("action"), "field", 1, "no field 'action'"),
    (lambda r: r[2].update(label=None), "field", 2, "field 'label': is null"),
    (lambda r: r[2].update(label=3), "field", 2, "field 'label': is a number; give text"),
    (lambda r: r[2].update(action=["a"]), "field", 2, "field 'action': is a list; give text"),
    (lambda r: r[2].update(action=True), "field", 2, "field 'action': is true or false; give text"),
    (lambda r: r[0].update(label="playing drums"), "answer", 0, "field 'label' holds no answer that can be read"),
    (lambda r: r[0].update(label="<answer>a</answer> <answer>b</answer>"), "answer", 0, "no answer that can be read"),
    (lambda r: r[0].update(action=" "), "answer", 0, "field 'action' is empty"),
    (lambda r: r[0].update(action="dozing", label="so . <answer>dog</answer>"), "answer", 0, "'label' says 'dog', and action 'dozing'; correct"),
    (lambda r: r[3].update(video_path="../../../etc/passwd"), "path", 3, "field 'video_path' leaves its folder"),
    (lambda r: r[3].update(video_path="/etc/passwd"), "path", 3, "field 'video_path' leaves its folder"),
    (lambda r: r[3].update(video_path="a\\b.mp4"), "path", 3, "give a relative POSIX path"),
    (lambda r: r[3].update(video_path=7), "path", 3, "give a relative POSIX path"),
    (lambda r: r[3].update(video_path=""), "path", 3, "give a relative POSIX path"),
    (lambda r: r[3].update(video_path="a" * 5000), "missing", 3, "cannot be reached"),
    (lambda r: r[3].update(video_path="\ud800.mp4"), "field", 3, "lone surrogate"),
    (lambda r: r[3].update(more="\ud800"), "field", 3, "lone surrogate"),
    (lambda r: r[3].update(video_path="gone.mp4"), "missing", 3, "does not exist"),
    (lambda r: r[3].update(video_path="train_00000.mp4/x.mp4"), "missing", 3, "does not exist"),
    (lambda r: r[3].update(video_path="."), "path", 3, "leaves its folder"),
    (lambda r: r[3].update(mask="x"), "field", 3, "a name this reader uses itself"),
    (lambda r: r.insert(0, "text"), "field", 0, "is a str; it must be an object"),
    (lambda r: [x.update(id="same") for x in r[:2]], "id twice", 1, "'same' is also that of record 0"),
    (lambda r: r[1].update(id={}), "field", 1, "field 'id': is an object; give text or a number"),
]


@pytest.mark.parametrize("change, problem, place, words", FIELDS)
def test_a_bad_record_is_named_and_left_out_alone(copy, change, problem, place, words):
    spoil(copy, "ks", lambda r: [change(r)] and None)
    n = len(json.loads(listed(copy, "ks").read_text()))
    report = walk(copy, "ks")
    assert named(report) == {(problem, "ks/train", place)}
    (finding,) = report.findings
    assert words in finding.words and "; " in finding.words and finding.left_out and str(copy) not in str(finding)
    train = report.counts[0]
    assert (train.listed, train.kept, dict(train.left_out)) == (n, n - 1, {problem: 1})
    # the others keep their names, whatever their place is now
    assert [r["id"] for r in report.lists["ks", "train"]] == [
        r.get("id", f"ks/train/{i:05d}") if isinstance(r, dict) else None for i, r in enumerate(json.loads(listed(copy, "ks").read_text()))
        if i != place]


def test_the_reader_refuses_what_the_validator_names(copy):
    for change, problem, place, _ in FIELDS:
        if problem in ("field", "path", "id twice"):
            original = listed(copy, "ks").read_text()
            spoil(copy, "ks", lambda r: [change(r)] and None)
            with pytest.raises(RecordError, match=f"train.json: record {place}: "):
                records.read(copy, "ks", "train")
            listed(copy, "ks").write_text(original)


@pytest.mark.parametrize("content, problem, words", [
    (b'[\n {"vid": "a",\n', "unreadable list", "malformed JSON at line 3"), (b"", "unreadable list", "malformed JSON at line 1"),
    (b'{"vid": "a"}', "unreadable list", "holds a dict"), (b'["\xff"]', "unreadable list", "not UTF-8 at byte 2"),
    (b"[" * 200_000, "unreadable list", "nested too deep"), (b"[" + b"9" * 5000 + b"]", "unreadable list", "number that cannot be read"),
    (b"[]", "no records", "an empty list"), (None, "no list", "no such file"), ("folder", "unreadable list", "cannot be read"),
])  # fmt: skip
def test_a_bad_list_is_named_and_the_others_are_walked(copy, content, problem, words):
    path = listed(copy, "ks")
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    report = walk(copy, "ks", "ucf")
    assert named(report) == {(problem, "ks/train", None)} and words in report.findings[0].words
    assert str(copy) not in report.findings[0].words and report.findings[0].file == "AVUIE_2/ks/train.json"
    assert [c.kept for c in report.counts] == [0, 3, 4, 3] and ("ks", "train") not in report.lists
    assert report.counts[0].listed == (0 if content == b"[]" else None)
    assert ("ks/train" in report.summary()) == (content != b"[]")


def clips(root, slot="ucf", which=0):
    """A medium of each train record."""
    return [Path(record["media"][which].path) for record in records.read(root, slot, "train")]


def spoil_media(root):
    """One bad file of each kind -> the problem it must be found under, and the place of its record.

    A file that cannot be used is not asked for its name.
    """
    at = root / "AVUIE_2"
    whole = (at / "ks/video/train_00000.mp4").read_bytes()
    (at / "ks/video/train_00000.mp4").write_bytes(whole[: len(whole) // 2])
    (at / "ks/audio/train_00001.mp3").unlink()
    (at / "ks/audio/train_00001.mp3").touch()
    soundfile.write(at / "ks/audio/train_00002.mp3", np.zeros(0), 16000, format="WAV")
    shutil.copy(at / "ks/audio/test_00000.mp3", at / "ks/video/train_00003.mp4")  # sound where a clip should be
    (at / "ks/video/test_00000.mp4").unlink()
    (at / "ks/video/test_00000.mp4").mkdir()
    (at / "ks/video/test_00001.mp4").unlink()
    os.mkfifo(at / "ks/video/test_00001.mp4")  # whoever opens it waits for ever
    (at / "ks/video/test_00002.mp4").write_text("text")
    masks = sorted((at / "s4/AVS/v1s").glob("test_*/labels_rgb/0.png"))
    masks[0].unlink()
    masks[1].write_bytes(masks[1].read_bytes()[:60])
    first, _, third, _ = clips(root)
    first.write_bytes(first.read_bytes()[: first.stat().st_size * 2 // 3])
    shutil.copy(third, third.with_suffix(".mp4"))
    spoil(root, "ucf", lambda r: r[2].update(video_path=r[2]["video_path"].replace(".avi", ".mp4")))
    spoil(root, "s4", lambda r: r[1].update(frame_idx=4), "train")  # the sound is of one second
    return {
        ("truncated", "ks/train", 0), ("empty", "ks/train", 1), ("no sound", "ks/train", 2), ("no video", "ks/train", 3),
        ("not a file", "ks/test", 0), ("not a file", "ks/test", 1), ("undecodable", "ks/test", 2), ("missing", "s4/test", 0),
        ("undecodable", "s4/test", 1), ("truncated", "ucf/train", 0), ("name", "ucf/train", 2), ("no such second", "s4/train", 1),
        ("other frame", "s4/train", 1),
    }  # fmt: skip


def test_bad_media_are_named_and_left_out(copy, probed_apart):
    wanted = spoil_media(copy)
    report = walk(copy, "ks", "s4", "ucf", report=copy / "findings.csv", workers=2)
    assert named(report) == wanted
    for count in report.counts:
        mine = [f for f in report.findings if (f.slot, f.split) == (count.slot, count.split) and f.left_out]
        assert count.kept == count.listed - len(mine) and count.left_out.total() == len(mine)
    assert ("ks", "train") not in report.lists and len(report.lists["s4", "test"]) == 1
    rows = list(csv.DictReader(open(copy / "findings.csv")))
    assert len(rows) == len(wanted) and {(r["problem"], f"{r['slot']}/{r['split']}", int(r["index"])) for r in rows} == wanted
    by = {(r["slot"], r["split"], r["index"]): r for r in rows if r["left_out"] == "True"}
    assert by["ks", "train", "0"]["file"] == "AVUIE_2/ks/video/train_00000.mp4" and by["ks", "train", "0"]["record"] == "ks/train/00000"
    assert by["s4", "test", "0"]["file"].endswith("labels_rgb/0.png")
    assert by["s4", "train", "1"]["words"].startswith("lasts 1.00 s, and the record is about second 4; give")


def test_error_raises_after_the_walk_with_the_first_and_where_all_are(copy):
    wanted = spoil_media(copy)
    with pytest.raises(ValidationError) as caught:
        walk(copy, "ks", "s4", "ucf", report=copy / "findings.csv", on_problem="error")
    said = str(caught.value)
    assert f"{len(wanted) - 1} problems (" in said and f"and {len(wanted) - 6} more" in said and "2 not a file" in said
    assert "ks/train, record 0 (ks/train/00000): AVUIE_2/ks/video/train_00000.mp4: is truncated" in said
    assert f"All are listed in {copy / 'findings.csv'}" in said and "set on_problem to skip" in said and "with name in tolerate" in said
    assert len(list(csv.DictReader(open(copy / "findings.csv")))) == len(wanted)


def test_what_is_tolerated_is_noted_and_kept(copy):
    third = clips(copy)[2]
    third.rename(third.with_suffix(".mp4"))
    spoil(copy, "ucf", lambda r: r[2].update(video_path=r[2]["video_path"].replace(".avi", ".mp4")))
    assert [c.kept for c in walk(copy, "ucf").counts] == [3, 3]
    report = walk(copy, "ucf", tolerate=["name"], on_problem="error")
    assert named(report) == {("name", "ucf/train", 2)} and [c.kept for c in report.counts] == [4, 3]
    assert "Noted, and kept: 1 name." in report.summary() and "holds avi, is named '.mp4'" in report.findings[0].words
    assert len(records.load(records.read(copy, "ucf", "train")[2], 10)) == 2  # read all the same


def test_a_clip_on_which_the_decoder_hangs_is_named(copy, probed_apart):
    (copy / "AVUIE_2/ks/video/train_00001.mp4").unlink()
    os.rename(endless(copy), copy / "AVUIE_2/ks/video/train_00001.mp4")
    report = walk(copy, "ks", time_limit=1.5, cache=copy / "cache")
    assert named(report) == {("hangs", "ks/train", 1)} and report.counts[0].kept == 3
    again = walk(copy, "ks", time_limit=1.5, cache=copy / "cache")
    assert named(again) == {("hangs", "ks/train", 1)} and again.probed == 1  # perhaps the machine was busy


def test_the_test_split_needs_its_truth_and_not_its_answer(copy):
    spoil(copy, "ks", lambda r: [r[0].update(label="no tags"), r[1].update(action="")] and None, "test")
    spoil(copy, "avqa_thu", lambda r: [r[0].update(answer=9), r[1].update(multi_choice=["a"])] and None, "test")
    spoil(copy, "s4", lambda r: [r[0].pop("label_content"), r[1].update(label_content="nowhere")] and None, "test")
    report = walk(copy, "ks", "avqa_thu", "s4")
    assert named(report) == {("unread answer", "ks/test", 0), ("answer", "ks/test", 1), ("answer", "avqa_thu/test", 0),
                             ("answer", "avqa_thu/test", 1), ("answer", "s4/test", 1)}  # fmt: skip
    assert [c.kept for c in report.counts] == [4, 2, 4, 1, 4, 2]
    assert "the truth is taken from action" in next(f.words for f in report.findings if f.problem == "unread answer")


def test_a_test_answer_that_is_not_the_truth_is_noted_and_so_is_a_truth_that_none_can_say(copy):
    spoil(copy, "ks", lambda r: [r[0].update(label="<answer>dog</answer>"), r[1].update(action="<x>")] and None, "test")
    spoil(copy, "a2v", lambda r: [r[0].update(label="<answer>banana</answer>"), r[1].update(label=f"<answer>{r[1]['correct_video']}</answer>")]
          and None, "test")
    report = walk(copy, "ks", "a2v", on_problem="error")
    assert named(report) == {("other answer", "ks/test", 0), ("other answer", "ks/test", 1), ("unsaid truth", "ks/test", 1),
                             ("other answer", "a2v/test", 0)}  # fmt: skip
    assert [c.kept for c in report.counts] == [4, 3, 4, 3] and "3 other answer, 1 unsaid truth" in report.summary()
    assert "'label' says 'banana', and correct_video " in next(f.words for f in report.findings if f.slot == "a2v")


def test_the_name_of_a_class_and_its_words_agree(copy):
    """As the published records of ucf have them; what is learned from the one is right by the other."""
    for split in ("train", "test"):
        spoil(copy, "ucf", lambda r: [x.update(label=x["label"].title().replace(" ", "")) for x in r] and None, split)
    assert walk(copy, "ucf", on_problem="error").findings == []
    found = records.read(copy, "ucf", "test")
    assert tasks.score("ucf", found, [tasks.target("ucf", record, "bare") for record in found])["primary"] == 1


def test_a_record_that_stands_twice_is_found(copy):
    spoil(copy, "ks", lambda r: [*r, dict(reversed(r[1].items())), {**r[0], "label": f"so . {r[0]['label']}"}])
    report = walk(copy, "ks")
    assert named(report) == {("record twice", "ks/train", 4)} and report.counts[0].kept == 5
    assert "has all fields alike with record 1; take one" in report.findings[0].words and "with record twice in tolerate" in report.complaint(None)
    assert walk(copy, "ks", tolerate=["record twice"], on_problem="error").counts[0].kept == 6


def test_a_frame_of_another_number_than_its_name_is_noted(copy):
    spoil(copy, "s4", lambda r: [x.update(frame_idx=0.0) for x in r[:2]] and None, "test")  # as it is
    clip = Path(records.read(copy, "s4", "test")[2]["media"][0].path).parents[1]
    for name, suffix in (("frames", "jpg"), ("labels_rgb", "png")):
        (clip / name / f"0.{suffix}").rename(clip / name / f"2.{suffix}")
    spoil(copy, "s4", lambda r: r[2].update(visual_path=r[2]["visual_path"].replace("0.jpg", "2.jpg")), "test")
    report = walk(copy, "s4", on_problem="error")
    assert named(report) == {("other frame", "s4/test", 2)} and report.counts[1].kept == 3
    assert "field 'frame_idx' is 0, and the frame's file is named 2; " in report.findings[0].words


@pytest.mark.parametrize("samples, kept", [(1599, 3), (1600, 4)])
def test_a_sound_must_last_long_enough_to_be_heard(copy, samples, kept):
    sound = clips(copy, "ks", 1)[1]
    soundfile.write(sound, np.zeros(samples), 16000, format="WAV")
    report = walk(copy, "ks", decode=True, tolerate=["name"])
    assert report.counts[0].kept == kept
    found = [f for f in report.findings if f.problem == "no sound"]
    assert len(found) == 4 - kept
    if found:
        assert "lasts 99.9 ms, too short to be heard; give a sound of 0.1 s or more" in found[0].words and found[0].file.endswith(sound.name)


def test_a_second_that_the_sound_hardly_reaches_is_not_there(copy):
    sound = Path(records.read(copy, "s4", "train")[1]["media"][1].path)
    spoil(copy, "s4", lambda r: r[1].update(frame_idx=2))
    for seconds, out in ((2.05, True), (2.5, False)):
        media.write_audio(sound, np.full(round(seconds * 16000), 0.1))
        report = walk(copy, "s4")
        assert (("no such second", "s4/train", 1) in named(report)) == out and report.counts[0].kept == 4 - out


def test_nothing_to_find_needs_no_mask(tree, tmp_path):
    shutil.copytree(tree.root / "AVUIE_2/ref_avs", tmp_path / "AVUIE_2/ref_avs")
    found = records.read(tmp_path, "ref_avs", "test")
    for record in [*found, *records.read(tmp_path, "ref_avs", "train")]:  # to train, none is needed
        Path(record["mask"]).unlink(missing_ok=True)
    report = walk(tmp_path, "ref_avs")
    there = [i for i, r in enumerate(found) if tasks.truth("ref_avs", r) != NULL]
    assert there and named(report) == {("missing", "ref_avs/test", i) for i in there}


# ---------------------------------------------------------------- train and test apart, links

def test_media_of_the_test_split_in_the_train_split_are_found(copy):
    at = copy / "AVUIE_2/ks"
    spoil(copy, "ks", lambda r: r[1].update(video_path="test_00000.mp4"))
    (at / "audio/train_00002.mp3").unlink()
    os.link(at / "audio/test_00001.mp3", at / "audio/train_00002.mp3")  # another name of the same file
    (at / "video/train_00003.mp4").unlink()
    (at / "video/train_00003.mp4").symlink_to("test_00002.mp4")
    spoil(copy, "avqa_thu", lambda r: r[0].update(id="test_00001"))
    report = walk(copy, "ks", "avqa_thu")
    assert named(report) == {("overlap", "ks/train", i) for i in (1, 2, 3)} | {("overlap", "avqa_thu/train", 0)}
    assert "is also shown by ks/test, record 0 (ks/test/00000); take one of the two out" in report.findings[0].words
    assert [c.kept for c in report.counts] == [1, 3, 3, 3]  # the test split stays whole
    assert [c.kept for c in walk(copy, "ks", "avqa_thu", tolerate=["overlap"], on_problem="error").counts] == [4, 3, 4, 3]
    spoil(copy, "ks", lambda r: r[0].pop("action"), "test")  # a test record that is left out overlaps with nothing
    assert ("overlap", "ks/train", 1) not in named(walk(copy, "ks"))


def test_links_may_not_leave_the_root(copy, tree, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    at = copy / "AVUIE_2/ks"
    (at / "video").rename(outside / "video")
    (at / "video").symlink_to(outside / "video")
    (at / "audio/train_00000.mp3").rename(outside / "sound.mp3")
    (at / "audio/train_00000.mp3").symlink_to(outside / "sound.mp3")
    (at / "audio/train_00001.mp3").rename(at / "inside.mp3")
    (at / "audio/train_00001.mp3").symlink_to("../inside.mp3")
    for sound, target in zip(clips(copy, "ucf", 1)[1:3], ("nowhere.mp3", clips(copy, "ucf", 1)[2].name), strict=True):
        sound.unlink()
        sound.symlink_to(target)  # the second to itself
    report = walk(copy, "ks", "ucf")
    links = [f.file for f in report.findings if f.problem == "link"]
    assert len(links) == 8 and "AVUIE_2/ks/audio/train_00000.mp3" in links and "AVUIE_2/ks/audio/train_00001.mp3" not in links
    assert report.counts[0].kept == report.counts[1].kept == 0 and "leads out of the root" in report.findings[0].words
    assert named(report) >= {("missing", "ucf/train", 1), ("missing", "ucf/train", 2)}
    trusted = walk(copy, "ks", tolerate=["link"], on_problem="error")
    assert [c.kept for c in trusted.counts] == [4, 3]
    shutil.move(at / "train.json", outside / "train.json")
    (at / "train.json").symlink_to(outside / "train.json")
    assert ("link", "ks/train", None) in named(walk(copy, "ks")) and walk(copy, "ks", tolerate=["link"]).counts[0].kept == 4
    # the root itself may be reached by a link
    (outside / "root").symlink_to(copy)
    assert walk(outside / "root", "avqa_thu").findings == []


# ---------------------------------------------------------------- once a file, and again

def test_a_second_walk_probes_only_what_has_changed(copy):
    cache = copy / "cache"
    first = walk(copy, *SOME, cache=cache)
    assert first.known == 0 and first.probed == sum(c.files for c in first.counts)
    second = walk(copy, *SOME, cache=cache)
    assert (second.probed, second.known) == (0, first.probed) and second.counts == first.counts
    path = copy / "AVUIE_2/ks/video/train_00000.mp4"
    os.utime(path, ns=(1, 1))
    (copy / "AVUIE_2/ks/audio/train_00001.mp3").write_bytes(b"")
    third = walk(copy, *SOME, cache=cache)
    assert (third.probed, third.known) == (2, first.probed - 2) and named(third) == {("empty", "ks/train", 1)}
    assert named(walk(copy, *SOME, cache=cache)) == {("empty", "ks/train", 1)}  # also what is wrong is remembered
    assert first.media == second.media != third.media


def test_damage_inside_is_found_with_decode_and_the_cache_tells_the_two_walks_apart(copy):
    clip, cache = copy / "AVUIE_2/ks/video/train_00001.mp4", copy / "cache"
    holed(clip, clip)
    assert walk(copy, "ks", cache=cache).findings == []
    for known in (0, 14):  # two files for each of seven records
        whole = walk(copy, "ks", cache=cache, decode=True)
        assert named(whole) == {("undecodable", "ks/train", 1)} and whole.known == known
        assert [c.kept for c in whole.counts] == [3, 3]
    assert walk(copy, "ks", cache=cache).known == 14


def test_each_file_is_probed_once(tree, monkeypatch):
    seen = []
    real = validate.probe.probe
    monkeypatch.setattr(validate.probe, "probe", lambda *job: seen.append(job) or real(*job))
    report = walk(tree.root)
    assert len(seen) == len(set(seen)) == sum(c.files for c in report.counts)


# ---------------------------------------------------------------- arguments

def test_what_a_converter_left_out_is_in_the_report_and_stops_nothing(copy, tmp_path):
    told = {"train": {"left_out": {"no sound": ["list, line 1: \udcff.mp4", "list, line 2"]}}, "test": {"left_out": {"fault": ["a: b"]}}}
    path = copy / "AVUIE_2/ks/conversion.json"
    path.write_text(json.dumps({"splits": told}))
    report = walk(copy, "ks", on_problem="error", report=tmp_path / "findings.csv")
    assert [(f.kind, f.split, f.words, f.left_out) for f in report.findings] == [
        ("not converted: no sound", "train", r"no sound: list, line 1: \udcff.mp4", True),
        ("not converted: no sound", "train", "no sound: list, line 2", True), ("not converted: fault", "test", "fault: a: b", True)]
    assert report.problems == [] and [c.kept for c in report.counts] == [4, 3]
    assert "Not converted of the original data sets: 3 rows (2 no sound, 1 fault)." in report.summary()
    assert len((tmp_path / "findings.csv").read_text().splitlines()) == 4
    assert "chat model" not in report.summary()
    path.write_text(json.dumps({"splits": told, "chains": {"taken": 5, "another label": 2, "a time": 1}}))
    for slot in ("s4", "ucf"):
        shutil.copy(path, copy / "AVUIE_2" / slot)
    assert "Chains of the chat model: 15 taken, 9 refused (6 another label, 3 a time)." in walk(copy, "ks", "s4", "ucf").summary()
    for content in ("{", "[]", "{}", '{"splits": {"train": 3}}', '{"splits": {"train": {"left_out": {"a": 1}}}}', "[" * 100_000,
                    json.dumps({"splits": told, "chains": {"taken": "many"}}), json.dumps({"splits": told, "chains": []})):
        path.write_text(content)
        (finding,) = walk(copy, "ks", on_problem="error").findings
        assert finding.problem == "not converted" and not finding.left_out and "convert the set again" in finding.words


def test_what_is_not_a_slot_is_noted(copy):
    (copy / "AVUIE_2/kss").mkdir()
    (copy / "AVUIE_2/kss/train.json").write_text("[]")
    (copy / "AVUIE_2/notes").mkdir()
    report = walk(copy, "ks", on_problem="error")
    assert named(report) == {("stranger", "/", None)} and report.findings[0].file == "AVUIE_2/kss"


@pytest.mark.parametrize("options, words", [
    ({"on_problem": "ignore"}, "on_problem is 'ignore'; choose one of error, skip"),
    ({"tolerate": ["missing"]}, "'missing' leaves nothing to use"),
    ({"tolerate": "name"}, "give a list of name, link, overlap, record twice"), ({"time_limit": 0}, "time_limit is 0"), ({"workers": 0}, "workers is 0"),
    ({"slots": ["kss"]}, "did you mean 'ks'"), ({"slots": []}, "slots is .."), ({"slots": "ks"}, "slots is 'ks'; give a list"),
])  # fmt: skip
def test_bad_arguments_are_named(copy, options, words):
    with pytest.raises(ValueError, match=words):
        validate.validate(copy, **{"progress": False, **options})


def test_a_wrong_root_is_named_with_the_right_one(copy, tmp_path):
    with pytest.raises(ValueError, match="holds no folder AVUIE_2; set it to the folder that holds AVUIE_2"):
        walk(copy / "elsewhere")
    with pytest.raises(ValueError, match=f"give the folder above it, '{copy}'"):
        walk(copy / "AVUIE_2")


def test_all_problems_have_a_meaning():
    used = set(NOTES) | set(TOLERABLE) | {problem for _, problem, _, _ in FIELDS}
    assert used <= set(PROBLEMS)


# ---------------------------------------------------------------- anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tree, tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    for slot in tasks.SLOTS:
        (root / "AVUIE_2" / slot).mkdir(parents=True)
    return root


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_records_are_kept_or_named(tree, place, data):
    """A good record with any of its fields put to anything, any number of times."""
    slot = data.draw(st.sampled_from(list(tasks.SLOTS)))
    split = data.draw(st.sampled_from(tasks.get_slot(slot).splits))
    raws = json.loads(listed(tree.root, slot, split).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        raw = data.draw(st.sampled_from(raws))
        raw[data.draw(st.sampled_from([*raw, "id", "more"]))] = data.draw(JSON | st.sampled_from(["../x", "/x", "x\0y", 1e308, -1, 10**30]))
    raws.insert(data.draw(st.integers(0, 3)), data.draw(JSON))
    listed(place, slot, split).write_text(json.dumps(raws))
    run = validate._Walk(place, frozenset(), decode=False)
    uses = run.list(tasks.get_slot(slot), split)
    count = run.counts[slot, split]
    assert len(uses) + count.left_out.total() == count.listed == len(raws)
    left = {f.index for f in run.findings.get((slot, split), ()) if f.left_out}
    assert left == set(range(len(raws))) - {use.index for use in uses}
    assert all(f.words and f.file and f.record and f.problem in PROBLEMS for f in run.findings.get((slot, split), ()))
    for use in uses:  # media are asked for under the root alone
        assert all(Path(os.path.normpath(place / path)).is_relative_to(place / "AVUIE_2") for path, _ in use.media)
        run.stat(use.media[0][0])
    try:
        read = {record["id"] for record in records.read(place, slot, split)}
        assert {use.id for use in uses} <= read
        records.write(place, slot, split, [use.raw for use in uses], ids=True)  # can be written again
        assert records.parse(listed(place, slot, split)) == [use.raw for use in uses]
    except RecordError as error:
        assert left and str(listed(place, slot, split)) in str(error)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=60) | st.text(max_size=40).map(str.encode) | JSON.map(lambda v: json.dumps(v).encode()[:-1]))
def test_any_bytes_are_a_list_or_named(place, content):
    path = listed(place, "ks")
    path.write_bytes(content)
    run = validate._Walk(place, frozenset(), decode=False)
    uses = run.list(tasks.get_slot("ks"), "train")
    assert uses == [] and (run.findings["ks", "train"] or run.counts["ks", "train"].listed)
    with pytest.raises(RecordError, match="train.json") if content.strip() != b"[]" else pytest.raises(StopIteration):
        next(iter(records.read(place, "ks", "train")))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_list_with_any_bytes_changed_does_not_stop_the_walk(tree, place, data):
    whole = bytearray(listed(tree.root, "avqa").read_bytes()[:2000])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    listed(place, "avqa").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    run = validate._Walk(place, frozenset(), decode=False)
    uses, count = run.list(tasks.get_slot("avqa"), "train"), run.counts["avqa", "train"]
    assert count.listed == len(uses) + count.left_out.total() if count.listed is not None else run.findings["avqa", "train"]


def test_numbers_that_are_none_read_as_null(place):
    listed(place, "ks").write_text('[{"a": NaN, "b": -Infinity, "c": 1e999, "d": 1.5}]')
    assert records.parse(listed(place, "ks")) == [{"a": None, "b": None, "c": None, "d": 1.5}]


def test_a_media_error_is_none_of_these(tree):
    """What the walk calls right, the readers decode."""
    for slot in SOME:
        for record in records.read(tree.root, slot, "test"):
            assert records.load(record, 4) and (not tasks.get_slot(slot).masks or media.read_mask(record["mask"]).any())
