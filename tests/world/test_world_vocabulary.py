"""The closed vocabulary holds every word of every build."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import crab
from crab import tasks
from crab.data import records
from crab.tasks.registry import MEDIA
from crab.world import generate
from crab.world.scene import CLASSES, COLOURS, EMOTIONS, MOTIONS
from crab.world.views import VIEWS, view
from crab.world.vocabulary import check, split, vocabulary, words


def test_words_and_tags():
    known = vocabulary()
    everything = {*CLASSES, *COLOURS, *EMOTIONS, *MOTIONS, "top", "bottom", "left", "right"}
    assert everything | {str(n) for n in [*range(11), *range(0, 225, 8)]} <= set(known["words"])
    assert list(known["words"]) == sorted(set(known["words"])) and not any(w.startswith("<") for w in known["words"])
    assert list(known["tags"]) == sorted(tasks.tags())
    assert len(known["words"]) + len(known["tags"]) < 200  # small enough for the embedding of a tiny model


def test_every_build_writes_the_same_vocabulary_and_uses_no_other_word(tree, tmp_path):
    written = (tree.root / "vocabulary.json").read_bytes()
    counts = {"train": 2, "test": 1, "caption": 1}
    generate.build(tmp_path / "other", tree.seed + 1, **counts, workers=1, slots=["ks"], progress=False)
    assert (tmp_path / "other/vocabulary.json").read_bytes() == written
    known = {word for part in json.loads(written).values() for word in part}
    for slot in VIEWS:  # another seed than the vocabulary's, and more records than a small build has
        assert words(slot, (view(slot, "train", index, 3).record for index in range(100))) <= known
        assert words(slot, records.read(tree.root, slot, "train")) <= known


def test_a_model_tokenizer_knows_every_word(tree):
    small = pytest.importorskip("crab.models.small")
    tokenizer = small.build_tokenizer(**{kind: list(words) for kind, words in vocabulary().items()})
    for slot in VIEWS:
        for record in records.read(tree.root, slot, "train"):
            for text in (tasks.instruction(slot, record), tasks.target(slot, record, "explicit")):
                assert tokenizer.tokenize(text) == split(text)
                assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_an_unknown_word_is_named():
    record = view("ks", "train", 0, 0).record
    with pytest.raises(ValueError, match="slot ks: words zither are not in the vocabulary"):
        check("ks", [{**record, "label": "i hear a zither . " + record["label"]}])


# The words that the small base and the whole study were trained on.
ASKED = {
    "ave": "which event is both seen and heard , and from when to when ?",
    "unav": "which events are both seen and heard , and when ?",
    "avvp": "which events are heard and which are seen , and from when to when ?",
    "arig": "give the box of the thing that makes the sound .",
    "s4": "give the box of the thing that makes the sound , and three points on it .",
    "ms3": "give the box of all the sounding things , and three points on them .",
    "ref_avs": "is {} there , true or false ? if true , give its box and three points on it .",
    "avqa": "{}",
    "avqa_thu": "{} choose {} .",
    "meld": "what does the speaker feel ?",
    "mer24": "which emotion is both seen and heard ?",
    "cremad": "which emotion does the person show ?",
    "mafw": "which emotion do face and voice show ?",
    "dfew": "how does the person feel ?",
    "ks": "which action takes place in the video ?",
    "ucf": "what action is seen in the video ?",
    "a2v": "which of the two videos matches the sound , one or two ?",
    "v2a": "which of the two sounds matches the video , one or two ?",
    "avcap": "describe what is seen and heard .",
}


def asked(slot, record):
    """The question as it was written for the word tokenizer: lower case, a space before each mark."""
    if slot == "avqa_thu":
        *first, last = record["multi_choice"]
        return ASKED[slot].format(record["question_text"], " or ".join([" , ".join(first), last] if first else [last]))
    return ASKED[slot].format(record.get("question", record.get("description", record.get("object"))))


@pytest.mark.parametrize("slot", ASKED)
def test_the_committed_base_reads_the_same_tokens_of_every_prompt(slot):
    omni = pytest.importorskip("crab.models.omni")
    folder = Path(crab.__file__).parents[1] / "models" / "base"
    today, before = omni.load_processor(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    kinds = [kind for kind, _ in MEDIA[tasks.get_slot(slot).media]]
    for part in tasks.get_slot(slot).splits:
        for index in range(100):
            record = view(slot, part, index, 0).record
            ids = today(omni.prompt_text(kinds, tasks.instruction(slot, record)))["input_ids"]
            assert ids == before(omni.prompt_text(kinds, asked(slot, record)))["input_ids"]
            answer = tasks.target(slot, record, "explicit")
            assert today(answer)["input_ids"] == before(answer)["input_ids"]
    assert before("Which")["input_ids"] == [before.unk_token_id] != today("Which")["input_ids"]
