"""Prompts as data: the package's file, and one that the user gives."""

import re

import pytest

from crab import tasks
from crab.tasks.prompts import FILE

LINES = {slot: f'{slot}: {{question: "What of {slot}?"}}' for slot in tasks.SLOTS}


def write(tmp_path, **changes):
    """A file with a question for each slot, but for ``changes``: lines by slot, "" for none."""
    path = tmp_path / "prompts.yaml"
    path.write_text("\n".join({**LINES, **changes}.values()), encoding="utf-8")
    return path


def test_the_files_texts_are_filled_with_the_record(tmp_path):
    path = write(tmp_path, avqa_thu="""
avqa_thu:
  system: "You see {video_name}."
  media: "Here:"
  question: "{question_text|question_type}\\nOptions: {multi_choice!s}, that is {multi_choice}"
""")  # fmt: skip
    prompts = tasks.read_prompts(path, tasks.SLOTS)
    assert set(prompts) == set(tasks.SLOTS) and prompts["ks"] == tasks.Prompt("What of ks?")
    record = {"video_name": "v{id}", "question_text": "Which?", "multi_choice": ["a b", "c", "d"]}
    asked = tasks.prompt("avqa_thu", record, prompts)
    assert asked.question == "Which?\nOptions: ['a b', 'c', 'd'], that is a b, c or d"
    assert (asked.system, asked.media) == ("You see v{id}.", "Here:")
    assert tasks.instruction("avqa_thu", record) == "Which? Choose a b, c or d."
    as_text = tasks.prompt("avqa_thu", record | {"multi_choice": "['a', 'b']"}, prompts)
    assert as_text.question.endswith("Options: ['a', 'b'], that is a or b")


def test_only_slots_that_are_used_must_be_there(tmp_path):
    path = write(tmp_path, ave="")
    assert "ave" not in tasks.read_prompts(path, ["ks"])
    with pytest.raises(ValueError, match=r"prompts.yaml: slot ave: there is no entry.*encode.slots"):
        tasks.read_prompts(path, ["ks", "ave"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('ks: {quesiton: "?"}', "slot ks: field 'quesiton' is unknown; use question, system, media"),
        ('ks: {system: "a"}', "slot ks: field 'question' is missing"),
        ('ks: {question: " "}', "slot ks: field 'question' is missing"),
        ("ks: {question: 3}", "slot ks: field 'question' is 3; give a text"),
        ('ks: {question: "?", media: [a]}', "slot ks: field 'media' is .*; give a text"),
        ("ks: why", "slot ks: holds no fields"),
        ('crema: {question: "?"}', "unknown slot 'crema'; did you mean 'cremad'"),
        ('ks: {question: "{hue}?"}', "slot ks: field 'question' quotes .hue., which train rec.*; they have action"),
        ('ref_avs: {question: "{idx}?"}', r"slot ref_avs: .* quotes \{idx\}, which test records do not have; they"),
        ('ks: {question: "?", system: "{label}"}', "slot ks: field 'system' quotes .label., which test records"),
        ('ks: {question: "?"', "malformed YAML.*line 1"),
        ('ks: {question: "?"}\nks: {question: "!"}', "malformed YAML.*duplicate"),
        ("- ks", "holds no slots"),
    ],
)
def test_a_wrong_file_is_refused_by_slot_and_field(tmp_path, entry, message):
    path = tmp_path / "mine.yaml"
    path.write_text(entry, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"(?s)mine\.yaml: .*{message}"):
        tasks.read_prompts(path)


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(ValueError, match=r"gone.yaml: cannot be read \(No such file.*encode.prompts"):
        tasks.read_prompts(tmp_path / "gone.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="bad.yaml: cannot be read .it is not UTF-8"):
        tasks.read_prompts(tmp_path / "bad.yaml")


@pytest.mark.parametrize("slot", tasks.SLOTS)
def test_the_package_asks_in_english(slot):
    text = tasks.PROMPTS[slot].question
    assert not re.search(r"\s[,.?]|\s\s", text), text
    assert text[0].isupper() or text[0] == "{"
    assert text[-1] in ".?}"


def test_the_packages_file_is_in_the_form_that_it_describes():
    assert list(tasks.read_prompts(FILE, tasks.SLOTS)) == list(tasks.SLOTS)
