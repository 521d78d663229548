"""The verifier against what the chain writers can truly say of a scene, word by word, and against any text."""

import json
import re
import time
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crab import tasks
from crab.world import chains
from crab.data import records
from crab.world.generate import SUMMARY
from crab.world.verify import (
    FALSE,
    TRUE,
    UNREADABLE,
    Evidence,
    chain,
    evidence,
    known,
    moment,
    read_evidence,
    verify,
    verify_answer,
)
from crab.world.views import VIEWS, view
from crab.world.scene import CLASSES, COLOURS, EMOTIONS, FACE, MOTIONS, Scene, Thing

SEED = 3
# Words that can stand in each other's place.
KINDS = (
    COLOURS, (*CLASSES, FACE), (*CLASSES, "voice"), MOTIONS, EMOTIONS, ("top", "bottom"), ("left", "right"),
    tuple(map(str, range(11))), chains.NUMBERS, ("seen", "heard"), ("one", "two"),
)


def samples(slot, count):
    for split in ("train", "test") if tasks.get_slot(slot).test else ("train",):
        for index in range(count):
            yield split, index, view(slot, split, index, SEED)


def answer_of(slot, record):
    return record[tasks.get_slot(slot).answer_field]


def shown_by(slot, index, one):
    """Scenes seen and heard of a record, read off its slot and place alone; for a still, cut to its second by hand."""
    seen, heard = list(one.scenes), list(one.scenes)
    if slot == "a2v":
        heard = [one.scenes[index % 2]]
    if slot == "v2a":
        seen = [one.scenes[index % 2]]
    if "second" in one.record:
        at = one.record["second"]
        now = lambda interval: interval if interval and interval[0] <= at < interval[1] else None  # noqa: E731
        cut = [replace(t, visible=now(t.visible), sounding=now(t.sounding)) for t in one.scenes[0].things]
        seen = heard = [replace(one.scenes[0], things=tuple(cut))]
    return seen, heard


def lists(things):
    """Every ordered choice of things, the empty one included."""
    return [list(chosen) for count in range(len(things) + 1) for chosen in permutations(things, count)]


def sayable(seen, heard):
    """Every statement of chains.py, but "both hold", that is true of these scenes: written, not read."""
    sights, sounds = [t for s in seen for t in s.visible], [t for s in heard for t in s.sounding]
    both = [t for s in seen for t in s.visible if t.sounding and s in heard]
    true = {f"{n} {what}" for n, what in zip(
        (chains.NUMBERS[len(g)] for g in (sights, sounds, both)), ("seen", "heard", "seen and heard"), strict=True)}
    true.add(f"{chains.NUMBERS[len(sights)]} seen and {chains.NUMBERS[len(sounds)]} heard")
    for said in lists(sights):
        for does in (False, True):
            for times in (False, True):
                if said or not sights:
                    true.add(f"i see {' and '.join(chains.sight(t, does, times) for t in said) or 'nothing'}")
    for said in lists(sounds):
        for times in (False, True):
            if said or not sounds:
                true.add(f"i hear {' and '.join(chains.sound(t, times) for t in said) or 'nothing'}")
    names = [*CLASSES, FACE]
    true |= {f"i see no {name}" for name in names if name not in {t.name for t in sights}}
    true |= {f"i see no {c} {name}" for c in COLOURS for name in names if f"{c} {name}" not in {chains.noun(t) for t in sights}}
    true |= {f"i hear no {name}" for name in (*CLASSES, "voice") if name.replace("voice", FACE) not in {t.name for t in sounds}}
    true |= {f"the {chains.noun(t)} {'sounds' if t in both else 'is silent'}" for t in sights}
    begins = sorted((t.sounding[0], t.name.replace(FACE, "voice")) for t in sounds)
    if begins and [b for b, _ in begins].count(begins[0][0]) == 1:
        true.add(f"the {begins[0][1]} is first")
    if len(seen) == 2:
        true |= {f"video {n} shows {chains.sight(t)}" for n, s in zip(("one", "two"), seen) for t in s.visible}
    if len(heard) == 2:
        true |= {f"sound {n} is {chains.sound(t, times=False)}" for n, s in zip(("one", "two"), heard) for t in s.sounding}
    return true


def mutations(statement):
    """The statement with one word replaced by another of a kind it belongs to."""
    words = statement.split()
    for place, word in enumerate(words):
        for other in sorted({other for kind in KINDS if word in kind for other in kind} - {word}):
            yield " ".join((*words[:place], other, *words[place + 1:]))


def with_articles(statement):
    """Articles as the writers choose them: the verifier does not mind them, the set of what is sayable does."""
    return re.sub(r"\ban? (?=([a-z]))", lambda m: "an " if m[1] in "aeiou" else "a ", statement)


@pytest.mark.parametrize("slot", VIEWS)
def test_every_statement_of_every_chain_is_true(slot):
    for split, index, one in samples(slot, 60):
        verdicts = verify_answer(slot, answer_of(slot, one.record), evidence(slot, split, index, SEED))
        assert verdicts and all(v.verdict == TRUE for v in verdicts), (slot, split, index, verdicts)


@pytest.mark.parametrize("slot", VIEWS)
def test_one_changed_word_is_caught(slot):
    caught = 0
    for split, index, one in samples(slot, 12):
        shown = evidence(slot, split, index, SEED)
        true = sayable(*shown_by(slot, index, one))
        said = [s.strip() for s in chain(slot, answer_of(slot, one.record)).split(" .") if s.strip()]
        for place, statement in enumerate(said):
            hold = statement.startswith("both hold")
            assert hold or statement in true
            for changed in mutations(statement):
                # "both hold" names the one overlap of what stands before it: no other is true.
                so = not hold and with_articles(changed) in true
                verdict = verify(" . ".join((*said[:place], changed)), shown)[-1].verdict
                assert (verdict == TRUE) == so, (slot, split, index, changed, one.scenes)
                caught += not so
    assert caught > 100


RED = Thing("bell", "red", "swaying", (56, 56), (32, 32), (2, 8), (0, 6))
BLUE = Thing("drum", "blue", "still", (168, 56), (32, 32), (0, 10), None)
HORN = Thing("horn", "green", "still", (56, 168), (32, 32), None, (3, 9))
FEAR = Thing(FACE, "orange", "still", (168, 168), (40, 40), (0, 10), (6, 10), emotion="sad", voice="fear")
ONE = Scene(7, 0, (RED, BLUE, HORN, FEAR))
SHOWN = Evidence((ONE,), (ONE,))


@pytest.mark.parametrize("statement, verdict", [
    ("i hear a bell from 0 to 6", TRUE), ("i hear a bell from 0 to 5", FALSE), ("i hear a bell", TRUE),
    ("i hear a drum", FALSE), ("i hear a horn and a bell", TRUE), ("i hear a bell and a bell", FALSE),
    ("i hear a voice showing fear from 6 to 10", TRUE), ("i hear a voice showing sad", FALSE), ("i hear a voice", TRUE),
    ("i see a red bell swaying at top left from 2 to 8", TRUE), ("i see a bell at top left", TRUE),
    ("i see an red bell at top left", TRUE), ("i see a red bell still at top left", FALSE),
    ("i see a red bell at bottom left", FALSE), ("i see a red bell from 8 to 2", FALSE),
    ("i see a red bell at top left and a blue drum at top right", TRUE),
    ("i see a red bell at top left and a blue drum at top left", FALSE),
    ("i see an orange face showing sad at bottom right", TRUE), ("i see an orange face showing fear at bottom right", FALSE),
    ("i see a green horn at bottom left", FALSE), ("i see nothing", FALSE), ("i hear nothing", FALSE),
    ("i see no horn", TRUE), ("i see no bell", FALSE), ("i hear no bell", FALSE), ("i hear no drum", TRUE),
    ("i hear no voice", FALSE), ("i see no red drum", TRUE), ("i see no blue drum", FALSE),
    ("the red bell sounds", TRUE), ("the blue drum sounds", FALSE), ("the green horn sounds", FALSE),
    ("the blue drum is silent", TRUE), ("the red bell is silent", FALSE), ("the red drum is silent", FALSE),
    ("the bell is first", TRUE), ("the horn is first", FALSE), ("the drum is first", FALSE),
    ("three seen", TRUE), ("three heard", TRUE), ("two seen and heard", TRUE), ("three seen and three heard", TRUE),
    ("three seen and heard", FALSE), ("two seen and three heard", FALSE),
    ("video one shows a red bell at top left", UNREADABLE), ("sound two is a bell", UNREADABLE),
    ("both hold from 2 to 6", UNREADABLE), ("i see a pink bell", UNREADABLE), ("i see a red bell , a drum", UNREADABLE),
    ("the bell sounds lovely", UNREADABLE), ("i hear a bell from 00000 to 6", UNREADABLE), ("five seen", UNREADABLE),
    ("i see no nothing", UNREADABLE), ("i see a red bell and", UNREADABLE), ("i see", UNREADABLE),
    ("i hear a bell from ٠ to ٦", UNREADABLE), ("我听到钟声", UNREADABLE), ("I SEE A RED  BELL", TRUE),
])
def test_hand_worked(statement, verdict):
    assert [v.verdict for v in verify(f"{statement} .", SHOWN)] == [verdict]
    assert [v.verdict for v in verify(statement, SHOWN)] == [verdict]


@pytest.mark.parametrize("text, verdicts", [
    ("i hear a bell from 0 to 6 . i see a red bell at top left from 2 to 8 . both hold from 2 to 6 .", [TRUE] * 3),
    ("i hear a bell from 0 to 6 . i see a red bell at top left from 2 to 8 . both hold from 2 to 8 .", [TRUE, TRUE, FALSE]),
    # the overlap of what is said, but what is said is not so
    ("i hear a bell from 0 to 7 . i see a red bell at top left from 2 to 8 . both hold from 2 to 7 .", [FALSE, TRUE, FALSE]),
    ("i hear a bell . i see a red bell at top left from 2 to 8 . both hold from 2 to 6 .", [TRUE, TRUE, UNREADABLE]),
    ("i hear a bell from 0 to 6 . what ? both hold from 2 to 6 .", [TRUE, UNREADABLE]),
    ("i hear a bell from 0 to 6 . what . both hold from 2 to 6 .", [TRUE, UNREADABLE, UNREADABLE]),
    (" . .. .", []),
])
def test_statements_in_a_row(text, verdicts):
    assert [v.verdict for v in verify(text, SHOWN)] == verdicts


def test_two_videos_and_a_still():
    two = Evidence((ONE, Scene(8, 0, (BLUE,))), (Scene(8, 0, (replace(BLUE, sounding=(0, 3)),)),))
    said = "video one shows a red bell at top left . video two shows a red bell at top left . i hear a drum . video zero shows a bell ."
    assert [v.verdict for v in verify(said, two)] == [TRUE, FALSE, TRUE, UNREADABLE]
    at_nine = moment(ONE, 9)
    said = "i see a red bell . i hear a bell . i hear a voice showing fear . the orange face sounds . the blue drum is silent ."
    assert [v.verdict for v in verify(said, Evidence((at_nine,), (at_nine,)))] == [FALSE, FALSE, TRUE, TRUE, TRUE]


def test_of_two_things_at_one_place_the_silent_one_does_not_sound():
    """What only sounds lies at a place as well."""
    scene = Scene(7, 0, (BLUE, replace(HORN, centre=BLUE.centre)))
    said = "the blue drum is silent . the blue drum sounds . zero seen and heard ."
    assert [v.verdict for v in verify(said, Evidence((scene,), (scene,)))] == [TRUE, FALSE, TRUE]


def test_the_chain_ends_where_the_answer_begins():
    assert chain("ks", "i see it . <answer>a</answer> more .") == "i see it . "
    assert chain("s4", "i see it . [1,2,3,4] [1,2]") == "i see it . "
    assert chain("avcap", "one seen . i < you") == "one seen . i < you"
    assert verify_answer("ks", "<answer>still</answer>", SHOWN) == []


# ---------------------------------------------------------------- a built tree

def test_a_built_tree_verifies(tree):
    for slot in VIEWS:
        for split in ("train", "test") if tasks.get_slot(slot).test else ("train",):
            read = records.read(tree.root, slot, split)
            for record, shown in zip(read, read_evidence(tree.root, slot, split, read), strict=True):
                assert all(v.verdict == TRUE for v in verify_answer(slot, answer_of(slot, record), shown))


def test_records_that_were_not_built_so(tree, tmp_path):
    read = records.read(tree.root, "ks", "test")
    assert known(tree.root) and not known(tmp_path)
    with pytest.raises(ValueError, match="build.json: no such file.*no scene graph"):
        read_evidence(tmp_path, "ks", "test", read)
    with pytest.raises(records.RecordError, match="test.json: record 1, field 'scene'.*build the data again"):
        read_evidence(tree.root, "ks", "test", [read[0], {**read[1], "scene": 3}])
    with pytest.raises(records.RecordError, match="record 0, field"):
        read_evidence(tree.root, "ks", "test", read[::-1])
    (tmp_path / SUMMARY).write_text(json.dumps({"seed": tree.seed + 1}))
    with pytest.raises(records.RecordError, match="record 0, field"):
        read_evidence(tmp_path, "ks", "test", read)
    for bad in ("[]", "{}", '{"seed": "5"}'):
        (tmp_path / SUMMARY).write_text(bad)
        with pytest.raises(ValueError, match="seed"):
            read_evidence(tmp_path, "ks", "test", read)


# ---------------------------------------------------------------- any text

WORDS = sorted({word for kind in KINDS for word in kind} | set(
    "i see hear a an no nothing the sounds is silent first and from to at showing both hold video shows sound . < [ ,".split()))


def definite(text):
    verdicts = verify(text, SHOWN)
    assert all(v.verdict in (TRUE, FALSE, UNREADABLE) and v.statement for v in verdicts)
    assert verify(text, SHOWN) == verdicts
    verify_answer("s4", text, SHOWN)


@given(st.text())
def test_any_text_has_a_verdict(text):
    definite(text)


@settings(max_examples=300)
@given(st.lists(st.sampled_from(WORDS), max_size=40))
def test_any_words_have_a_verdict(words):
    definite(" ".join(words))


@pytest.mark.parametrize("piece", [
    "i see a red bell at top left and ", "i hear a bell from 0 to 6 . both hold from 0 to 6 . ", ". ", "a", "i see ", "<[", "钟",
    "i see a red bell and a red bell and a bell . ", "9", "from 2 to ", "\x00", " and", "\n",
])
def test_long_texts_take_no_time(piece):
    began = time.perf_counter()
    for length in (99_999, 10_000_000):
        definite(("i see " + piece * (length // len(piece)))[:length])
    assert time.perf_counter() - began < 5
