"""Conventions and the order of a prompt: transformations of encoded samples, against what the model's own code makes."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from crab import tasks
from crab.data import records
from crab.models import omni
from crab.models.base import probes
from crab.study import conventions as module
from crab.study.conventions import Tree, conventions, permutations, prefixed, word_token
from crab.study.dataset import read_slot, write_slot
from crab.study.grid import chances, truths
from crab.study.prompt_order import instruction_first, instruction_span, marks, reordered

SIZE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, rope_theta=1e4,
    encoder_size=32, vision_layers=1, audio_layers=1, image_size=112, patch_size=14, merge_size=4, mel_bins=16, hop_length=2000, n_fft=2048,
)  # fmt: skip
LABELS = ["anger", "sad", "happy", "neutral"]
TRUTHS = {"train": [0, 0, 0, 1, 2, 3], "test": [3, 1, 1, 0]}
WORDS = ["one", "two", "three"]


@pytest.fixture(scope="module")
def processor():
    return omni.build_processor(sorted({*probes.words(), *LABELS, *WORDS}), ["<answer>", "</answer>"], SIZE)


@pytest.fixture(scope="module")
def model(processor):
    return omni.build_model(processor, SIZE, seed=0).eval()


def clip(kinds):
    draw = np.random.default_rng(0)
    of = {
        "video": lambda: omni.Media("video", draw.integers(0, 255, (4, 112, 112, 3), dtype=np.uint8), 1.0),
        "image": lambda: omni.Media("image", draw.integers(0, 255, (112, 112, 3), dtype=np.uint8)),
        "audio": lambda: omni.Media("audio", draw.standard_normal(16_000 * 4).astype(np.float32)),
    }
    return [of[kind]() for kind in kinds]


def encoded_as(model, processor, media, text, monkeypatch):
    """What encode makes of a prompt whose text is ``text``."""
    with monkeypatch.context() as context:
        context.setattr(omni, "prompt_text", lambda kinds, instruction: text)
        return omni.encode(model, [omni.prepare(processor, media, "")])[0]


KINDS = [("video", "audio"), ("image", "audio"), ("audio", "video", "video"), ("video", "audio", "audio"), ("audio",)]


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_instruction_first_is_what_the_model_makes_of_a_prompt_in_that_order(model, processor, kinds, monkeypatch):
    media = clip(kinds)
    usual = omni.prompt_text(kinds, "is the red bell there ?")
    head, rest = usual.split(" user ")
    placeholders, tail = rest.split(" is the red bell there ? ")
    text = f"{head} user is the red bell there ? {placeholders} {tail}"
    wanted = encoded_as(model, processor, media, text, monkeypatch)
    before = encoded_as(model, processor, media, usual, monkeypatch)
    found = instruction_first(before, *marks(processor.tokenizer))
    assert found["input_ids"].tolist() == wanted["input_ids"].tolist()
    assert found["position_ids"].tolist() == wanted["position_ids"].tolist()
    torch.testing.assert_close(found["features"], wanted["features"])
    # every token is still there, once, and something has moved
    assert Counter(found["input_ids"].tolist()) == Counter(before["input_ids"].tolist())
    assert found["input_ids"].tolist() != before["input_ids"].tolist()


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_prefix_is_what_the_model_makes_of_an_instruction_with_that_word(model, processor, kinds, monkeypatch):
    media = clip(kinds)
    wanted = encoded_as(model, processor, media, omni.prompt_text(kinds, "two is the bell there ?"), monkeypatch)
    before = encoded_as(model, processor, media, omni.prompt_text(kinds, "is the bell there ?"), monkeypatch)
    found = prefixed(before, word_token(processor.tokenizer, "two"), *marks(processor.tokenizer))
    assert found["input_ids"].tolist() == wanted["input_ids"].tolist()
    assert found["position_ids"].tolist() == wanted["position_ids"].tolist()


@pytest.mark.parametrize("ids", [[5, 6, 9], [1, 5, 2], [5, 1, 6, 2, 9], [1, 5, 2, 9]])
def test_prompts_of_another_order_are_refused(ids):
    assert instruction_span(torch.tensor([7, 1, 5, 2, 6, 6, 9, 8]), [1], [2], 9) == (1, 4, 6)
    with pytest.raises(ValueError, match="not media, instruction, end of turn; run the encode stage"):
        instruction_span(torch.tensor(ids), [1], [2], 9)


@pytest.mark.parametrize("count", range(1, 5))
def test_conventions_are_permutations_of_which_no_two_agree_anywhere(count):
    made = permutations(LABELS * 2, count)
    assert made[0] == {label: label for label in LABELS}
    for names in made:
        assert set(names) == set(names.values()) == set(LABELS)
    for label in LABELS:
        assert len({names[label] for names in made}) == count  # so all but the first have no fixed point
    assert permutations(LABELS, count, seed=0) == made


def test_more_conventions_than_labels_are_refused():
    with pytest.raises(ValueError, match="5 conventions of 4 labels .*give 1 to 4"):
        permutations(LABELS, 5)


@pytest.fixture(scope="module")
def place(tmp_path_factory, model, processor):
    """Folders of encoded samples, records and base, of cremad."""
    root = tmp_path_factory.mktemp("place")
    with torch.no_grad():
        sample = omni.encode(model, [omni.prepare(processor, clip(("video", "audio")), tasks.instruction("cremad", {}))])[0]
    for split, numbers in TRUTHS.items():
        made = [
            {"video_path": f"{i}.mp4", "audio_path": f"{i}.wav", "emotion": LABELS[n], "label": f"i see . <answer>{LABELS[n]}</answer>"}
            for i, n in enumerate(numbers)
        ]
        records.write(root / "dataset", "cremad", split, made)
        samples = [{**sample, "features": sample["features"] + i} for i in range(len(made))]
        targets = {f: [tasks.target("cremad", r, f) for r in made] if split == "train" else [] for f in tasks.interface.FORMS}
        ids = [f"cremad/{split}/{i:05d}" for i in range(len(made))]
        write_slot(root / "encoded", "cremad", split, samples, ids, [tasks.instruction("cremad", r) for r in made], targets)
    omni.save(root / "base", model, processor)
    return dict(encoded=root / "encoded", dataset=root / "dataset", base=root / "base"), root / "trees"


def make(place, words, **kwargs):
    where, out = place
    return conventions(**where, out=out, slots=["cremad"], words=words, **kwargs)


def test_one_convention_changes_nothing(place):
    where, out = place
    assert make(place, ["one"]) == Tree(where["encoded"], where["dataset"]) and not out.exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_clip_is_asked_in_each_way_and_scored_by_its_own_truth(place, split):
    where, _ = place
    tree = make(place, WORDS)
    assert tree.versions == 3
    before, after = read_slot(where["encoded"], "cremad", split), read_slot(tree.encoded, "cremad", split)
    found = truths(tree.dataset, "cremad", split, after.ids)
    names = permutations(LABELS, 3)
    original = [LABELS[n] for n in TRUTHS[split]]
    assert after.ids == [f"{name}/{word}" for name in before.ids for word in WORDS]
    assert [tasks.truth("cremad", r) for r in found] == [names[c][label] for label in original for c in range(3)]
    if split == "train":
        assert after.targets == {"bare": [f"<answer>{tasks.truth('cremad', r)}</answer>" for r in found]}
    for i, (sample, said) in enumerate(zip(after.samples, after.instructions, strict=True)):
        torch.testing.assert_close(sample["features"], before.samples[i // 3]["features"])
        assert len(sample["input_ids"]) == len(before.samples[0]["input_ids"]) + 1
        assert said == f"{WORDS[i % 3]} {before.instructions[0]}"
    # equal class balance: under each convention a label is as frequent as the one it stands for
    balance = sorted(Counter(original).values())
    for c in range(3):
        assert sorted(Counter(tasks.truth("cremad", r) for r in found[c::3]).values()) == balance
    # a right answer under one convention is wrong under the others
    score = tasks.score("cremad", found, [tasks.answer("cremad", label) for label in original for _ in WORDS])
    assert score["per_sample"] == [1, 0, 0] * len(original)


def test_a_convention_alone_has_the_same_samples_and_the_same_chance(place):
    where, _ = place
    whole = read_slot(make(place, WORDS).encoded, "cremad", "test")
    for c in range(3):
        tree = make(place, WORDS, only=c)
        part = read_slot(tree.encoded, "cremad", "test")
        assert tree.versions == 1 and part.ids == whole.ids[c::3]
        assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(part.samples, whole.samples[c::3], strict=True))
        assert chances(tree.dataset, tree.encoded, ["cremad"]) == chances(where["dataset"], where["encoded"], ["cremad"]) == {"cremad": 0.5}


def test_trees_are_made_once_and_anew_when_the_records_change(place, monkeypatch, tmp_path):
    tree = make(place, WORDS)
    stamp = (tree.encoded / "cremad" / "test.json").stat().st_mtime_ns
    assert make(place, WORDS) == tree and (tree.encoded / "cremad" / "test.json").stat().st_mtime_ns == stamp
    assert make(place, WORDS[:2]) != tree and make(place, WORDS[::-1]) != tree and make(place, WORDS, seed=1) != tree
    path = place[0]["dataset"] / tasks.json_path("cremad", "test")
    text = path.read_text()
    try:
        changed = json.loads(text)
        changed[0]["emotion"] = LABELS[0]
        path.write_text(json.dumps(changed))
        assert make(place, WORDS) != tree
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    ("words", "slot", "said"),
    [
        (["one", "one"], "cremad", "give different ones"),
        ([], "cremad", "at least 1"),
        (["one", "zebra"], "cremad", "'zebra' is not one known token"),
        (["one", "red bell"], "cremad", "'red bell' is not one known token"),
        (WORDS, "meld", "slot meld takes no conventions.*use some of cremad, mafw, dfew, ks, ucf"),
        (WORDS, "avqa", "slot avqa takes no conventions"),
    ],
)
def test_what_cannot_be_is_refused(place, words, slot, said):
    where, out = place
    with pytest.raises(ValueError, match=said):
        conventions(**where, out=out, slots=[slot], words=words)
    assert module.MODULES == ("action", "emotion")


def test_reordered_tree_holds_the_same_samples(place):
    where, out = place
    folder = reordered(where["encoded"], where["base"], out, ["cremad"])
    assert reordered(where["encoded"], where["base"], out, ["cremad"]) == folder
    for split in tasks.SPLITS:
        before, after = read_slot(where["encoded"], "cremad", split), read_slot(folder, "cremad", split)
        assert (before.ids, before.instructions, before.targets) == (after.ids, after.instructions, after.targets)
        assert before.digest != after.digest
        for a, b in zip(before.samples, after.samples, strict=True):
            assert sorted(a["input_ids"].tolist()) == sorted(b["input_ids"].tolist()) and torch.equal(a["features"], b["features"])
