"""What holds for every slot: round trips, targets, counting, and errors that name what is wrong."""

import subprocess
import sys

import pytest
from conftest import TRUTHS, make_record

from crab import tasks

ALL = sorted(tasks.SLOTS)
SCORED = sorted(tasks.BENCHMARKS)


def options(slot, box_masks):
    return {"masks": box_masks} if slot == "s4" else {}


def test_the_slots_are_the_ten_of_now():
    assert ALL == sorted(TRUTHS)
    assert set(ALL) - set(SCORED) == {"avcap"}


def test_importing_tasks_needs_no_torch():
    code = "import sys, crab.tasks; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'cv2')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("slot", ALL)
def test_an_answer_reads_back_as_its_truth(slot):
    for truth in TRUTHS[slot]:
        assert tasks.parse(slot, tasks.answer(slot, truth)) == truth


@pytest.mark.parametrize("slot", ALL)
def test_white_space_around_tokens_does_not_matter(slot):
    for truth in TRUTHS[slot]:
        text = tasks.answer(slot, truth)
        if "(food)" in text or "horn, small" in text:
            continue  # here brackets and commas belong to the label
        for mark in "<", ",", "[", "]":
            text = text.replace(mark, f" {mark}")
        for mark in ">", ",", "[", "]":
            text = text.replace(mark, f"{mark}\n ")
        if slot in ("arig", "avvp"):
            text = text.replace(")", " )")
        if slot == "arig":
            text = text.replace("(", " ( ")
        if slot == "avcap":
            assert tasks.parse(slot, text) == truth
        else:
            assert tasks.parse(slot, f" so .\t{text} .") == truth


@pytest.mark.parametrize("slot", ALL)
def test_targets(slot, records_of):
    for record, truth in zip(records_of(slot), TRUTHS[slot]):
        explicit = tasks.target(slot, record, "explicit")
        bare = tasks.target(slot, record, "bare")
        assert explicit == record[tasks.get_slot(slot).answer_field]
        assert explicit.endswith(bare)
        if slot != "avcap":
            assert bare == tasks.answer(slot, truth) != explicit
            assert tasks.truth(slot, record) == tasks.parse(slot, explicit) == truth


@pytest.mark.parametrize("slot", sorted(set(ALL) - {"avcap"}))
def test_an_answer_without_its_tags_is_no_target(slot, records_of):
    record = dict(records_of(slot)[0])
    record[tasks.get_slot(slot).answer_field] = "i hear a bell ."
    for form in tasks.FORMS:
        with pytest.raises(ValueError, match=f"{slot}.*{tasks.get_slot(slot).answer_field}"):
            tasks.target(slot, record, form)


def test_bare_keeps_only_the_tags_of_published_prose():
    record = {"label_content": "The event is <event>Church bell</event>, its range is <range>0,10</range>."}
    assert tasks.target("ave", record, "bare") == "<event>Church bell</event> <range>0,10</range>"
    record = {"label_content": "The cat is at [1,2,3,4], points [1,2],[2,3],[3,4]."}
    assert tasks.target("s4", record, "bare") == "[1,2,3,4] [1,2] [2,3] [3,4]"
    with pytest.raises(ValueError, match="form"):
        tasks.target("ave", record, "short")


@pytest.mark.parametrize("slot", SCORED)
def test_true_answers_score_one_and_garbage_zero(slot, records_of, box_masks):
    records = records_of(slot)
    right = [tasks.target(slot, r, "explicit") for r in records]
    result = tasks.score(slot, records, right, **options(slot, box_masks))
    assert result["primary"] == 1.0 and result["per_sample"] == [1.0] * 3
    assert result["metrics"][tasks.get_slot(slot).metric] == 1.0
    assert (result["n_expected"], result["n_found"], result["n_scored"], result["n_unparsable"]) == (3, 3, 3, 0)
    result = tasks.score(slot, records, ["", "no tag", right[0] + right[0]], **options(slot, box_masks))
    unread = 2 if slot == "avvp" else 3  # events may be told twice
    assert result["n_unparsable"] == unread
    assert result["per_sample"][:2] == [0.0, 0.0]
    if slot != "avvp":
        assert all(v == 0 for k, v in result["metrics"].items() if k != "no_mask")
    assert 0 < tasks.chance(slot, records, **options(slot, box_masks)) <= 1


@pytest.mark.parametrize("slot", SCORED)
def test_predictions_are_found_by_id_and_none_may_be_missing_or_over(slot, records_of, box_masks):
    records = records_of(slot)
    ids = [tasks.sample_id(slot, r, i) for i, r in enumerate(records)]
    assert ids[2] == f"{slot}/test/00002"
    texts = {i: tasks.target(slot, r, "bare") for i, r in zip(ids, records)}
    turned = dict(reversed(texts.items()))
    assert tasks.score(slot, records, turned, **options(slot, box_masks))["primary"] == 1.0
    for wrong, named in (
        ({i: texts[i] for i in ids[:1]}, f"2 of 3 .*{ids[1]}, {ids[2]}"),
        (texts | {ids[1]: None}, ids[1]),
        (texts | {"stranger": ""}, "stranger"),
        (texts | {ids[1]: 7}, ids[1]),
        (list(texts.values())[:2], ids[2]),
        (list(texts.values()) + [""], "4 predictions for 3"),
        ("abc", "not one text"),
    ):
        with pytest.raises(ValueError, match=named):
            tasks.score(slot, records, wrong, **options(slot, box_masks))
    with pytest.raises(ValueError, match="no test records"):
        tasks.score(slot, [], {})


def test_own_ids_are_used_and_must_be_unique(records_of):
    records = [r | {"id": name} for r, name in zip(records_of("ks"), "abb")]
    with pytest.raises(ValueError, match="not unique: b"):
        tasks.score("ks", records, ["", "", ""])
    records[2]["id"] = 7
    assert tasks.score("ks", records, {"a": "", "b": "", "7": ""})["ids"] == ["a", "b", "7"]
    assert tasks.score("ks", records, {"x": "", "y": "", "z": ""}, ids=["x", "y", "z"])["primary"] == 0


@pytest.mark.parametrize(("slot", "wrong"), [
    ("ave", ("bell", 6, 2)), ("ave", ("bell", 0, 11)), ("ave", ("", 0, 1)), ("ave", ("<x>", 0, 1)), ("ave", None),
    ("avvp", ()), ("avvp", (("audio", "bell", 4, 4),)), ("avvp", (("smell", "bell", 1, 4),)),
    ("arig", (16, 24, 10, 88)), ("arig", (16, 24, 232, 88)), ("arig", (1, 2, 3)),
    ("s4", ((0, 0, 8, 8), ((1, 1), (2, 2)))), ("avqa", ""), ("cremad", "</answer>"),
])
def test_a_truth_without_a_valid_answer_is_refused(slot, wrong):
    with pytest.raises(ValueError, match=f"slot {slot}"):
        tasks.answer(slot, wrong)


def test_instructions_and_corpus(records_of):
    records = {"avqa": records_of("avqa") + records_of("avqa")}
    texts = list(tasks.corpus(records))
    assert len(texts) == len(set(texts)) == 9 + 3
    for slot in ALL:
        text = tasks.instruction(slot, records_of(slot)[0])
        assert text in texts and text == text.lower()
        if slot != "avqa":
            assert text.split()[-1] in "?." and "  " not in text
    assert tasks.instruction("avqa", {"question": "how many {things} sound ?"}) == "how many {things} sound ?"
    with pytest.raises(ValueError, match="question"):
        tasks.instruction("avqa", {})


def test_tags_are_the_published_ones():
    names = ("event", "range", "audio", "visual", "obj", "answer")
    assert sorted(tasks.tags()) == sorted(f"<{s}{n}>" for n in names for s in ("", "/"))


def test_captions_are_not_scored(records_of):
    for call in (lambda r: tasks.score("avcap", r, [""] * 3), lambda r: tasks.chance("avcap", r)):
        with pytest.raises(ValueError, match="training only"):
            call(records_of("avcap"))


@pytest.mark.parametrize(("slot", "change", "named"), [
    ("ave", {"start_time": 10}, "start_time"), ("ave", {"end_time": "x"}, "end_time"),
    ("avvp", {"label_content": "none"}, "label_content"), ("arig", {"top_left": [300, 2]}, "top_left"),
    ("arig", {"top_left": 5}, "top_left"), ("s4", {"label_content": None}, "label_content"),
    ("avqa", {"type": "audio"}, "type"), ("avqa", {"type": "[" * 100_000}, "type"), ("avqa", {"answer": " "}, "answer"),
    ("a2v", {"correct_video": 3}, "correct_video"),
])
def test_a_bad_truth_is_an_error_that_names_record_and_field(slot, change, named, records_of, box_masks):
    records = records_of(slot)
    records[1] |= change | {"id": "r1"}
    with pytest.raises(ValueError, match=f"id=r1.*{named}"):
        tasks.score(slot, records, [tasks.answer(slot, TRUTHS[slot][0])] * 3, **options(slot, box_masks))


def test_a_missing_truth_field_is_named():
    record = make_record("cremad", 0, "<answer>sad</answer>", "sad")
    del record["emotion"]
    with pytest.raises(ValueError, match="'emotion'"):
        tasks.chance("cremad", [record])
