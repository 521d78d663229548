import json
import time

import pytest

from crab import tasks
from crab.world import generate
from crab.data import records
from crab.world.views import VIEWS, view
from crab.world.vocabulary import check, split, vocabulary, words
from crab.world.scene import CLASSES, COLOURS, EMOTIONS, MOTIONS


@pytest.mark.parametrize("text, pieces", [
    ("i hear a bell .", ["i", "hear", "a", "bell", "."]),
    ("<range>2,6</range>", ["<range>", "2", ",", "6", "</range>"]),
    ("<obj>(16,24)(80,88)</obj>", ["<obj>", "(", "16", ",", "24", ")", "(", "80", ",", "88", ")", "</obj>"]),
    ("[40,48] top left?", ["[", "40", ",", "48", "]", "top", "left", "?"]),
    ("", []),
])
def test_words_are_split_as_a_tokenizer_does(text, pieces):
    assert split(text) == pieces


def test_words_and_tags():
    found = vocabulary()
    everything = {*CLASSES, *COLOURS, *EMOTIONS, *MOTIONS, "top", "bottom", "left", "right"}
    assert everything | {str(n) for n in [*range(11), *range(0, 225, 8)]} <= set(found["words"])
    assert list(found["words"]) == sorted(set(found["words"])) and not any(w.startswith("<") for w in found["words"])
    assert list(found["tags"]) == sorted(tasks.tags())
    assert len(found["words"]) + len(found["tags"]) < 200  # small enough for a tiny model's embedding


def test_every_build_writes_the_same_vocabulary_and_says_no_other_word(tree, tmp_path):
    written = (tree.root / "vocabulary.json").read_bytes()
    generate.build(tmp_path / "other", tree.seed + 1, 2, 1, 1, workers=1, slots=["ks"], progress=False)
    assert (tmp_path / "other/vocabulary.json").read_bytes() == written
    known = {word for part in json.loads(written).values() for word in part}
    for slot in VIEWS:  # another seed than the vocabulary's, and more records than a small build has
        assert words(slot, (view(slot, "train", index, 3).record for index in range(100))) <= known
        assert words(slot, records.read(tree.root, slot, "train")) <= known


def test_a_model_tokenizer_knows_every_word(tree):
    omni = pytest.importorskip("crab.models.omni")
    tokenizer = omni.build_tokenizer(**{k: list(v) for k, v in vocabulary().items()})
    for slot in VIEWS:
        for record in records.read(tree.root, slot, "train"):
            for text in (tasks.instruction(slot, record), tasks.target(slot, record, "explicit")):
                assert tokenizer.tokenize(text) == split(text)
                assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_an_unknown_word_is_named():
    record = view("ks", "train", 0, 0).record
    with pytest.raises(ValueError, match="slot ks: words zither are not in the vocabulary"):
        check("ks", [{**record, "label": "i hear a zither . " + record["label"]}])


def test_a_smoke_build_is_quick(tmp_path):
    began = time.process_time()
    generate.build(tmp_path / "smoke", 0, train=8, test=4, caption=8, workers=1, progress=False)
    assert time.process_time() - began < 25  # processor seconds on a loaded machine; an idle one takes 6
