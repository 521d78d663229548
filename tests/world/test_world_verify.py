"""The verifier against all that the chain writers can truly say of a scene, word by word, and against any text."""

import json
import re
import time
from dataclasses import replace
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_world_views import samples
from trees import PARTS

from crab import tasks
from crab.data import records
from crab.world import chains, verify
from crab.world.generate import SUMMARY
from crab.world.scene import CLASSES, COLOURS, EMOTIONS, FACE, MOTIONS, Scene, Thing
from crab.world.verify import FALSE, TRUE, UNREADABLE, Evidence, evidence, moment
from crab.world.views import VIEWS

# Words that can stand in each other's place.
KINDS = (
    *(COLOURS, (*CLASSES, FACE), (*CLASSES, "voice"), MOTIONS, EMOTIONS, chains.NUMBERS, tuple(map(str, range(11)))),
    *(("top", "bottom"), ("left", "right"), ("seen", "heard"), ("one", "two")),
)


def verdicts(text, shown):
    return [v.verdict for v in verify.verify(text, shown)]


def shown_by(slot, index, one):
    """Scenes seen and heard in a record, from its slot and place only."""
    seen, heard = list(one.scenes), list(one.scenes)
    if slot == "a2v":
        heard = [one.scenes[index % 2]]
    if slot == "v2a":
        seen = [one.scenes[index % 2]]
    if "second" in one.record:
        seen = heard = [moment(one.scenes[0], one.record["second"])]
    return seen, heard


def sayable(seen, heard):
    """Every statement but "both hold" that is true of these scenes: written, not read."""
    sights, sounds = [t for s in seen for t in s.visible], [t for s in heard for t in s.sounding]
    both = [t for s in seen for t in s.visible if t.sounding and s in heard]
    one, two, three = (chains.NUMBERS[len(things)] for things in (sights, sounds, both))
    true = {f"{one} seen", f"{two} heard", f"{three} seen and heard", f"{one} seen and {two} heard"}
    for verb, things, flags, word in (("see", sights, 2, chains.sight), ("hear", sounds, 1, chains.sound)):
        true |= {f"i {verb} nothing"} if not things else set()
        for count in range(1, len(things) + 1):
            for listed, options in product(permutations(things, count), product((False, True), repeat=flags)):
                true.add(f"i {verb} {' and '.join(word(t, *options) for t in listed)}")
    nouns = {t.name for t in sights} | {chains.noun(t) for t in sights}
    names = [*CLASSES, FACE, *(f"{colour} {name}" for colour in COLOURS for name in (*CLASSES, FACE))]
    true |= {f"i see no {name}" for name in names if name not in nouns}
    voices = {t.name.replace(FACE, "voice") for t in sounds}
    true |= {f"i hear no {name}" for name in (*CLASSES, "voice") if name not in voices}
    true |= {f"the {chains.noun(t)} {'sounds' if t in both else 'is silent'}" for t in sights}
    starts = sorted((t.sounding[0], t.name.replace(FACE, "voice")) for t in sounds)
    if starts and [start for start, _ in starts].count(starts[0][0]) == 1:
        true.add(f"the {starts[0][1]} is first")
    numbers = ("one", "two")
    if len(seen) == 2:
        true |= {f"video {n} shows {chains.sight(t)}" for n, s in zip(numbers, seen, strict=True) for t in s.visible}
    if len(heard) == 2:
        for n, scene in zip(numbers, heard, strict=True):
            true |= {f"sound {n} is {chains.sound(t, times=False)}" for t in scene.sounding}
    return true


def mutations(statement):
    """The statement with one word replaced by another of its kind, and the article as the writers choose it."""
    words = statement.split()
    for place, word in enumerate(words):
        for other in sorted({other for kind in KINDS if word in kind for other in kind} - {word}):
            changed = " ".join((*words[:place], other, *words[place + 1 :]))
            yield re.sub(r"\ban? (?=([a-z]))", lambda m: "an " if m[1] in "aeiou" else "a ", changed)


@pytest.mark.parametrize("slot", VIEWS)
def test_every_statement_is_true_and_one_changed_word_is_caught(slot):
    caught = 0
    for _, index, one in samples(slot, 60):
        shown, answer = evidence(slot, one), one.record[tasks.get_slot(slot).answer_field]
        texts = verify.statements(verify.chain(slot, answer))
        assert texts and verify.verify_answer(slot, answer, shown) == [(statement, TRUE) for statement in texts], one
        true = sayable(*shown_by(slot, index, one)) if index < 12 else ()
        for place, statement in enumerate(texts if true else ()):
            both = statement.startswith("both hold")  # the one overlap of what stands before it: no other is true
            assert both or statement in true
            for changed in mutations(statement):
                expected = not both and changed in true
                verdict = verdicts(" . ".join((*texts[:place], changed)), shown)[-1]
                assert (verdict == TRUE) == expected, (index, changed, one.scenes)
                caught += not expected
    assert caught > 100


RED = Thing("bell", "red", "swaying", (56, 56), (32, 32), (2, 8), (0, 6))
BLUE = Thing("drum", "blue", "still", (168, 56), (32, 32), (0, 10), None)
HORN = Thing("horn", "green", "still", (56, 168), (32, 32), None, (3, 9))
FEAR = Thing(FACE, "orange", "still", (168, 168), (40, 40), (0, 10), (6, 10), emotion="sad", voice="fear")
ONE = Scene(7, 0, (RED, BLUE, HORN, FEAR))
SHOWN = Evidence((ONE,), (ONE,))
HAND_WORKED = {
    TRUE: "i hear a bell from 0 to 6 . i hear a bell . i hear a horn and a bell . i hear a voice . I HEAR  A BELL . "
    "i hear a voice showing fear from 6 to 10 . i see a red bell swaying at top left from 2 to 8 . "
    "i see a bell at top left . i see an red bell at top left . i see an orange face showing sad at bottom right . "
    "i see a red bell at top left and a blue drum at top right . i see no horn . i see no red drum . i hear no drum . "
    "the red bell sounds . the blue drum is silent . the bell is first . three seen . three heard . "
    "two seen and heard . three seen and three heard .",
    FALSE: "i hear a bell from 0 to 5 . i hear a drum . i hear a bell and a bell . i hear a voice showing sad . "
    "i see a red bell still at top left . i see a red bell at bottom left . i see a red bell from 8 to 2 . "
    "i see a red bell at top left and a blue drum at top left . i see an orange face showing fear at bottom right . "
    "i see a green horn at bottom left . i see nothing . i hear nothing . i see no bell . i see no blue drum . "
    "i hear no bell . i hear no voice . the blue drum sounds . the green horn sounds . the red bell is silent . "
    "the red drum is silent . the horn is first . the drum is first . three seen and heard . "
    "two seen and three heard .",
    UNREADABLE: "video one shows a red bell at top left . sound two is a bell . i see a pink bell . i see . "
    "i see a red bell , a drum . the bell sounds lovely . five seen . i see no nothing . i see a red bell and . "
    "i hear a bell from 00000 to 6 . i hear a bell from ٠ to ٦ . 我听到钟声 . both hold from 2 to 6 .",
}


@pytest.mark.parametrize("verdict", HAND_WORKED)
def test_hand_worked(verdict):
    texts = verify.statements(HAND_WORKED[verdict])
    assert verify.verify(HAND_WORKED[verdict], SHOWN) == [(statement, verdict) for statement in texts]
    assert [verdicts(statement, SHOWN) for statement in texts] == [[verdict]] * len(texts)


HEARD, SEEN = "i hear a bell from 0 to 6", "i see a red bell at top left from 2 to 8"


@pytest.mark.parametrize(
    "first, second, times, expected",
    [
        (HEARD, SEEN, "2 to 6", [TRUE] * 3),
        (HEARD, SEEN, "2 to 8", [TRUE, TRUE, FALSE]),
        # the overlap of what is said, but what is said is false
        ("i hear a bell from 0 to 7", SEEN, "2 to 7", [FALSE, TRUE, FALSE]),
        ("i hear a bell", SEEN, "2 to 6", [TRUE, TRUE, UNREADABLE]),
        (HEARD, "what", "2 to 6", [TRUE, UNREADABLE, UNREADABLE]),
        ("what", HEARD, "0 to 6", [UNREADABLE, TRUE, UNREADABLE]),
    ],
)
def test_both_hold_refers_to_the_two_statements_before(first, second, times, expected):
    assert verdicts(f"{first} . {second} . both hold from {times} .", SHOWN) == expected


def test_two_videos_and_a_still():
    two = Evidence((ONE, Scene(8, 0, (BLUE,))), (Scene(8, 0, (replace(BLUE, sounding=(0, 3)),)),))
    text = "video one shows a red bell at top left . video two shows a red bell at top left . i hear a drum . "
    assert verdicts(text + "video zero shows a bell .", two) == [TRUE, FALSE, TRUE, UNREADABLE]
    at_nine = moment(ONE, 9)
    text = "i see a red bell . i hear a bell . i hear a voice showing fear . the orange face sounds . "
    shown = Evidence((at_nine,), (at_nine,))
    assert verdicts(text + "the blue drum is silent .", shown) == [FALSE, FALSE, TRUE, TRUE, TRUE]


def test_a_sound_from_the_place_of_a_silent_thing_is_not_its_sound():
    scene = Scene(7, 0, (BLUE, replace(HORN, centre=BLUE.centre)))
    text = "the blue drum is silent . the blue drum sounds . zero seen and heard ."
    assert verdicts(text, Evidence((scene,), (scene,))) == [TRUE, FALSE, TRUE]


def test_the_chain_ends_where_the_answer_begins():
    assert verify.chain("ks", "i see it . <answer>a</answer> more .") == "i see it . "
    assert verify.chain("s4", "i see it . [1,2,3,4] [1,2]") == "i see it . "
    assert verify.chain("avcap", "one seen . i < you") == "one seen . i < you"
    assert verify.verify_answer("ks", "<answer>still</answer>", SHOWN) == verify.verify(" . .. .", SHOWN) == []


def test_a_built_tree_verifies(tree):
    for slot, split in PARTS:
        read = records.read(tree.root, slot, split)
        for record, shown in zip(read, verify.read_evidence(tree.root, slot, split, read), strict=True):
            text = record[tasks.get_slot(slot).answer_field]
            assert all(v.verdict == TRUE for v in verify.verify_answer(slot, text, shown))


def test_records_that_the_views_do_not_make(tree, tmp_path):
    read = records.read(tree.root, "ks", "test")
    assert verify.known(tree.root) and not verify.known(tmp_path)
    with pytest.raises(ValueError, match="build.json: no such file.*no scene graph"):
        verify.read_evidence(tmp_path, "ks", "test", read)
    with pytest.raises(records.RecordError, match="test.json: record 1, field 'scene'.*build the data again"):
        verify.read_evidence(tree.root, "ks", "test", [read[0], {**read[1], "scene": 3}])
    for bad in ("[]", "{}", '{"seed": "5"}'):
        (tmp_path / SUMMARY).write_text(bad, encoding="utf-8")
        with pytest.raises(ValueError, match="seed"):
            verify.read_evidence(tmp_path, "ks", "test", read)
    (tmp_path / SUMMARY).write_text(json.dumps({"seed": tree.seed + 1}), encoding="utf-8")
    for root, order in ((tree.root, read[::-1]), (tmp_path, read)):
        with pytest.raises(records.RecordError, match="record 0, field"):
            verify.read_evidence(root, "ks", "test", order)


MORE = "i see hear a an no nothing the sounds is silent first and from to at showing both hold video shows sound"
WORDS = sorted({word for kind in KINDS for word in kind} | {*MORE.split(), *".<[,"})


@settings(max_examples=300)
@given(st.one_of(st.text(), st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)))
def test_any_text_has_a_verdict(text):
    result = verify.verify(text, SHOWN)
    assert all(verdict in (TRUE, FALSE, UNREADABLE) and statement for statement, verdict in result)
    verify.verify_answer("s4", text, SHOWN)


@pytest.mark.parametrize(
    "piece",
    [
        *("i see a red bell at top left and ", "i see a red bell and a red bell and a bell . ", "i see ", "from 2 to "),
        *("i hear a bell from 0 to 6 . both hold from 0 to 6 . ", ". ", "a", "<[", "钟", "9", "\x00", " and", "\n"),
    ],
)
def test_long_texts_take_little_time(piece):
    began = time.process_time()
    for length in (99_999, 10_000_000):
        assert verify.verify(("i see " + piece * (length // len(piece)))[:length], SHOWN)
    assert time.process_time() - began < 5
