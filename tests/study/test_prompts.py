"""Conventions and the order of a prompt: changed samples, against what the model's own code makes of such prompts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from encoded_samples import store_samples
from sizes import COARSE

from crab import tasks
from crab.core.files import write_json
from crab.data import records
from crab.models import omni, small
from crab.models.base import probes
from crab.models.protocol import Marks
from crab.samples.reading import MANIFEST, read_slot
from crab.study.cells import Cell
from crab.study.hardware import Hardware
from crab.study.prompts import (
    check_conventions,
    instruction_first,
    instruction_span,
    permutations,
    prefixed,
    word_token,
)
from crab.study.run import training_pairs
from crab.study.store import Store

LABELS = ["anger", "sad", "happy", "neutral"]
TRUTHS = {"train": [0, 0, 0, 1, 2, 3], "test": [3, 1, 1, 0]}
WORDS = ("one", "two", "three")
KINDS = [("video", "audio"), ("image", "audio"), ("audio", "video", "video"), ("video", "audio", "audio"), ("audio",)]


@pytest.fixture(scope="module")
def processor():
    words = sorted({*probes.words(), *LABELS, *WORDS})
    return small.build_processor(words, ["<answer>", "</answer>"], COARSE)


@pytest.fixture(scope="module")
def model(processor):
    return small.build_model(processor, COARSE, seed=0).eval()


def clip(kinds):
    draw = np.random.default_rng(0)
    media = {
        "video": lambda: omni.Media("video", draw.integers(0, 255, (4, 112, 112, 3), dtype=np.uint8), 1.0),
        "image": lambda: omni.Media("image", draw.integers(0, 255, (112, 112, 3), dtype=np.uint8)),
        "audio": lambda: omni.Media("audio", draw.standard_normal(16_000 * 4).astype(np.float32)),
    }
    return [media[kind]() for kind in kinds]


def encoded_as(model, processor, media, text, monkeypatch):
    """What encode makes of a prompt with this text."""
    with monkeypatch.context() as context:
        context.setattr(omni, "prompt_text", lambda kinds, instruction, *rest: text)
        return omni.encode(model, [omni.prepare(processor, media, "")])[0]


def same_prompt(one, other):
    return all(one[name].tolist() == other[name].tolist() for name in ("input_ids", "position_ids"))


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_instruction_first_is_what_the_model_makes_of_a_prompt_in_that_order(model, processor, kinds, monkeypatch):
    media = clip(kinds)
    usual = omni.prompt_text(kinds, "is the red bell there ?")
    head, rest = usual.split(" user ")
    placeholders, tail = rest.split(" is the red bell there ? ")
    text = f"{head} user is the red bell there ? {placeholders} {tail}"
    expected = encoded_as(model, processor, media, text, monkeypatch)
    before = encoded_as(model, processor, media, usual, monkeypatch)
    moved = instruction_first(before, omni.marks(processor.tokenizer))
    assert same_prompt(moved, expected) and not same_prompt(moved, before)
    torch.testing.assert_close(moved["features"], expected["features"])


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_prefix_is_what_the_model_makes_of_an_instruction_with_that_word(model, processor, kinds, monkeypatch):
    media = clip(kinds)
    texts = [omni.prompt_text(kinds, f"{word}is the bell there ?") for word in ("two ", "")]
    expected, before = (encoded_as(model, processor, media, text, monkeypatch) for text in texts)
    token = word_token(processor.tokenizer, "two")
    assert same_prompt(prefixed(before, token, omni.marks(processor.tokenizer)), expected)


@pytest.mark.parametrize("ids", [[5, 6, 9], [1, 5, 2], [5, 1, 6, 2, 9], [1, 5, 2, 9]])
def test_prompts_of_another_order_are_refused(ids):
    marks = Marks((1,), (2,), 9)
    assert instruction_span(torch.tensor([7, 1, 5, 2, 6, 6, 9, 8]), marks) == (1, 4, 6)
    with pytest.raises(ValueError, match="not media, instruction, end of turn; run the encode stage"):
        instruction_span(torch.tensor(ids), marks)


@pytest.mark.parametrize("count", range(1, 5))
def test_no_two_conventions_agree_anywhere(count):
    conventions = permutations(LABELS * 2, count)
    assert conventions[0] == {label: label for label in LABELS}
    for names in conventions:
        assert set(names) == set(names.values()) == set(LABELS)
    for label in LABELS:
        assert len({names[label] for names in conventions}) == count
    assert permutations(LABELS, count, seed=0) == conventions


def test_more_conventions_than_labels_are_refused():
    with pytest.raises(ValueError, match="5 conventions of 4 labels .*give 1 to 4"):
        permutations(LABELS, 5)


@pytest.fixture(scope="module")
def place(tmp_path_factory, model, processor):
    """A store over encoded samples, records and base, of cremad."""
    root = tmp_path_factory.mktemp("place")
    prompt = omni.prepare(processor, clip(("video", "audio")), tasks.instruction("cremad", {}))
    with torch.no_grad():
        sample = omni.encode(model, [prompt])[0]
    for split, numbers in TRUTHS.items():
        rows = [
            {
                "video_path": f"{i}.mp4", "audio_path": f"{i}.wav", "emotion": LABELS[n],
                "label": f"i see . <answer>{LABELS[n]}</answer>",
            }
            for i, n in enumerate(numbers)
        ]  # fmt: skip
        records.write(root / "dataset", "cremad", split, rows)
        samples = [{**sample, "features": sample["features"] + i} for i in range(len(rows))]
        texts = [
            {"id": f"cremad/{split}/{i:05d}", "instruction": tasks.instruction("cremad", row),
             **{form: tasks.target("cremad", row, form) for form in tasks.FORMS if split == "train"}}
            for i, row in enumerate(rows)
        ]  # fmt: skip
        store_samples(root / "encoded", "cremad", split, samples, texts)
    parts = {f"cremad/{split}": {"samples": len(n), "digest": split} for split, n in TRUTHS.items()}
    write_json(root / "encoded" / MANIFEST, parts)
    omni.save(root / "base", model, processor)
    folders = [root / name for name in ("encoded", "dataset", "base", "cells", "ledger", "adapters")]
    answer = {"batch_size": 8, "max_new_tokens": 6, "segmenter": "grabcut"}
    return Store(*folders, batch_size=8, precision="fp32", answer=answer, hardware=Hardware(workers=1))


def a_cell(**fields):
    return Cell("x", "lora", {"r": 2}, 1e-3, ("cremad",), 1, **fields)


def test_one_order_and_no_words_change_nothing(place):
    data, rows = place.data(a_cell(), "cremad", "test")
    assert not rows and data.ids == read_slot(place.encoded, "cremad", "test").ids and place.versions(a_cell()) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_clip_is_asked_in_each_way_and_scored_by_its_own_truth(place, split):
    cell = a_cell(words=WORDS)
    before = read_slot(place.encoded, "cremad", split)
    after, rows = place.data(cell, "cremad", split)
    names = permutations(LABELS, 3)
    original = [LABELS[n] for n in TRUTHS[split]]
    assert place.versions(cell) == 3 and after.ids == [f"{name}/{word}" for name in before.ids for word in WORDS]
    assert [tasks.truth("cremad", row) for row in rows] == [names[c][label] for label in original for c in range(3)]
    if split == "train":
        answers = [answer for _, answer in after.answered("bare")]
        assert answers == [f"<answer>{tasks.truth('cremad', row)}</answer>" for row in rows]
    for i, sample in enumerate(after):
        torch.testing.assert_close(sample["features"], before[i // 3]["features"])
        assert len(sample["input_ids"]) == len(before[0]["input_ids"]) + 1 == after.tokens[i]
        assert sample["text"]["instruction"] == f"{WORDS[i % 3]} {before[0]['text']['instruction']}"
    balance = sorted(Counter(original).values())  # the same under each convention
    for c in range(3):
        assert sorted(Counter(tasks.truth("cremad", row) for row in rows[c::3]).values()) == balance
    answers = [tasks.answer("cremad", label) for label in original for _ in WORDS]
    assert tasks.score("cremad", rows, answers)["per_sample"] == [1, 0, 0] * len(original)


def test_a_convention_alone_has_its_share_of_the_samples(place):
    whole, _ = place.data(a_cell(words=WORDS), "cremad", "test")
    for c in range(3):
        cell = a_cell(words=WORDS, convention=c)
        part, _ = place.data(cell, "cremad", "test")
        assert place.versions(cell) == 1 and part.ids == whole.ids[c::3]
        pairs = zip(part, whole[c::3], strict=True)
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in pairs)


def test_counts_of_samples_mean_clips(place):
    assert len(training_pairs(place, a_cell(words=WORDS, held_out=2, samples=3), "cremad")) == 3 * 3
    assert len(training_pairs(place, a_cell(words=WORDS, held_out=2), "cremad")) == 4 * 3
    assert len(training_pairs(place, a_cell(words=WORDS, convention=1, held_out=2), "cremad")) == 4


def test_conventions_are_part_of_the_key(place):
    cells = [a_cell(), a_cell(words=WORDS), a_cell(words=WORDS[:2]), a_cell(words=WORDS[::-1])]
    cells += [a_cell(words=WORDS, convention=c) for c in range(3)] + [a_cell(order="instruction")]
    assert len({place.key(cell) for cell in cells}) == len(cells)


def test_instruction_first_keeps_samples_and_texts(place):
    before = read_slot(place.encoded, "cremad", "train")
    after, _ = place.data(a_cell(order="instruction"), "cremad", "train")
    for one, other in zip(before, after, strict=True):
        assert one["text"] == other["text"]
        assert one["input_ids"].tolist() != other["input_ids"].tolist()
        assert sorted(one["input_ids"].tolist()) == sorted(other["input_ids"].tolist())


@pytest.mark.parametrize(
    ("words", "slot", "message"),
    [
        (["one", "one"], "cremad", "give different ones"),
        (WORDS, "meld", "slot meld takes no conventions.*use some of cremad, mafw, dfew, ks, ucf"),
        (WORDS, "avqa", "slot avqa takes no conventions"),
    ],
)
def test_conventions_that_cannot_be_are_refused(words, slot, message):
    with pytest.raises(ValueError, match=message):
        check_conventions([slot], words)


@pytest.mark.parametrize("word", ["zebra", "red bell"])
def test_words_that_are_not_one_token_are_refused(place, word):
    with pytest.raises(ValueError, match=f"experiments.words: '{word}' is not one known token"):
        replace(place).data(a_cell(words=("one", word)), "cremad", "test")
