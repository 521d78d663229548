"""What holds for every slot: round trips, targets, counting, and errors that name what is wrong."""

import subprocess
import sys

import pytest
from conftest import TRUTHS, options

from crab import tasks

ALL = sorted(tasks.SLOTS)
SCORED = sorted(tasks.BENCHMARKS)
TRAIN_ONLY = {"unav", "mer24", "avcap"}


def test_the_slots_are_the_nineteen_of_av_uie():
    assert ALL == sorted(TRUTHS) and len(ALL) == 19
    assert set(ALL) - set(SCORED) == TRAIN_ONLY


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
def test_true_answers_score_one_and_garbage_zero(slot, records_of):
    records = records_of(slot)
    right = [tasks.target(slot, r, "explicit") for r in records]
    result = tasks.score(slot, records, right, **options(slot))
    assert result["primary"] == 1.0 and result["per_sample"] == [1.0] * 3
    assert result["metrics"][tasks.get_slot(slot).metric] == 1.0
    assert (result["n_expected"], result["n_found"], result["n_scored"], result["n_unparsable"]) == (3, 3, 3, 0)
    result = tasks.score(slot, records, ["", "no tag", right[0] + right[0]], **options(slot))
    unread = 2 if slot == "avvp" else 3  # events may be told twice
    assert result["n_unparsable"] == unread
    assert result["per_sample"][:2] == [0.0, 0.0]
    if slot != "avvp":  # S is the one metric of which 1 is the worst
        assert all(v == k.startswith("S_") for k, v in result["metrics"].items() if k != "no_mask")
    assert 0 < tasks.chance(slot, records, **options(slot)) <= 1


@pytest.mark.parametrize("slot", SCORED)
def test_predictions_are_found_by_id_and_none_may_be_missing_or_over(slot, records_of):
    records = records_of(slot)
    ids = [tasks.sample_id(slot, r, i) for i, r in enumerate(records)]
    assert ids[2] == ("id 2" if slot == "avqa_thu" else f"{slot}/test/00002")
    texts = {i: tasks.target(slot, r, "bare") for i, r in zip(ids, records)}
    turned = dict(reversed(texts.items()))
    assert tasks.score(slot, records, turned, **options(slot))["primary"] == 1.0
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
            tasks.score(slot, records, wrong, **options(slot))
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
    ("unav", ()), ("unav", (("bell", 4, 4),)), ("unav", (("bell", -1, 4),)), ("unav", (("bell", 1, 4), ("", 2, 3))),
    ("ref_avs", "true"), ("ref_avs", None), ("ref_avs", ((0, 0, 8, 8), ((1, 1), (2, 300), (3, 3)))),
])
def test_a_truth_without_a_valid_answer_is_refused(slot, wrong):
    with pytest.raises(ValueError, match=f"slot {slot}"):
        tasks.answer(slot, wrong)


def test_instructions_and_corpus(records_of):
    quoting = ("avqa", "avqa_thu", "ref_avs")
    records = {slot: records_of(slot) + records_of(slot) for slot in quoting}
    texts = list(tasks.corpus(records))
    assert len(texts) == len(set(texts)) == 16 + 3 * len(quoting)  # no two slots ask the same
    for slot in ALL:
        text = tasks.instruction(slot, records_of(slot)[0])
        assert text in texts and (text == text.lower() or slot in quoting)
        if slot != "avqa":
            assert text.split()[-1] in "?." and "  " not in text
    assert tasks.instruction("avqa", {"question": "how many {things} sound ?"}) == "how many {things} sound ?"
    with pytest.raises(ValueError, match="question"):
        tasks.instruction("avqa", {})
    asked = {"question_text": "what sounds ?", "multi_choice": ["bell", "drum", "horn", "siren"]}
    assert tasks.instruction("avqa_thu", asked) == "what sounds ? choose bell , drum , horn or siren ."
    for few, said in (["bell", "drum"], "bell or drum"), (["bell"], "bell"), ([], ""):
        assert tasks.instruction("avqa_thu", asked | {"multi_choice": few}) == f"what sounds ? choose {said} ."


def test_what_is_referred_to_is_quoted_from_train_and_test_records():
    for field in "description", "object":  # train, test
        assert tasks.instruction("ref_avs", {field: "the red bell"}).startswith("is the red bell there , true or false ?")
    assert "blue" in tasks.instruction("ref_avs", {"object": "bell", "description": "the blue bell"})
    with pytest.raises(ValueError, match="description.object"):
        tasks.instruction("ref_avs", {"uid": "x"})


def test_tags_are_the_published_ones():
    names = ("event", "range", "audio", "visual", "obj", "answer")
    assert sorted(tasks.tags()) == sorted(f"<{s}{n}>" for n in names for s in ("", "/"))


@pytest.mark.parametrize("slot", sorted(TRAIN_ONLY))
def test_train_only_slots_are_not_scored(slot, records_of):
    for call in (lambda r: tasks.score(slot, r, [""] * 3), lambda r: tasks.chance(slot, r)):
        with pytest.raises(ValueError, match=f"{slot} is for training only"):
            call(records_of(slot))


@pytest.mark.parametrize(("slot", "change", "named"), [
    ("ave", {"start_time": 10}, "start_time"), ("ave", {"end_time": "x"}, "end_time"),
    ("avvp", {"label_content": "none"}, "label_content"), ("arig", {"top_left": [300, 2]}, "top_left"),
    ("arig", {"top_left": 5}, "top_left"), ("arig", {"top_left": [1.9, 2]}, "whole pixels"),
    ("arig", {"top_left": [1], "bottom_right": [2, 3, 4]}, r"\[x1, y1\] and \[x2, y2\]"), ("arig", {"top_left": [True, 2]}, "top_left"),
    ("s4", {"label_content": None}, "label_content"),
    ("avqa", {"type": "audio"}, "type"), ("avqa", {"type": "[" * 100_000}, "type"), ("avqa", {"answer": " "}, "answer"),
    ("a2v", {"correct_video": 3}, "correct_video"), ("ms3", {"label_content": ""}, "label_content"),
    ("meld", {"Emotion": " "}, "Emotion"), ("ucf", {"label": ""}, "label"), ("dfew", {"emotion": ""}, "emotion"),
    ("ref_avs", {"split": "train"}, "split"), ("ref_avs", {"split": ["test_n"]}, "split"),
    ("avqa_thu", {"answer": 4}, "answer.*0 to 3"), ("avqa_thu", {"answer": -1}, "answer"), ("avqa_thu", {"answer": True}, "answer"),
    ("avqa_thu", {"answer": "engine"}, "answer.*car horn"), ("avqa_thu", {"answer": "9" * 5000}, "answer"),
    ("avqa_thu", {"multi_choice": "abcd"}, "multi_choice"), ("avqa_thu", {"multi_choice": ["bell"]}, "multi_choice"),
    ("avqa_thu", {"multi_choice": ["bell", " "]}, "multi_choice"),
])
def test_a_bad_truth_is_an_error_that_names_record_and_field(slot, change, named, records_of):
    records = records_of(slot)
    records[1] |= change | {"id": "r1"}
    with pytest.raises(ValueError, match=f"id=r1.*{named}"):
        tasks.score(slot, records, [tasks.answer(slot, TRUTHS[slot][0])] * 3, **options(slot))


@pytest.mark.parametrize(("slot", "field"), [
    ("cremad", "emotion"), ("ucf", "label"), ("ref_avs", "split"), ("avqa_thu", "multi_choice"), ("avqa_thu", "question_type"),
])
def test_a_missing_truth_field_is_named(slot, field, records_of):
    records = records_of(slot)
    del records[1][field]
    with pytest.raises(ValueError, match=f"'{field}'"):
        tasks.score(slot, records, [""] * 3, **options(slot))


def test_the_truth_of_a_null_record_needs_no_answer_and_must_not_contradict_it(records_of):
    seen, null, _ = records_of("ref_avs")
    del null["output"]
    assert tasks.truth("ref_avs", null) == tasks.NULL
    with pytest.raises(ValueError, match="'output' must hold <answer>false"):
        tasks.truth("ref_avs", null | {"split": "test_s"})
    with pytest.raises(ValueError, match="disagree"):
        tasks.truth("ref_avs", seen | {"split": "test_n"})
    del seen["split"]  # as in train records
    assert tasks.truth("ref_avs", seen).box == (16, 24, 80, 88)
