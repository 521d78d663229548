"""A whole tree checked: each problem is named, good records are kept, and nothing stops the walk."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import PARTS, listed, rows_of, spoil

from crab import tasks
from crab.data import media, probe, records, validate
from crab.data.findings import PROBLEMS, ValidationError
from crab.data.records import RecordError

pytestmark = pytest.mark.usefixtures("probed_here")
SOME = ("ks", "s4", "ucf", "avqa_thu", "a2v")


def walk(root, *slots, **options):
    return validate.validate(root, slots or None, **{"on_problem": "skip", "workers": 1, "progress": False, **options})


def put(place, **fields):
    """A change for `spoil`: set fields of one record."""
    return lambda rows: rows[place].update(fields)


def own_lists(tree, folder):
    """A tree with the same media and its own lists, to spoil."""
    shutil.copytree(tree, folder / "tree", copy_function=os.link)
    for path in (folder / "tree/AVUIE_2").glob("*/t*.json"):
        path.unlink()
        shutil.copy(tree / path.relative_to(folder / "tree"), path)
    return folder / "tree"


def named(report):
    return {(f.problem, f"{f.slot}/{f.split}", f.index) for f in report.findings}


def kept(report):
    return [count.kept for count in report.counts]


@pytest.fixture
def copy(tree, tmp_path):
    """A copy of some slots, to spoil."""
    for slot in SOME:
        shutil.copytree(tree.root / "AVUIE_2" / slot, tmp_path / "AVUIE_2" / slot)
    return tmp_path


# ---------------------------------------------------------------- good trees


def test_a_generated_tree_has_no_problems_and_is_counted(tree, probed_apart):
    report = walk(tree.root, on_problem="error", workers=2)
    assert report.findings == [] and report.known == 0 and [(c.slot, c.split) for c in report.counts] == PARTS
    for count in report.counts:
        built = tree.summary["slots"][count.slot][count.split]
        assert count.listed == count.kept == built["records"] and not count.left_out
        assert (count.files, count.bytes) == (built["files"], built["bytes"])
        seconds = 1.0 if tasks.get_slot(count.slot).media == "image_audio" else 10.0
        assert count.seconds == pytest.approx([seconds] * len(count.seconds)) and count.seconds
        assert report.lists[count.slot, count.split] == rows_of(tree.root, count.slot, count.split)


def test_published_fields_alone_are_enough(tree, tmp_path):
    """Test records of the pixel slots then have a mask and no answer."""
    root = own_lists(tree.root, tmp_path)
    for slot, split in PARTS:
        fields = tasks.get_slot(slot).fields(split)
        spoil(root, slot, lambda rows, fields=fields: [{name: raw[name] for name in fields} for raw in rows], split)
    assert walk(root, on_problem="error").findings == []
    for slot in ("s4", "ref_avs", "arig"):
        assert {item.second for r in records.read(root, slot, "test") for item in r["media"]} == {None, 0}


# ---------------------------------------------------------------- lists and records

FIELDS = [  # change to ks/train, problem, place, words
    (lambda r: r[1].pop("action"), "field", 1, "no field 'action'"),
    (put(2, label=None), "field", 2, "field 'label': is null"),
    (put(2, label=3), "field", 2, "field 'label': is a number; give text"),
    (put(0, label="playing drums"), "answer", 0, "field 'label' holds no answer that can be read"),
    (put(0, action=" "), "answer", 0, "field 'action' is "),
    (put(0, action="nap", label="<answer>dog</answer>"), "answer", 0, "'label' says 'dog', and action 'nap'; corr"),
    (put(3, video_path="../../../etc/passwd"), "path", 3, "field 'video_path' leaves its folder"),
    (put(3, video_path="/etc/passwd"), "path", 3, "field 'video_path' leaves its folder"),
    (put(3, video_path="a\\b.mp4"), "path", 3, "give a relative POSIX path"),
    (put(3, video_path="a" * 5000), "missing", 3, "cannot be reached"),
    (put(3, video_path="\ud800.mp4"), "field", 3, "lone surrogate"),
    (put(3, more="\ud800"), "field", 3, "lone surrogate"),
    (put(3, video_path="gone.mp4"), "missing", 3, "does not exist"),
    (put(3, video_path="train_00000.mp4/x.mp4"), "missing", 3, "does not exist"),
    (put(3, video_path="."), "path", 3, "leaves its folder"),
    (put(3, mask="x"), "field", 3, "field 'mask': this reader uses the name itself"),
    (lambda r: r.insert(0, "text"), "field", 0, "is a str; it must be an object"),
    (lambda r: {x.update(id="same") for x in r[:2]}, "id twice", 1, "'same' is also that of record 0"),
    (put(1, id={}), "field", 1, "field 'id': is an object; give text or a number"),
]


@pytest.mark.parametrize("change, problem, place, words", FIELDS)
def test_a_bad_record_is_named_and_left_out_alone(copy, change, problem, place, words):
    spoil(copy, "ks", change)
    rows = rows_of(copy, "ks")
    report = walk(copy, "ks")
    assert named(report) == {(problem, "ks/train", place)}
    (finding,) = report.findings
    assert words in finding.words and "; " in finding.words and finding.left_out and str(copy) not in str(finding)
    train = report.counts[0]
    assert (train.listed, train.kept, dict(train.left_out)) == (len(rows), len(rows) - 1, {problem: 1})
    # the others keep their names, whatever their place is now
    ids = [row.get("id", f"ks/train/{i:05d}") for i, row in enumerate(rows) if i != place]
    assert [row["id"] for row in report.lists["ks", "train"]] == ids
    if problem in ("field", "path", "id twice"):
        with pytest.raises(RecordError, match=f"train.json: record {place}: "):
            records.read(copy, "ks", "train")


def lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize(
    "write",
    [
        lambda rows: json.dumps(rows).encode("utf-8-sig"),
        lambda rows: lines(rows).encode(),
        lambda rows: f"{lines(rows)}\r\n\r\n".replace("}\n{", "}\r\n\r\n{").encode("utf-8-sig"),
    ],
)
def test_a_list_may_begin_with_a_mark_or_hold_one_record_per_line(copy, write):
    rows = rows_of(copy, "ks")
    rows[1]["note"] = "a line\u2028separator"
    listed(copy, "ks").write_bytes(write(rows))
    report = walk(copy, "ks", on_problem="error")
    assert report.findings == [] and report.lists["ks", "train"] == rows
    assert len(records.read(copy, "ks", "train")) == 4


@pytest.mark.parametrize(
    "content, problem, words",
    [
        (b'[\n {"vid": "a",\n', "unreadable list", "malformed JSON at line 3"),
        (b"", "unreadable list", "malformed JSON at line 1"),
        (b'{"vid": "a"}', "unreadable list", "holds a dict"),
        (b'["\xff"]', "unreadable list", "is not UTF-8: byte 2 cannot be read; save it as UTF-8"),
        (b'{"vid": "a"}\n{"vid": "b"}\n{"vid"\n', "unreadable list", "malformed JSON at line 3, column 7"),
        (b'{"vid": "a"}\n\n{"vid": "b", "vid": 2}\n', "unreadable list", "'vid' stands twice"),
        (b"[" * 200_000, "unreadable list", "nested too deep"),
        (b"[" + b"9" * 5000 + b"]", "unreadable list", "number that cannot be read"),
        (
            b'[{"vid": 3, "b": 1, "b": 2}]',
            "unreadable list",
            r"'b' stands twice in one record \('vid' 3, .* 1 and 2;",
        ),
        (b'[{"more": {"x": 1, "y": 2, "x": 1}}]', "unreadable list", "'x' stands twice"),
        (b"[]", "no records", "an empty list"),
        (None, "no list", "no such file"),
        ("folder", "unreadable list", "cannot be read"),
    ],
)
def test_a_bad_list_is_named_and_the_others_are_checked(copy, content, problem, words):
    path = listed(copy, "ks")
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    report = walk(copy, "ks", "ucf")
    assert named(report) == {(problem, "ks/train", None)} and re.search(words, report.findings[0].words)
    if problem != "no records":
        with pytest.raises(RecordError, match=re.escape(f"{path}: ") + ".*" + words):
            records.read(copy, "ks", "train")
    assert str(copy) not in report.findings[0].words and report.findings[0].file == "AVUIE_2/ks/train.json"
    assert kept(report) == [0, 3, 4, 3] and ("ks", "train") not in report.lists
    assert report.counts[0].listed == (0 if content == b"[]" else None)


def test_a_test_record_needs_its_truth_and_not_its_answer(copy):
    spoil(copy, "ks", lambda r: {r[0].update(label="no tags"), r[1].update(action="")}, "test")
    spoil(copy, "avqa_thu", lambda r: {r[0].update(answer=9), r[1].update(multi_choice=["a"])}, "test")
    spoil(copy, "s4", lambda r: {r[0].pop("label_content"), r[1].update(label_content="nowhere")}, "test")
    report = walk(copy, "ks", "avqa_thu", "s4")
    answers = {("answer", part, i) for part, i in (("ks/test", 1), ("avqa_thu/test", 0), ("avqa_thu/test", 1))}
    assert named(report) == answers | {("unread answer", "ks/test", 0), ("answer", "s4/test", 1)}
    assert kept(report) == [4, 2, 4, 1, 4, 2]
    assert "the truth is taken from action" in next(f.words for f in report.findings if f.problem == "unread answer")


def test_a_test_record_need_not_carry_its_training_answer(tree, tmp_path):
    """The loader of the release does not read it."""
    root = own_lists(tree.root, tmp_path)
    without = {*"label label_content new_label".split()}
    without |= {f"{name}_event" for name in "audio audio1 audio2 video video1 video2".split()}
    for slot in tasks.BENCHMARKS:
        fields = {*tasks.get_slot(slot).fields("test")} & without - ({"label"} if slot == "ucf" else set())
        for index, value in ((0, "drop"), (1, None)):  # pandas writes null for what is not there
            rows = rows_of(root, slot, "test")
            if slot == "avvp":  # its truth then is in another field
                rows[index]["event"] = tasks.answer(slot, tasks.truth(slot, rows[index]))
            truth = tasks.truth(slot, rows[index])
            for name in fields:
                rows[index][name] = None
                if value == "drop":
                    del rows[index][name]
            listed(root, slot, "test").write_text(json.dumps(rows), encoding="utf-8")
            record = records.read(root, slot, "test")[index]
            assert tasks.truth(slot, record) == truth and not fields & {*record}
    assert walk(root, *tasks.BENCHMARKS, on_problem="error").findings == []
    spoil(root, "ks", lambda r: r[0].pop("label") and None)
    spoil(root, "ks", lambda r: r[0].pop("action") and None, "test")
    words = [finding.words for finding in walk(root, "ks").findings]
    assert words[0].startswith("no field 'label'") and words[1].endswith("ks/test need video_path, audio_path, action")


OTHER_TYPES = [  # slot, change of its first test record: as the published lists have it
    ("avqa", lambda r: r.update(type=str(["Audio-Visual", "Location"]))),
    ("avqa", lambda r: r.update(type=["Audio-Visual", "Location"], question="Is the <Object> on the <LR> louder ?")),
    ("avqa_thu", lambda r: r.update(multi_choice=str(r["multi_choice"]))),
    ("avqa_thu", lambda r: r.update(multi_choice=json.dumps(r["multi_choice"]))),
    ("ave", lambda r: r.update(start_time=f"{r['start_time']}.0", end_time=float(r["end_time"]))),
    ("arig", lambda r: r.update(top_left=[v + 0.4 for v in r["top_left"]], bottom_right=str(r["bottom_right"]))),
    ("arig", lambda r: r.update(frame_idx="0.0")),
]


@pytest.mark.parametrize("slot, change", OTHER_TYPES)
def test_values_of_other_types_that_the_published_lists_have(tree, tmp_path, slot, change):
    root = own_lists(tree.root, tmp_path)
    before = rows_of(root, slot, "test")[0]
    spoil(root, slot, lambda rows: change(rows[0]), "test")
    rows = rows_of(root, slot, "test")
    assert rows[0] != before and walk(root, slot, on_problem="error").findings == []
    assert tasks.truth(slot, rows[0]) == tasks.truth(slot, before)
    if slot == "avqa_thu":
        assert tasks.instruction(slot, rows[0]) == tasks.instruction(slot, before)


def test_a_range_of_unav_has_as_many_decimals_as_it_likes(tree, tmp_path):
    shutil.copytree(tree.root / "AVUIE_2/unav", tmp_path / "AVUIE_2/unav")
    spoil(tmp_path, "unav", put(0, label_content="<event>bell</event> <range>4.3611,10.0</range>"))
    assert walk(tmp_path, "unav", on_problem="error").findings == []


def test_media_of_arig_may_lie_in_its_own_folder(tree, tmp_path):
    """Of one record they do; those of the others lie in that of s4."""
    for slot in ("arig", "s4"):
        shutil.copytree(tree.root / "AVUIE_2" / slot, tmp_path / "AVUIE_2" / slot)
    before = records.write_manifest(tmp_path)
    row = rows_of(tmp_path, "arig", "test")[1]
    clip = Path(row["visual_path"]).parents[1]
    assert clip == Path(row["audio_path"]).parent
    (tmp_path / "AVUIE_2/arig" / clip).parent.mkdir(parents=True)
    shutil.move(tmp_path / "AVUIE_2/s4" / clip, tmp_path / "AVUIE_2/arig" / clip)
    assert walk(tmp_path, "arig", on_problem="error").findings == []
    media_of = [item.path for record in records.read(tmp_path, "arig", "test") for item in record["media"]]
    folders = [Path(path).relative_to(tmp_path).parts[1] for path in media_of]
    assert folders == ["s4"] * 2 + ["arig"] * 2 + ["s4"] * 2
    assert all(len(records.load(record, 1)) == 2 for record in records.read(tmp_path, "arig", "test"))
    assert records.write_manifest(tmp_path)["arig/train"] == before["arig/train"]
    shutil.rmtree(tmp_path / "AVUIE_2/arig" / clip)
    (finding, other) = walk(tmp_path, "arig").findings
    assert finding.problem == other.problem == "missing" and finding.file.startswith("AVUIE_2/s4/")


def test_an_answer_that_is_not_the_truth_is_noted_and_so_is_a_truth_that_no_answer_can_say(copy):
    spoil(copy, "ks", lambda r: {r[0].update(label="<answer>dog</answer>"), r[1].update(action="<x>")}, "test")
    spoil(copy, "a2v", put(0, label="<answer>banana</answer>"), "test")
    spoil(copy, "a2v", lambda r: r[1].update(label=f"<answer>{r[1]['correct_video']}</answer>"), "test")
    report = walk(copy, "ks", "a2v", on_problem="error")
    others = {("other answer", part, i) for part, i in (("ks/test", 0), ("ks/test", 1), ("a2v/test", 0))}
    assert named(report) == others | {("unsaid truth", "ks/test", 1)} and kept(report) == [4, 3, 4, 3]
    assert "'label' says 'banana', and correct_video " in next(f.words for f in report.findings if f.slot == "a2v")


def test_a_record_that_is_there_twice(copy):
    spoil(copy, "ks", lambda r: [*r, dict(reversed(r[1].items())), {**r[0], "label": f"so . {r[0]['label']}"}])
    report = walk(copy, "ks")
    assert named(report) == {("record twice", "ks/train", 4)} and report.counts[0].kept == 5
    assert "fields are equal to those of record 1; remove one" in report.findings[0].words
    assert "with record twice in tolerate" in report.complaint(None)
    assert walk(copy, "ks", tolerate=["record twice"], on_problem="error").counts[0].kept == 6


def test_a_frame_whose_number_is_not_that_of_its_name_is_noted(copy):
    spoil(copy, "s4", lambda r: {x.update(frame_idx=0.0) for x in r[:2]}, "test")  # the same number
    clip = Path(records.read(copy, "s4", "test")[2]["media"][0].path).parents[1]
    for name, suffix in (("frames", "jpg"), ("labels_rgb", "png")):
        (clip / name / f"0.{suffix}").rename(clip / name / f"2.{suffix}")
    spoil(copy, "s4", lambda r: r[2].update(visual_path=r[2]["visual_path"].replace("0.jpg", "2.jpg")), "test")
    report = walk(copy, "s4", on_problem="error")
    assert named(report) == {("other frame", "s4/test", 2)} and report.counts[1].kept == 3
    assert "field 'frame_idx' is 0, and the frame's file is named 2; " in report.findings[0].words


def test_a_folder_that_is_not_a_slot_is_noted(copy):
    (copy / "AVUIE_2/kss").mkdir()
    listed(copy, "kss").write_text("[]", encoding="utf-8")
    (copy / "AVUIE_2/notes").mkdir()
    report = walk(copy, "ks", on_problem="error")
    assert named(report) == {("stranger", "/", None)} and report.findings[0].file == "AVUIE_2/kss"


# ---------------------------------------------------------------- media


def paths(root, slot, which=0):
    """One medium of each train record."""
    return [Path(record["media"][which].path) for record in records.read(root, slot, "train")]


def rename_third_clip(root):
    """Give the third clip of ucf, an avi, the suffix of an mp4, in its record too."""
    clip = paths(root, "ucf")[2]
    clip.rename(clip.with_suffix(".mp4"))
    spoil(root, "ucf", lambda r: r[2].update(video_path=r[2]["video_path"].replace(".avi", ".mp4")))


def spoil_media(root):
    """One bad file of each kind. Returns the problems that must be found."""
    ks, tested = root / "AVUIE_2/ks", root / "AVUIE_2/ks/video"
    for clip in (ks / "video/train_00000.mp4", paths(root, "ucf")[0]):
        clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    soundfile.write(ks / "audio/train_00002.mp3", np.zeros(0), 16000, format="WAV")  # its wrong name does not matter
    for clip in ("test_00000.mp4", "test_00001.mp4"):
        (tested / clip).unlink()
    (tested / "test_00000.mp4").mkdir()
    os.mkfifo(tested / "test_00001.mp4")  # to open it takes for ever
    masks = sorted((root / "AVUIE_2/s4/AVS/v1s").glob("test_*/labels_rgb/0.png"))
    masks[0].unlink()
    masks[1].write_bytes(masks[1].read_bytes()[:60])
    rename_third_clip(root)
    spoil(root, "s4", put(1, frame_idx=4))  # its sound lasts one second
    problems = {
        "ks/train": {0: "truncated", 2: "no sound"},
        "ks/test": {0: "not a file", 1: "not a file"},
        "s4/test": {0: "missing", 1: "undecodable"},
        "ucf/train": {0: "truncated", 2: "name"},
        "s4/train": {1: "no such second"},
    }
    places = {(problem, part, i) for part in problems for i, problem in problems[part].items()}
    return places | {("other frame", "s4/train", 1)}


def test_bad_media_are_named_and_left_out(copy, probed_apart):
    problems = spoil_media(copy)
    report = walk(copy, "ks", "s4", "ucf", report=copy / "findings.csv", workers=2)
    assert named(report) == problems
    for count in report.counts:
        out = [f for f in report.findings if (f.slot, f.split) == (count.slot, count.split) and f.left_out]
        assert count.kept == count.listed - len(out) and count.left_out.total() == len(out)
    assert len(report.lists["ks", "train"]) == 2 and len(report.lists["s4", "test"]) == 1
    with open(copy / "findings.csv", encoding="utf-8") as file:
        rows = {(r["problem"], f"{r['slot']}/{r['split']}", int(r["index"])): r for r in csv.DictReader(file)}
    assert rows.keys() == problems
    first = rows["truncated", "ks/train", 0]
    assert (first["file"], first["record"]) == ("AVUIE_2/ks/video/train_00000.mp4", "ks/train/00000")
    assert rows["missing", "s4/test", 0]["file"].endswith("labels_rgb/0.png")


def test_an_error_names_the_first_problems_and_where_all_are_listed(copy):
    problems = spoil_media(copy)
    with pytest.raises(ValidationError) as caught:
        walk(copy, "ks", "s4", "ucf", report=copy / "findings.csv", on_problem="error")
    first = "ks/train, record 0 (ks/train/00000): AVUIE_2/ks/video/train_00000.mp4: is truncated"
    numbers = [f"{len(problems) - 1} problems (", "2 not a file", f"and {len(problems) - 6} more"]
    fixes = [f"All are listed in {copy / 'findings.csv'}", "set on_problem to skip", "with name in tolerate"]
    assert all(words in str(caught.value) for words in [first, *numbers, *fixes])
    assert len((copy / "findings.csv").read_text(encoding="utf-8").splitlines()) == len(problems) + 1


def test_tolerated_problems_are_noted_and_their_records_kept(copy):
    rename_third_clip(copy)
    assert kept(walk(copy, "ucf")) == [3, 3]
    report = walk(copy, "ucf", tolerate=["name"], on_problem="error")
    assert named(report) == {("name", "ucf/train", 2)} and kept(report) == [4, 3]
    assert "holds avi, is named '.mp4'" in report.findings[0].words and not report.findings[0].left_out
    assert len(records.load(records.read(copy, "ucf", "train")[2], 10)) == 2  # it is read all the same


@pytest.mark.parametrize(
    "slot, seconds, problem, words",
    [
        ("ks", 0.0999, "no sound", "lasts 99.9 ms, too short to be heard; give a sound of 0.1 s or more"),
        ("ks", 0.1, "", ""),
        ("s4", 2.05, "no such second", "lasts 2.05 s, and the record is about second 2; give the whole sound"),
        ("s4", 2.5, "", ""),
    ],
)
def test_a_sound_must_be_long_enough(copy, slot, seconds, problem, words):
    spoil(copy, slot, put(1, frame_idx=2))
    media.write_audio(paths(copy, slot, 1)[1].with_suffix(".wav"), np.full(round(seconds * 16000), 0.1))
    paths(copy, slot, 1)[1].with_suffix(".wav").replace(paths(copy, slot, 1)[1])
    report = walk(copy, slot, decode=True, tolerate=["name"])
    faults = [finding for finding in report.findings if finding.left_out]
    assert [(f.problem, f.index) for f in faults] == [(problem, 1)] * bool(problem)
    assert all(finding.words.startswith(words) for finding in faults) and kept(report)[0] == 4 - bool(problem)


def test_a_mask_is_only_needed_if_something_is_to_be_found_and_scored(tree, tmp_path):
    shutil.copytree(tree.root / "AVUIE_2/ref_avs", tmp_path / "AVUIE_2/ref_avs")
    tested = records.read(tmp_path, "ref_avs", "test")
    for record in [*tested, *records.read(tmp_path, "ref_avs", "train")]:
        Path(record["mask"]).unlink(missing_ok=True)
    there = [i for i, record in enumerate(tested) if tasks.truth("ref_avs", record) != tasks.NULL]
    assert there and named(walk(tmp_path, "ref_avs")) == {("missing", "ref_avs/test", i) for i in there}


def test_media_and_ids_of_test_records_in_the_train_split_are_found(copy):
    at = copy / "AVUIE_2/ks"
    spoil(copy, "ks", put(1, video_path="test_00000.mp4"))
    for name in ("audio/train_00002.mp3", "video/train_00003.mp4"):
        (at / name).unlink()
    os.link(at / "audio/test_00001.mp3", at / "audio/train_00002.mp3")  # another name of the same file
    (at / "video/train_00003.mp4").symlink_to("test_00002.mp4")
    spoil(copy, "avqa_thu", put(0, id="test_00001"))
    report = walk(copy, "ks", "avqa_thu")
    assert named(report) == {("overlap", "ks/train", i) for i in (1, 2, 3)} | {("overlap", "avqa_thu/train", 0)}
    assert "is also shown by ks/test, record 0 (ks/test/00000); remove one" in report.findings[0].words
    assert kept(report) == [1, 3, 3, 3]  # the test split stays whole
    assert kept(walk(copy, "ks", "avqa_thu", tolerate=["overlap"], on_problem="error")) == [4, 3, 4, 3]
    spoil(copy, "ks", lambda r: r[0].pop("action"), "test")  # a test record that is left out overlaps with nothing
    assert ("overlap", "ks/train", 1) not in named(walk(copy, "ks"))


def test_an_overlap_that_a_published_set_has_is_a_note(tree, tmp_path):
    for slot in ("avqa", "ks"):
        shutil.copytree(tree.root / "AVUIE_2" / slot, tmp_path / "AVUIE_2" / slot)
    tested = rows_of(tmp_path, "avqa", "test")
    for place in (0, 2):
        spoil(tmp_path, "avqa", put(place, **{name: tested[place][name] for name in ("video_path", "audio_path")}))
    report = walk(tmp_path, "avqa", on_problem="error")
    assert named(report) == {("own overlap", "avqa/train", 0), ("own overlap", "avqa/train", 2)}
    assert len(report.findings) == 2 and kept(report) == [4, 3]  # one per record
    assert "is also shown by avqa/test, record 0 (avqa/test/00000)" in report.findings[0].words
    assert "remove" not in report.findings[0].words and not report.problems
    # media of another slot's test split are a problem still
    shown = rows_of(tmp_path, "ks", "test")[0]["video_path"]
    for name in (shown, rows_of(tmp_path, "avqa", "train")[3]["video_path"]):
        (tmp_path / "AVUIE_2/avqa/video" / name).unlink(missing_ok=True)
    os.link(tmp_path / "AVUIE_2/ks/video" / shown, tmp_path / "AVUIE_2/avqa/video/of_ks.mp4")
    spoil(tmp_path, "avqa", put(3, video_path="of_ks.mp4"))
    assert ("overlap", "avqa/train", 3) in named(walk(tmp_path, "avqa", "ks"))


@pytest.mark.parametrize(
    "disk, listed_as, words",
    [
        ("U\u0308bung.mp4", "\u00dcbung.mp4", "'U\u0308bung.mp4' does, which differs in the form of its accents"),
        ("\u00dcbung.mp4", "U\u0308bung.mp4", "'\u00dcbung.mp4' does, which differs in the form of its accents"),
        ("clip.MP4", "clip.mp4", "'clip.MP4' does, which differs in case; rename the file, or correct the record"),
        ("a/Clip.mp4", "A/clip.mp4", "'AVUIE_2/ks/video/a/Clip.mp4' does, which differs in case"),
        ("U\u0308 1.MP4", "\u00fc 1.mp4", "which differs in case"),
        ("clip.mp4", "clip.mp4 ", "'clip.mp4' does, which differs in white space"),
        ("clip.mp4", "AVUIE_2/ks/video/clip.mp4", "'AVUIE_2/ks/video/clip.mp4' does; give the path below"),
        ("clip.mp4", "clop.mp4", "does not exist; check the path in the record"),
        ("clip.mp4", "CLIP.mp4/x", "does not exist; check the path in the record"),
        ("a/clip.mp4", "A", "does not exist; check the path in the record"),
    ],
)
def test_the_near_twin_of_a_missing_file_is_named(copy, disk, listed_as, words):
    folder = copy / "AVUIE_2/ks/video"
    (folder / disk).parent.mkdir(exist_ok=True)
    (folder / rows_of(copy, "ks")[0]["video_path"]).rename(folder / disk)
    spoil(copy, "ks", put(0, video_path=listed_as))
    (finding,) = walk(copy, "ks").findings
    assert finding.problem == "missing" and finding.left_out and words in finding.words
    assert str(copy) not in finding.words
    (folder / disk).rename(folder / "elsewhere.mp4")  # a later walk sees what is there then
    if "/" not in listed_as:
        assert "does not exist; check" in walk(copy, "ks").findings[0].words


def test_folders_may_be_links_and_files_must_not_leave_the_root(copy, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    at = copy / "AVUIE_2/ks"
    (at / "audio/train_00001.mp3").rename(at / "inside.mp3")
    (at / "audio/train_00001.mp3").symlink_to("../inside.mp3")
    for name in ("video", "audio/train_00000.mp3"):
        (at / name).rename(outside / Path(name).name)
        (at / name).symlink_to(outside / Path(name).name)
    for sound in paths(copy, "ucf", 1)[1:3]:
        sound.unlink()
        sound.symlink_to(sound.name if "2" in sound.name else "nowhere")  # the second one to itself
    report = walk(copy, "ks", "ucf")
    links = [f.file for f in report.findings if f.problem == "link"]
    assert links == ["AVUIE_2/ks/audio/train_00000.mp3"] and "leads out of the root" in report.findings[0].words
    assert kept(report)[:2] == [3, 3] and named(report) >= {("missing", "ucf/train", i) for i in (1, 2)}
    assert kept(walk(copy, "ks", tolerate=["link"], on_problem="error")) == [4, 3]
    shutil.move(at / "train.json", outside / "train.json")
    (at / "train.json").symlink_to(outside / "train.json")
    assert ("link", "ks/train", None) in named(walk(copy, "ks"))
    assert kept(walk(copy, "ks", tolerate=["link"])) == [4, 3]
    (outside / "root").symlink_to(copy)  # the root itself may be a link, and so may the folder of a slot
    (at.parent / "avqa_thu").rename(outside / "avqa_thu")
    (at.parent / "avqa_thu").symlink_to(outside / "avqa_thu")
    assert walk(outside / "root", "avqa_thu", on_problem="error").findings == []
    assert kept(walk(copy, "avqa_thu", on_problem="error")) == [4, 3]


# ---------------------------------------------------------------- one probe per file


def test_each_file_is_probed_once_until_it_changes(copy, monkeypatch):
    jobs, real, options = [], probe.probe, {"cache": copy / "cache"}
    monkeypatch.setattr(probe, "probe", lambda *job: jobs.append(job) or real(*job))
    first, second = walk(copy, *SOME, **options), walk(copy, *SOME, **options)
    assert len(jobs) == len(set(jobs)) == first.probed == sum(c.files for c in first.counts) and first.known == 0
    assert (second.probed, second.known) == (0, first.probed) and second.counts == first.counts
    os.utime(copy / "AVUIE_2/ks/video/train_00000.mp4", ns=(1, 1))
    (copy / "AVUIE_2/ks/audio/train_00001.mp3").write_bytes(b"")
    for probed in (2, 0):  # problems are remembered too
        report = walk(copy, *SOME, **options)
        assert report.probed == probed and named(report) == {("empty", "ks/train", 1)}


# ---------------------------------------------------------------- converted slots, arguments


def test_rows_that_a_converter_left_out_are_reported_and_stop_nothing(copy, tmp_path):
    train = {"no sound": ["list, line 1: \udcff.mp4", "list, line 2"]}
    content = {"splits": {"train": {"left_out": train}, "test": {"left_out": {"fault": ["a: b"]}}}}
    path = copy / "AVUIE_2/ks/conversion.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    report = walk(copy, "ks", on_problem="error", report=tmp_path / "findings.csv")
    assert [(f.kind, f.split, f.words, f.left_out) for f in report.findings] == [
        ("not converted: no sound", "train", r"no sound: list, line 1: \udcff.mp4", True),
        ("not converted: no sound", "train", "no sound: list, line 2", True),
        ("not converted: fault", "test", "fault: a: b", True),
    ]
    assert report.problems == [] and kept(report) == [4, 3] and not report.chains
    assert len((tmp_path / "findings.csv").read_text(encoding="utf-8").splitlines()) == 4
    path.write_text(json.dumps({**content, "chains": {"taken": 5, "another label": 2, "a time": 1}}), encoding="utf-8")
    for slot in ("s4", "ucf"):
        shutil.copy(path, copy / "AVUIE_2" / slot)
    assert walk(copy, "ks", "s4", "ucf").chains == {"taken": 15, "another label": 6, "a time": 3}


@pytest.mark.parametrize("splits, chains", [("{", "{}"), ('{"train": {"left_out": {"a": 1}}}', "{}"), (None, "[]")])
def test_a_converters_report_that_cannot_be_read_is_noted(copy, splits, chains):
    splits = splits or '{"train": {"left_out": {}}, "test": {"left_out": {}}}'
    content = f'{{"splits": {splits}, "chains": {chains}}}'
    (copy / "AVUIE_2/ks/conversion.json").write_text(content, encoding="utf-8")
    (finding,) = walk(copy, "ks", on_problem="error").findings
    assert finding.problem == "not converted" and not finding.left_out and "convert the set again" in finding.words


@pytest.mark.parametrize(
    "options, words",
    [
        ({"on_problem": "ignore"}, "on_problem is 'ignore', .*; give one of error, skip, "),
        ({"tolerate": ["missing"]}, "tolerate is .'missing'., .*; give .* a list of name, link, overlap, "),
        ({"time_limit": 0}, "time_limit is 0; give .* a number above 0"),
        ({"slots": ["kss"]}, "did you mean 'ks'"),
        ({"root": "elsewhere"}, "holds no folder AVUIE_2; set it to the folder that holds AVUIE_2"),
        ({"root": "AVUIE_2"}, "give the folder above it, '{root}'"),
    ],
)
def test_wrong_arguments_are_named(copy, options, words):
    options = {**options, "root": copy / options.get("root", ".")}
    with pytest.raises(ValueError, match=words.format(root=copy)):
        validate.validate(**options, progress=False)


# ---------------------------------------------------------------- any input

TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def place(tree, tmp_path_factory):
    """A root with empty folders, for lists of any content."""
    root = tmp_path_factory.mktemp("fuzz")
    for slot in tasks.SLOTS:
        (root / "AVUIE_2" / slot).mkdir(parents=True)
    return root


def checked(root, slot, split="train"):
    """The walk through one list, before its media are looked for: its entries, its numbers, its findings."""
    run = validate._Walk(root, (), None)
    run.read(tasks.get_slot(slot), split)
    return run, run.entries[slot, split], run.counts[slot, split], run.findings[slot, split]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_records_are_kept_or_named(tree, place, data):
    """Good records with any fields set to anything."""
    slot = data.draw(st.sampled_from(list(tasks.SLOTS)))
    split = data.draw(st.sampled_from(tasks.get_slot(slot).splits))
    rows = rows_of(tree.root, slot, split)
    for _ in range(data.draw(st.integers(1, 3))):
        value = data.draw(JSON | st.sampled_from(["../x", "/x", "x\0y", 1e308, -1, 10**30]))
        raw = data.draw(st.sampled_from(rows))
        raw[data.draw(st.sampled_from([*raw, "id", "more"]))] = value
    rows.insert(data.draw(st.integers(0, 3)), data.draw(JSON))
    listed(place, slot, split).write_text(json.dumps(rows), encoding="utf-8")
    run, entries, count, _ = checked(place, slot, split)
    assert len(entries) == count.listed == len(rows)
    assert all(words and file and e.id and problem in PROBLEMS for e in entries for problem, words, file in e.faults)
    good = [entry for entry in entries if not run.left_out(entry)]
    for entry in good:  # media are only looked for under the root
        assert all(Path(os.path.normpath(place / path)).is_relative_to(place / "AVUIE_2") for path, _ in entry.media)
        assert run.media.stat(entry.media[0][0]).fault
    try:
        ids = {record["id"] for record in records.read(place, slot, split)}
        assert {entry.id for entry in good} <= ids
        records.write(place, slot, split, [entry.raw for entry in good], ids=True)  # they can be written again
        assert records.parse(listed(place, slot, split)) == [entry.raw for entry in good]
    except RecordError as error:
        assert len(good) < len(rows) and str(listed(place, slot, split)) in str(error)
