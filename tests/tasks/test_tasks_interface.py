"""What holds for every slot: round trips, targets, counts, and errors that name the problem."""

import subprocess
import sys

import pytest
from task_records import TRUTHS, make_records, options

from crab import tasks

ALL = sorted(tasks.SLOTS)
SCORED = sorted(tasks.BENCHMARKS)
TRAIN_ONLY = ["avcap", "mer24", "unav"]


def test_there_are_nineteen_slots_and_sixteen_benchmarks():
    assert ALL == sorted(TRUTHS) and len(ALL) == 19
    assert sorted(set(ALL) - set(SCORED)) == TRAIN_ONLY


def test_importing_tasks_needs_no_torch():
    code = "import sys, crab.tasks; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'cv2')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_tags_are_the_published_ones():
    names = ("event", "range", "audio", "visual", "obj", "answer")
    assert sorted(tasks.tags()) == sorted(f"<{slash}{name}>" for name in names for slash in ("", "/"))


@pytest.mark.parametrize("slot", ALL)
def test_an_answer_reads_back_as_its_truth_whatever_the_white_space(slot):
    for truth in TRUTHS[slot]:
        text = tasks.answer(slot, truth)
        assert tasks.parse(slot, text) == truth
        if slot == "avcap" or "(food)" in text or "horn, small" in text:
            continue  # here brackets and commas belong to the label
        for mark in "<,[]" + {"arig": "()", "avvp": ")"}.get(slot, ""):
            text = text.replace(mark, f" {mark}")
        for mark in ">,[]" + {"arig": "("}.get(slot, ""):
            text = text.replace(mark, f"{mark}\n ")
        assert tasks.parse(slot, f" so .\t{text} .") == truth


@pytest.mark.parametrize("slot", ALL)
def test_targets(slot):
    for record, truth in zip(make_records(slot), TRUTHS[slot], strict=True):
        explicit, bare = (tasks.target(slot, record, form) for form in ("explicit", "bare"))
        assert explicit == record[tasks.get_slot(slot).answer_field] and explicit.endswith(bare)
        if slot != "avcap":
            assert bare == tasks.answer(slot, truth) != explicit
            assert tasks.truth(slot, record) == tasks.parse(slot, explicit) == truth
            record[tasks.get_slot(slot).answer_field] = "i hear a bell ."
            for form in tasks.FORMS:
                with pytest.raises(ValueError, match=f"{slot}.*{tasks.get_slot(slot).answer_field}"):
                    tasks.target(slot, record, form)


PROSE = "The event is <event>Church bell</event>, its range is <range>0,10</range>."
ANSWER = "<answer>True</answer>, box [16,24,80,88], points [40,48],[48,56],[56,64]."


@pytest.mark.parametrize(
    ("slot", "field", "text", "bare"),
    [
        ("ave", "label_content", PROSE, "<event>Church bell</event> <range>0,10</range>"),
        ("s4", "label_content", "A cat at [1,2,3,4], points [1,2],[2,3],[3,4].", "[1,2,3,4] [1,2] [2,3] [3,4]"),
        ("ref_avs", "output", ANSWER, "<answer>True</answer> [16,24,80,88] [40,48] [48,56] [56,64]"),
    ],
)
def test_a_bare_target_keeps_only_the_tags_of_published_prose(slot, field, text, bare):
    assert tasks.target(slot, {field: text}, "bare") == bare
    with pytest.raises(ValueError, match="form 'short'; choose one of bare, explicit"):
        tasks.target(slot, {field: text}, "short")


@pytest.mark.parametrize("slot", SCORED)
def test_true_answers_score_one_and_garbage_zero(slot):
    records = make_records(slot)
    right = [tasks.target(slot, record, "explicit") for record in records]
    result = tasks.score(slot, records, right, **options(slot))
    assert result["primary"] == result["metrics"][tasks.get_slot(slot).metric] == 1.0
    assert result["per_sample"] == [1.0] * 3
    assert [result[f"n_{count}"] for count in ("expected", "found", "scored", "unparsable")] == [3, 3, 3, 0]
    result = tasks.score(slot, records[:1], [f"{right[0]} {right[0]}"], **options(slot))
    assert result["n_unparsable"] == 0 and result["per_sample"] == [1.0]  # said twice, it is said
    result = tasks.score(slot, records, ["", "no tag", right[0].replace(">", "").replace("[", "")], **options(slot))
    assert result["n_unparsable"] == 3 and result["per_sample"] == [0.0] * 3
    # S is the one metric whose worst value is 1
    worst = {name: float(name.startswith("S_")) for name in result["metrics"] if name != "no_mask"}
    assert worst.items() <= result["metrics"].items()
    assert 0 < tasks.chance(slot, records, **options(slot)) <= 1


@pytest.mark.parametrize("slot", ["ave", "avqa_thu", "s4"])
def test_predictions_are_matched_by_id_and_none_may_be_missing_or_unknown(slot):
    records = make_records(slot)
    ids = [tasks.sample_id(slot, record, i) for i, record in enumerate(records)]
    assert ids[2] == ("id 2" if slot == "avqa_thu" else f"{slot}/test/00002")
    texts = {i: tasks.target(slot, record, "bare") for i, record in zip(ids, records, strict=True)}
    assert tasks.score(slot, records, dict(reversed(texts.items())), **options(slot))["primary"] == 1.0
    for wrong, message in (
        ({i: texts[i] for i in ids[:1]}, rf"missing \(2 of 3\): {ids[1]}, {ids[2]}"),
        (texts | {ids[1]: None}, f"missing.*{ids[1]}"),
        (texts | {"stranger": ""}, "no test record.*stranger"),
        (texts | {ids[1]: 7}, f"no text.*{ids[1]}"),
        (list(texts.values())[:2], f"missing.*{ids[2]}"),
        ([*texts.values(), ""], "no test record.*3"),
        ("abc", "not one text"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.score(slot, records, wrong, **options(slot))
    with pytest.raises(ValueError, match="no test records"):
        tasks.score(slot, [], {}, **options(slot))


def test_ids_of_the_records_are_used_and_must_be_unique():
    records = [record | {"id": name} for record, name in zip(make_records("ks"), "abb", strict=True)]
    with pytest.raises(ValueError, match="not unique.*: b"):
        tasks.score("ks", records, ["", "", ""])
    with pytest.raises(ValueError, match="1 ids for 3 records"):
        tasks.score("ks", records, ["", "", ""], ids=["a"])
    records[2]["id"] = 7
    assert tasks.score("ks", records, {"a": "", "b": "", "7": ""})["ids"] == ["a", "b", "7"]
    assert tasks.score("ks", records, {"x": "", "y": "", "z": ""}, ids=["x", "y", "z"])["primary"] == 0


@pytest.mark.parametrize(
    ("slot", "truths"),
    [
        ("ave", [("bell", 6, 2), ("bell", 0, 11), ("", 0, 1), ("<x>", 0, 1), None]),
        ("unav", [(), (("bell", 4, 4),), (("bell", -1, 4),), (("bell", 1, 4), ("", 2, 3))]),
        ("avvp", [(("audio", "bell", 4, 4),), (("smell", "bell", 1, 4),)]),
        ("arig", [(16, 24, 10, 88), (16, 24, 232, 88), (1, 2, 3)]),
        ("s4", [((0, 0, 8, 8), ()), ((0, 0, 8, 8), ((1, 1),) * 4)]),
        ("ref_avs", ["true", None, ((0, 0, 8, 8), ((1, 1), (2, 300), (3, 3)))]),
        ("avqa", [""]),
        ("cremad", ["</answer>"]),
    ],
)
def test_a_truth_without_a_valid_answer_is_an_error(slot, truths):
    for truth in truths:
        with pytest.raises(ValueError, match=f"slot {slot}"):
            tasks.answer(slot, truth)


def test_every_slot_asks_another_question():
    quoting = ("avqa", "avqa_thu", "ref_avs")
    texts = [tasks.instruction(slot, record) for slot in ALL for record in make_records(slot)]
    assert len(set(texts)) == len(ALL) - len(quoting) + 3 * len(quoting)
    assert not any("{" in text or "  " in text for text in texts)


QUESTION = {"question_text": "what ?"}


@pytest.mark.parametrize(
    ("slot", "record", "text"),
    [
        ("avqa", {"question": "how many {things} sound ?"}, "how many {things} sound ?"),
        ("avqa_thu", QUESTION | {"multi_choice": ["a bell", "drum", "horn"]}, "what ? Choose a bell, drum or horn."),
        ("avqa_thu", QUESTION | {"multi_choice": ["bell", "drum"]}, "what ? Choose bell or drum."),
        ("avqa_thu", QUESTION | {"multi_choice": []}, "what ? Choose ."),
        ("avqa_thu", QUESTION | {"multi_choice": "['a bell', 'drum']"}, "what ? Choose a bell or drum."),
        ("avqa", {"question": "['a', 'b']"}, "['a', 'b']"),
        ("ref_avs", {"object": "the red bell"}, "Is the red bell there, true or false?"),
        ("ref_avs", {"object": "bell", "description": "the blue bell"}, "Is the blue bell there, true or false?"),
    ],
)
def test_a_question_quotes_the_record(slot, record, text):
    assert tasks.instruction(slot, record).startswith(text)
    with pytest.raises(ValueError, match="no field '(question|question_text|description or object)' to ask about"):
        tasks.instruction(slot, {"uid": "x"})


@pytest.mark.parametrize("slot", TRAIN_ONLY)
def test_train_only_slots_are_not_scored(slot):
    for call in (lambda records: tasks.score(slot, records, [""] * 3), lambda records: tasks.chance(slot, records)):
        with pytest.raises(ValueError, match=f"{slot} is for training only"):
            call(make_records(slot))


MISSING = object()
NO_SECOND = [10, 2.7, "2.7", "2.0.0", "-1", "\u0663", "1_0", True, None, float("nan"), float("inf"), [2]]
NO_LABEL = ["", " ", MISSING]


@pytest.mark.parametrize(
    ("slot", "field", "values", "message"),
    [
        ("ave", "start_time", NO_SECOND, "fields event, start_time, end_time must be .* whole seconds 0 <= "),
        ("ave", "end_time", ["x"], "end_time"),
        ("avvp", "label_content", ["a bell"], "fields? 'label_content' or 'event' must hold events such as <audio>"),
        ("arig", "top_left", [[300, 2], 5, [-1.9, 2], [1], [True, 2], "x"], r"top_left.* in pixels, \[x1, y1\] and"),
        ("s4", "label_content", [None, ""], "label_content"),
        ("avqa", "type", ["audio", "[" * 9_000, "[" * 100_000, "('a',)", '["a", 1]', MISSING], "'type'"),
        ("avqa", "answer", NO_LABEL, "'answer'"),
        ("meld", "Emotion", NO_LABEL, "'Emotion'"),
        ("ucf", "label", NO_LABEL, "'label'"),
        ("a2v", "correct_video", NO_LABEL, "'correct_video'"),
        ("a2v", "correct_video", [3, "three"], "'correct_video' is .*; give 1 or 2"),
        ("ref_avs", "split", ["train", ["test_n"]], "'split' is .*; give one of test_s, test_u, test_n"),
        ("ref_avs", "split", [MISSING], "'split'"),
        ("avqa_thu", "answer", [4, -1, True, "9" * 5000, "engine"], "'answer' is .*car horn.* 0 to 3"),
        ("avqa_thu", "multi_choice", ["abcd", "['bell']", ["bell"], ["a", " "]], "'multi_choice' is .*; give a list"),
        ("avqa_thu", "multi_choice", [MISSING], "'multi_choice'"),
        ("avqa_thu", "question_type", [MISSING], "'question_type'"),
    ],
)
def test_a_bad_truth_is_an_error_that_names_record_and_field(slot, field, values, message):
    for value in values:
        records = make_records(slot)
        records[1] |= {"id": "r1", field: value}
        if value is MISSING:
            del records[1][field]
        with pytest.raises(ValueError, match=f"id=r1.*{message}"):
            tasks.score(slot, records, [tasks.answer(slot, TRUTHS[slot][0])] * 3, **options(slot))


def test_a_null_record_needs_no_answer_and_must_not_contradict_it():
    seen, null, _ = make_records("ref_avs")
    del null["output"]
    assert tasks.truth("ref_avs", null) == tasks.NULL
    with pytest.raises(ValueError, match="'output' must hold <answer>false"):
        tasks.truth("ref_avs", null | {"split": "test_s"})
    with pytest.raises(ValueError, match="disagree"):
        tasks.truth("ref_avs", seen | {"split": "test_n"})
    del seen["split"]  # as in train records
    assert tasks.truth("ref_avs", seen).box == (16, 24, 80, 88)
