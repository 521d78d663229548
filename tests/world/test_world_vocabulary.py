"""The closed vocabulary holds every word of every build."""

import json

import pytest

from crab import tasks
from crab.data import records
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
