"""What answers say and score, against cases worked by hand and short independent references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as known
from task_records import MASKS, PROMPTS, box_mask, make_record, make_records

from crab import tasks
from crab.tasks.segmentation import mask_scores

names = st.sampled_from(["bell", "drum", "horn"])
ranges = st.lists(st.integers(0, 10), min_size=2, max_size=2, unique=True).map(sorted)
# Two different multiples of 8 in order: the near and the far edge of a box along one axis.
edges = st.lists(st.integers(0, 28).map(lambda v: 8 * v), min_size=2, max_size=2, unique=True).map(sorted)
boxes = st.tuples(edges, edges).map(lambda e: (e[0][0], e[1][0], e[0][1], e[1][1]))
fast = settings(max_examples=60, deadline=None)

BOX, POINTS = "[16,24,80,88]", "[40,48] [48,56] [56,64]"
PLACE = "<obj>(30,40)(150,200)</obj>"
PROMPT, FALSE, TRUE = f"{BOX} {POINTS}", "<answer>false</answer>", "<answer>true</answer>"
BELL, RANGE, TWICE = "<event>bell</event>", "<range>2,6</range>", "<event>bell</event> <range>2,6</range>"


def score(slot, truths, texts, **options):
    return tasks.score(slot, make_records(slot, truths), texts, **options)


def label(text):
    return f"<answer>{text}</answer>"


SAYS = {
    "ave": {
        "<range>2,6</range><event>Bell</event>": ("bell", 2, 6),
        "<event>Bell.</event> <range>( 2.0, 6.00 )</range>": ("bell", 2, 6),
        f"{TWICE}. So it is {TWICE}.": ("bell", 2, 6),
    },
    "unav": {
        "so . <event>Bell</event><range> 2 , 6 </range> .": (("bell", 2, 6),),
        f"{BELL} <range>0.5,6.25</range>": (("bell", 0.5, 6.25),),
        f"{BELL} <range>(4.3611,10.0)</range>": (("bell", 4.3611, 10),),
        f"{TWICE} and {TWICE}": (("bell", 2, 6),) * 2,
    },
    "avvp": {
        f"<audio>{name},(5 8)</audio>": (("audio", name, 5, 8),)
        for name in ("frying_(food)", "horn, small", "drum (2)", "band (no 3, live)", "take 5 8")
    }
    | {
        f"<audio>{inside}</audio>": (("audio", "dog", 0, 3), ("audio", "dog", 5, 8))
        for inside in ("dog,(0 3),(5 8)", "dog, ( 0 , 3 ) ,(5 8).", "dog,(0 3) dog,(5.0,8.0)", "dog,(0 3) (5 8)")
    }
    | {
        "<audio>dog,(0 3), horn, small,(5 8)</audio>": (("audio", "dog", 0, 3), ("audio", "horn, small", 5, 8)),
        "<audio></audio><visual>Dog,(0 10)</visual>": (("visual", "dog", 0, 10),),
        "<audio>None</audio> <visual> Nothing is seen. </visual>": (),
        "Nothing is heard, and nothing is seen.": (),
    },
    "arig": dict.fromkeys(
        ["<obj>(30,40),(150,200)</obj>", "<obj>(30.4,40.0) , (149.5,200)</obj>", f"{PLACE} so {PLACE}"],
        (30, 40, 150, 200),
    ),
    "s4": {
        f"points {text}": ((16, 24, 80, 88), points)
        for points in [((40, 48), (48, 56), (56, 64))]
        for text in (f"[{PROMPT}]", f"{BOX}, [[40, 48],[48,56], [56,64]]", f"{PROMPT}. {PROMPT}")
    }
    | {
        f"{BOX} [40,48] [48,56]": ((16, 24, 80, 88), ((40, 48), (48, 56))),
        "[16.2,24,80,88.4] [39.5,48]": ((16, 24, 80, 88), ((40, 48),)),
    },
    "ref_avs": {
        f"<answer>True</answer>, it is a bell . its box is {PROMPT}.": PROMPTS[0],
        f"<answer>yes</answer> {PROMPT}": PROMPTS[0],
        f"{TRUE} {BOX} [40,48]": (PROMPTS[0][0], ((40, 48),)),
        **{f"{label(word)}. It is not there.": tasks.NULL for word in ("false", "No", " FALSE ", "False.")},
    },
    "a2v": {label("1"): "one", label("first"): "one", label("Second"): "two", label("three"): "three"}
    | {label("video one"): "one", label("The second clip."): "two", label("Video 1, the first"): "one"},
    "avqa": {label(" YES "): "yes", f"{label('yes')} it is {label('Yes.')}": "yes"},
    "meld": {label("Joy."): "joy"},
}


@pytest.mark.parametrize("slot", SAYS)
def test_what_a_text_says(slot):
    assert {text: tasks.parse(slot, text) for text in SAYS[slot]} == SAYS[slot]


BOATS = {"multi_choice": ["motorboat", "plane", "train", "Fire  truck"]}


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        *((text, "motorboat") for text in ("A", "a.", "(A)", "A. motorboat", "(a) Motorboat.", "A: motorboat")),
        *((text, "fire truck") for text in ("D", "D) fire_truck", "fire truck", "d.fire truck")),
        *((text, None) for text in ("A. plane", "(d) motorboat", "A: Fire truck")),  # which of the two?
        *((text, text) for text in ("e", "a motorboat", "a: boat", "1")),  # none of the choices
    ],
)
def test_a_letter_means_one_of_the_choices_of_its_record(text, choice):
    for choices in (BOATS["multi_choice"], str(BOATS["multi_choice"])):
        assert tasks.parse("avqa_thu", label(text), {"multi_choice": choices}) == choice
    truth = {"answer": 0 if choice is None else "Fire truck"}
    records = [record | BOATS | truth for record in make_records("avqa_thu")]
    result = tasks.score("avqa_thu", records, [label(text)] * 3)
    assert result["primary"] == (choice == "fire truck") and result["n_unparsable"] == 3 * (choice is None)


@pytest.mark.parametrize("choices", [None, 3, "[", "ab", []])
def test_without_choices_a_letter_is_a_word(choices):
    assert tasks.parse("avqa_thu", label("A. plane"), {"multi_choice": choices}) == "a. plane"


@pytest.mark.parametrize(
    ("slot", "one", "other"),
    [
        ("ks", "playing_violin", "playing violin"),
        ("ucf", "apply eye makeup.", "applyeyemakeup"),
        ("avqa", "acoustic_guitar", "acoustic guitar"),
        ("avqa", "2", "two"),
        ("avqa", "10", "Ten."),
        ("ave", ("church_bell", 0, 1), ("church bell", 0, 1)),
        ("unav", (("church_bell", 0, 1),), (("church bell", 0, 1),)),
        ("avvp", (("audio", "frying_(food)", 0, 1),), (("audio", "frying (food)", 0, 1),)),
    ],
)
def test_spellings_that_agree(slot, one, other):
    kinds = {"ave": tasks.temporal.EventRange, "unav": tasks.temporal.EventRange, "avvp": tasks.temporal.ModalEvent}
    if slot in kinds:
        one, other = (
            tuple(kinds[slot](*part) for part in value) if isinstance(value[0], tuple) else kinds[slot](*value)
            for value in (one, other)
        )
    assert tasks.agree(slot, one, other) and not tasks.agree(slot, one, None)


@pytest.mark.parametrize("slot", ["ave", "avvp", "ks", "avqa"])
def test_an_underscore_costs_nothing(slot):
    name = "church bell"
    truth = {"ave": (name, 2, 6), "avvp": (("audio", name, 2, 6),)}.get(slot, name)
    text = tasks.answer(slot, truth).replace("church bell", "Church_bell")
    assert score(slot, [truth], [text])["metrics"] == score(slot, [truth], [tasks.answer(slot, truth)])["metrics"]
    assert score(slot, [truth], [text])["primary"] == 1


CHOICES = {"multi_choice": ["2", "Car  horn", "0", "three"]}


@pytest.mark.parametrize(
    ("slot", "record", "truth"),
    [
        ("ave", {"event": "Bell", "start_time": "2", "end_time": 10}, ("bell", 2, 10)),
        ("ave", {"event": "Bell", "start_time": 2.0, "end_time": "06"}, ("bell", 2, 6)),
        ("unav", {"label_content": f"so . {TWICE}"}, (("bell", 2, 6),)),
        ("ave", {"event": "Bell", "start_time": "2.0", "end_time": "10.0"}, ("bell", 2, 10)),
        ("unav", {"label_content": f"{BELL} <range>4.3611,10.0</range>"}, (("bell", 4.3611, 10),)),
        ("avvp", {"event": "<audio>bell,(0 4)</audio>"}, (("audio", "bell", 0, 4),)),
        ("avvp", {"event": "<audio></audio> <visual></visual>"}, ()),
        ("arig", {"top_left": [16.4, "24.0"], "bottom_right": "[79.6, 88]"}, (16, 24, 80, 88)),
        ("arig", {"label_content": "it is a bell . <obj>(16,24)(80,88)</obj>"}, (16, 24, 80, 88)),
        ("ucf", {"label": "YoYo"}, "yoyo"),  # shown as it is written
        ("ucf", {"label": "yo  yo"}, "yo yo"),
        ("avqa_thu", CHOICES | {"answer": "0"}, "0"),  # words come before a place
        ("avqa_thu", CHOICES | {"answer": 0}, "2"),
        ("avqa_thu", CHOICES | {"answer": "1"}, "car horn"),
        ("avqa_thu", CHOICES | {"answer": "car HORN"}, "car horn"),
        ("avqa_thu", {"multi_choice": "['a bell', 'drum']", "answer": 1.0}, "drum"),
        ("a2v", {"correct_video": 2.0}, "two"),
    ],
)
def test_what_a_record_says(slot, record, truth):
    assert tasks.truth(slot, record) == truth


MALFORMED = {
    "a2v avqa avqa_thu ks ucf cremad ref_avs": [
        "one|<answer></answer>|<answer> . </answer>|<answer>one</answer><answer>two</answer>|<answer>one|one</answer>",
        "<answer><answer>one</answer></answer>|<answer>one</event>|</answer>one<answer>|<Answer>one</Answer>",
    ],
    "a2v": ["|".join(map(label, ("one or two", "both one and two", "not one", "one bell", "first video or second")))],
    "ave unav": [
        f"|bell|{BELL}|{RANGE}|{BELL} <range>6,2</range>|{BELL} <range>2,2</range>|{BELL} <range>-2,6</range>",
        f"{BELL} <range>(2,6</range>|{BELL} <range>2,6)</range>|{BELL} <range>2;6</range>",
        f"{TWICE} <range>7,8</range>|<event> </event> {RANGE}",
        f"<event>{BELL}</event> {RANGE}|<event>bell</range> <range>2,6</event>",
        f"<event>bell {RANGE}</event>|{BELL} <range>٢,٦</range>|{BELL} <range>2.,6</range>|{BELL} <range>2 6</range>",
        f"{BELL} <range>2,6,8</range>|{BELL} <range>1e1,20</range>|{BELL} <range>0,inf</range>",
    ],
    "ave": [
        f"{BELL} <range>2,12</range>|{BELL} <range>2.5,6.0</range>",
        f"{TWICE} <event>drum</event>|{TWICE} <range>7,9</range>",
    ],
    "unav": [f"{BELL} {TWICE}|{TWICE} {BELL}|{RANGE} {BELL}|{TWICE} {BELL} <range>6,2</range>"],
    "avvp": [
        "|.|and|silence|nothing, but a dog|<audio>dog,(0 3),(8 5)</audio>|<audio>dog,(0 3) cat (5 8)</audio>",
        "<audio>dog,(0 3.5)</audio>|<audio>dog,(0 11)</audio>|<audio>,(0 3)</audio>|<audio>(0 3)</audio>",
        "<audio>dog,(0 3) cat</audio>|<audio></audio><visual>dog</visual>",
        "<audio>dog,(0 3)</audio><visual>cat,(5 5)</visual>",
        "<audio>dog,(26)</audio>|<audio>dog,</audio>|<visual>cat,(0 3)</visual> <audio>dog (0,3),(5 8)</audio>",
    ],
    "arig": [
        "<obj>(80,80)(0,0)</obj>|<obj>(0,0)(80,225)</obj>|<obj>(0,0)(80,-8)</obj>|<obj>(0,0)(0,80)</obj>|(0,0)(80,80)",
        "<obj>(0,0)(80,80)</obj><obj>(0,0)(80,81)</obj>|<obj>(0,0)(80,99999999999999999999)</obj>|<obj></obj>",
        "<obj>(0,0)(80,224.5)</obj>|<obj>(0,0),,(80,80)</obj>|<obj>(0,0)(.5,80)</obj>|<obj>(79.6,0)(80.4,80)</obj>",
    ],
    "s4 ms3": [
        f"{BOX}|{BOX} {BOX}|{PROMPT} [1,1]|[40,48] {BOX} [48,56] [56,64]|[80,24,16,88] {POINTS}|[[{PROMPT}]]",
        f"{PROMPT[:-1]}|{BOX} [40,48] [48,56] [56,225]|[16 24 80 88] {POINTS}|{PROMPT} {BOX} [40,48] [48,56] [1,1]",
        f"[a {PROMPT}]|{BOX} [[40,48] or [48,56]]",
    ],
    "ref_avs": [
        f"|{TRUE}|false|{PROMPT}|{FALSE} {PROMPT}|{FALSE} [|{TRUE}{FALSE}|{TRUE} {BOX}|{label(PROMPT)}",
        f"{TRUE} [80,24,16,88] {POINTS}|{TRUE} {BOX} [40,48] [48,56] [56,225]|{label('maybe')} {PROMPT}",
    ],
}


@pytest.mark.parametrize("slots", MALFORMED)
def test_a_malformed_answer_says_nothing(slots):
    texts = "|".join(MALFORMED[slots]).split("|")
    for slot in slots.split():
        assert [text for text in texts if tasks.parse(slot, text) is not None] == []


@fast
@given(st.lists(st.tuples(names, ranges, names, ranges), min_size=1, max_size=6))
def test_ave_against_scikit_learn(cases):
    def flat(rows):
        return [event if start <= second < end else "background" for event, start, end in rows for second in range(10)]

    truths, answers = ([(case[i], *case[i + 1]) for case in cases] for i in (0, 2))
    result = score("ave", truths, [tasks.answer("ave", answer) for answer in answers])
    assert result["primary"] == pytest.approx(known.accuracy_score(flat(truths), flat(answers)))
    assert result["metrics"]["event_accuracy"] == np.mean([t[0] == a[0] for t, a in zip(truths, answers, strict=True)])
    constants = [(event, a, b) for event in ("bell", "drum", "horn") for a in range(10) for b in range(a + 1, 11)]
    best = max(np.mean(np.array(flat(truths)) == flat([constant] * len(truths))) for constant in constants)
    assert tasks.chance("ave", make_records("ave", truths)) == pytest.approx(best)


HEARD = (("audio", "bell", 0, 4),)


def test_avvp_by_hand():
    truth = (("audio", "bell", 0, 4), ("visual", "bell", 2, 6), ("visual", "drum", 0, 10))
    text = "<audio>bell,(0 4)</audio> <visual>bell,(4 8)</visual> <audio>horn,(0 2)</audio>"
    segment = {"a": 1 / 2, "v": 1 / 4, "av": 0, "type_av": 1 / 4, "event_av": 1 / 4}
    # A: bell 1, horn (not there) 0. V: bell 2 * 2 / (4 + 2 + 2) = 1/2, drum 0. AV: bell true 2-4, answered never.
    # Event@AV: bell TP 6 FP 2 FN 2 = 3/4, drum 0, horn 0.
    event = {"a": 1 / 2, "v": 0, "av": 0, "type_av": 1 / 6, "event_av": 1 / 6}
    # The bell heard is a match. The bell seen 2-6 and 4-8 has IoU 1/3: one FP, one FN; Event@AV of the bell is 2/4.
    expected = {f"segment_{kind}": f for kind, f in segment.items()} | {f"event_{kind}": f for kind, f in event.items()}
    assert score("avvp", [truth], [text])["metrics"] == pytest.approx(expected)


def test_avvp_nothing_there_has_a_bare_answer_that_says_so():
    record = {"label_content": "I hear nothing and I see nothing."}
    text = tasks.target("avvp", record, "bare")
    assert text == "<audio></audio> <visual></visual>"
    assert tasks.parse("avvp", text) == tasks.truth("avvp", record) == ()


def test_avvp_nothing_there_and_nothing_said_counts_one_but_not_for_an_unreadable_answer():
    assert set(score("avvp", [HEARD], ["<audio>bell,(0 4)</audio>"])["metrics"].values()) == {1.0}
    metrics = score("avvp", [HEARD, HEARD], ["<audio>drum,(0 4)</audio>", "silence"])["metrics"]
    assert metrics["segment_a"] == 0 and metrics["segment_v"] == metrics["segment_av"] == 0.5
    assert metrics["segment_type_av"] == pytest.approx(1 / 3)


CLIP = (("audio", "bell", 0, 4), ("visual", "drum", 0, 10))
BOTH = tasks.answer("avvp", CLIP)
#: Answers of models of the study of which a piece cannot be read, the piece that can, and a text with that alone.
PARTLY = {
    "<audio> bell , ( 0 4 ) </audio> <visual> drum , ( 6 2 ) </visual>": "<audio>bell,(0 4)</audio>",
    "<audio> bell , ( 0 4 ) </audio> <visual> drum , ( 3 ) </visual>": "<audio>bell,(0 4)</audio>",
    "<audio> bell , ( 0 4 5 ) </audio> <visual> drum , ( 0 10 ) </visual>": "<visual>drum,(0 10)</visual>",
    "<audio>bell,(0 4)</audio> <visual> drum </audio> ) </audio> <visual> drum , ( 0 10 ) </visual>": BOTH,
    "<audio>bell,(0 4)</audio> <visual> drum , ( 0": "<audio>bell,(0 4)</audio>",
    "<audio>bell,(0 4),(9 8)</audio> <visual>drum,(0 10)</visual>": "<visual>drum,(0 10)</visual>",
}


@pytest.mark.parametrize("text", PARTLY)
def test_a_bad_piece_makes_an_answer_of_avvp_wrong_and_the_number_by_pieces_is_beside(text):
    records = make_records("avvp", [CLIP] * 4)
    assert tasks.parse("avvp", text) is None  # as a whole it says nothing definite: it is no training answer
    with pytest.raises(ValueError, match="no answer that can be read"):
        tasks.target("avvp", records[0] | {"label_content": text}, "bare")
    answers = (PARTLY[text], text, "silence")
    as_read, result, strict = (tasks.score("avvp", records, [BOTH, one, "silence", BOTH]) for one in answers)
    assert result["per_sample"] == strict["per_sample"] and result["n_unparsable"] == 2
    extra = {"segment_type_av_by_piece": as_read["primary"], "partly_read": 1}
    assert result["metrics"] == strict["metrics"] | extra and strict["primary"] == 0.5 < as_read["primary"]
    assert result["primary"] == result["metrics"]["segment_type_av"] == np.mean(result["per_sample"])


def test_avvp_without_a_piece_that_can_be_read_is_wrong_even_where_nothing_is_there():
    for text in ("<audio>bell,(5 5)</audio>", "<audio></audio> <visual>drum,(6 2)</visual>", "<audio>bell", ""):
        result = score("avvp", [HEARD, ()], [text] * 2)
        assert set(result["metrics"].values()) == {0.0} and result["n_unparsable"] == 2


def test_an_answer_that_says_nothing_is_heard_counts_by_the_definition():
    seen = (("visual", "drum", 0, 10),)
    for text in ("<audio></audio><visual>drum,(0 10)</visual>", "nothing is heard. <visual>drum,(0 10)</visual>"):
        assert set(score("avvp", [seen], [text])["metrics"].values()) == {1.0}
    for text in ("<audio></audio> <visual></visual>", "nothing is heard and nothing is seen."):
        result = score("avvp", [seen, HEARD, ()], [text] * 3)
        assert result["n_unparsable"] == 0 and result["per_sample"] == pytest.approx([2 / 3, 2 / 3, 1])
        assert result["metrics"]["segment_event_av"] == pytest.approx(1 / 3)
    assert tasks.parse("avvp", tasks.answer("avvp", ())) == ()
    assert tasks.chance("avvp", make_records("avvp", [()])) == 1
    assert tasks.chance("avvp", make_records("avvp", [(), (), HEARD])) == pytest.approx(8 / 9)


def reference_avvp(truth, answer, runs):
    """The five F of a clip, by sets of seconds."""

    def seconds(clip, name, kind):
        heard, seen = (
            {second for m, event, start, end in clip if (m, event) == (modality, name) for second in range(start, end)}
            for modality in ("audio", "visual")
        )
        return {"a": heard, "v": seen, "av": heard & seen}[kind]

    def counts(name, kind):
        t, a = (seconds(clip, name, kind) for clip in (truth, answer))
        if not runs:
            return len(t & a), len(a - t), len(t - a)
        t, a = ([{s for s in x if s >= r and set(range(r, s)) <= x} for r in x if r - 1 not in x] for x in (t, a))
        hits = sum(any(2 * len(p & q) >= len(p | q) for q in t) for p in a)
        return hits, len(a) - hits, sum(all(2 * len(p & q) < len(p | q) for p in a) for q in t)

    def f(*kinds):
        rows = [np.sum([counts(name, kind) for kind in kinds], 0) for name in ("bell", "drum", "horn")]
        rows = [2 * tp / (2 * tp + fp + fn) for tp, fp, fn in rows if tp + fp + fn]
        return np.mean(rows) if rows else 1.0

    return [f("a"), f("v"), f("av"), (f("a") + f("v") + f("av")) / 3, f("a", "v")]


events = st.tuples(st.sampled_from(["audio", "visual"]), names, ranges).map(lambda e: (e[0], e[1], *e[2]))
parsings = st.lists(events, min_size=1, max_size=5)


@fast
@given(st.lists(st.tuples(parsings, parsings), min_size=1, max_size=3))
def test_avvp_against_a_reference_on_sets(cases):
    result = score("avvp", [truth for truth, _ in cases], [tasks.answer("avvp", answer) for _, answer in cases])
    expected = np.mean([reference_avvp(*pair, False) + reference_avvp(*pair, True) for pair in cases], 0)
    kinds = ("a", "v", "av", "type_av", "event_av")
    actual = [result["metrics"][f"{level}_{kind}"] for level in ("segment", "event") for kind in kinds]
    assert actual == pytest.approx(expected)
    assert result["primary"] == pytest.approx(np.mean(result["per_sample"]))


@fast
@given(st.lists(st.tuples(parsings, parsings, st.integers(0, 2)), min_size=1, max_size=4))
def test_avvp_partly_bad_answers_against_the_reference(cases):
    """Bad pieces between good ones: the answer is wrong; by pieces, the reference sees the good ones."""
    bad = ("<visual>bell,(5 5)</visual>", "<audio>bell", "<audio>drum,(2 x)</audio>")
    texts = [" ".join([tasks.answer("avvp", answer), *bad[:n]]) for _, answer, n in cases]
    result = score("avvp", [truth for truth, _, _ in cases], texts)
    rows = np.array([reference_avvp(truth, answer, False) for truth, answer, _ in cases])[:, 3]
    clean = np.array([n == 0 for _, _, n in cases])
    assert result["per_sample"] == pytest.approx(rows * clean)
    assert result["metrics"].get("partly_read", 0) == (~clean).sum()
    assert result["metrics"].get("segment_type_av_by_piece", result["primary"]) == pytest.approx(rows.mean())


@fast
@given(st.lists(parsings, min_size=1, max_size=4))
def test_avvp_chance_beats_every_single_event_of_a_whole_clip(truths):
    chance = tasks.chance("avvp", make_records("avvp", truths))
    assert 0 < chance <= 1 + 1e-9
    for name in {event for truth in truths for _, event, _, _ in truth}:
        for modality in "audio", "visual":
            texts = [tasks.answer("avvp", ((modality, name, 0, 10),))] * len(truths)
            assert chance >= score("avvp", truths, texts)["primary"] - 1e-9


def test_avvp_chance_by_hand():
    # "The bell is heard and seen throughout" is right for two of three clips, and wrong in all of the third.
    truths = [(("audio", "bell", 0, 10), ("visual", "bell", 0, 10))] * 2 + [(("audio", "drum", 0, 10),)]
    assert tasks.chance("avvp", make_records("avvp", truths)) == pytest.approx(2 / 3)
    assert score("avvp", truths, [tasks.answer("avvp", truths[0])] * 3)["primary"] == pytest.approx(2 / 3)


@fast
@given(st.lists(st.tuples(boxes, boxes), min_size=1, max_size=5))
def test_arig_against_masks_and_scikit_learn(cases):
    pairs = [[box_mask(box)[::8, ::8].ravel() for box in pair] for pair in cases]
    overlaps = np.array([known.jaccard_score(*pair) for pair in pairs])
    x = [i / 20 for i in range(21)]
    metrics = score("arig", [t for t, _ in cases], [tasks.answer("arig", a) for _, a in cases])["metrics"]
    auc = known.auc(x, [np.mean(overlaps >= threshold) for threshold in x])
    assert metrics == pytest.approx({"ciou": np.mean(overlaps >= 0.5), "auc": auc, "iou": np.mean(overlaps)})


def test_arig_chance_is_the_best_constant_box():
    truths = [(0, 0, 80, 80)] * 2 + [(8, 0, 80, 80), (120, 120, 200, 200)]
    assert tasks.chance("arig", make_records("arig", truths)) == 0.75


@fast
@given(boxes, boxes)
def test_masks_against_scikit_learn(a, b):
    true, mask = box_mask(a)[::8, ::8], box_mask(b)[::8, ::8]
    j, f = mask_scores(true, mask)
    assert j == pytest.approx(known.jaccard_score(true.ravel(), mask.ravel()))
    assert f == pytest.approx(known.fbeta_score(true.ravel(), mask.ravel(), beta=0.3**0.5, zero_division=0))
    assert mask_scores(true, ~true & true) == (0, 0) and mask_scores(~true & true, ~true & true) == (1, 1)


def test_s4_counts_failed_answers_as_wrong():
    masks = MASKS._replace(segment=lambda record, box, points: None if box[0] else box_mask(box))
    texts = [tasks.answer("s4", prompt) for prompt in PROMPTS]
    # The segmenter fails on the first answer. The second is right. The third cannot be read.
    result = score("s4", PROMPTS, [texts[0], texts[1], "[1,2,3,4]"], masks=masks)
    assert result["per_sample"] == [0, 1, 0] and result["n_unparsable"] == 1
    share = pytest.approx(1 / 3)
    assert result["metrics"] == {"J": share, "F": share, "J_answered": 1, "F_answered": 1, "no_mask": 2}
    with pytest.raises(ValueError, match="masks="):
        score("s4", PROMPTS, texts)
    with pytest.raises(ValueError, match="224.*8, 8"):
        score("s4", PROMPTS, texts, masks=MASKS._replace(segment=lambda *_: np.ones((8, 8), bool)))


def test_black_true_masks_are_counted_and_agree_only_with_a_black_mask():
    records, text = make_records("ms3"), tasks.answer("ms3", PROMPTS[0])
    masks = tasks.Masks(lambda r: np.full((8, 8), r["frame_idx"]), lambda r, *_: np.full((8, 8), r["vid"]))
    for record, true, answer in zip(records, (False, False, True), (True, False, True), strict=True):
        record |= {"frame_idx": true, "vid": answer}  # False: a black mask
    result = tasks.score("ms3", records, [text] * 3, masks=masks)
    assert result["per_sample"] == [0, 1, 1] and result["metrics"]["F"] == pytest.approx(2 / 3)
    assert result["metrics"]["empty_truth"] == 2
    assert tasks.score("ms3", records, ["", text, text], masks=masks)["metrics"]["empty_truth"] == 2
    assert "empty_truth" not in tasks.score("ms3", records[2:], [text], masks=masks)["metrics"]


def test_s4_chance_uses_the_same_segmenter():
    # The box with the highest mean IoU among those tried is the whole image.
    areas = [64 * 64 / 224**2, 1, 64 * 64 / 224**2]
    assert tasks.chance("s4", make_records("s4"), masks=MASKS) == pytest.approx(np.mean(areas))
    blind = MASKS._replace(segment=lambda *_: np.zeros((224, 224), bool))
    assert tasks.chance("s4", make_records("s4"), masks=blind) == 0


WHOLE, HALF, QUARTER = (((0, 0, *corner), PROMPTS[0][1]) for corner in ((224, 224), (224, 112), (112, 112)))


def ref_avs(cases):
    """Records and texts of (split, truth, answer or text)."""
    records = [make_record("ref_avs", i, truth) | {"split": split} for i, (split, truth, _) in enumerate(cases)]
    return records, [text if isinstance(text, str) else tasks.answer("ref_avs", text) for _, _, text in cases]


def test_ref_avs_by_hand():
    cases = [
        ("test_s", HALF, HALF),  # J 1
        ("test_s", HALF, WHOLE),  # J 1/2, P 1/2, R 1: F = 1.3 * 0.5 / 1.15
        ("test_s", HALF, FALSE),  # J 0: an empty mask
        ("test_s", HALF, "the bell"),  # unreadable
        ("test_u", QUARTER, HALF),  # J 1/2
        ("test_n", tasks.NULL, FALSE),  # right, S 0
        ("test_n", tasks.NULL, WHOLE),  # S 1
        ("test_n", tasks.NULL, QUARTER),  # S = sqrt(1/4)
        ("test_n", tasks.NULL, TRUE),  # no box: unreadable, S 1
    ]
    f = 1.3 * 0.5 / (0.3 * 0.5 + 1)
    result = tasks.score("ref_avs", *ref_avs(cases), masks=MASKS)
    assert result["per_sample"] == pytest.approx([1, 0.5, 0, 0, 0.5, 1, 0, 0, 0]) and result["n_unparsable"] == 2
    expected = {"J": 3 / 9, "J_seen": 1.5 / 4, "F_seen": (1 + f) / 4, "J_unseen": 0.5, "F_unseen": f, "S_null": 2.5 / 4}
    answered = {"J_seen": 1.5 / 3, "F_seen": (1 + f) / 3, "J_unseen": 0.5, "F_unseen": f, "S_null": 1.5 / 3}
    expected |= {f"{name}_answered": value for name, value in answered.items()}
    assert result["metrics"] == pytest.approx(expected | {"no_mask": 2})


def test_ref_avs_without_a_mask_and_out_of_view():
    cases = [("test_s", HALF, HALF), ("test_n", tasks.NULL, HALF)]
    result = tasks.score("ref_avs", *ref_avs(cases), masks=MASKS._replace(segment=lambda *_: None))
    assert result["per_sample"] == [0, 0] and result["n_unparsable"] == 0
    worst = {"J_seen": 0, "F_seen": 0, "S_null": 1}
    expected = {"J": 0, **worst, **{f"{name}_answered": value for name, value in worst.items()}, "no_mask": 2}
    assert result["metrics"] == expected
    masks = MASKS._replace(truth=lambda record: np.zeros((224, 224), bool))  # out of view in this frame
    cases = [("test_s", HALF, FALSE), ("test_s", HALF, HALF)]
    assert tasks.score("ref_avs", *ref_avs(cases), masks=masks)["per_sample"] == [1, 0]


@pytest.mark.parametrize(("nulls", "best"), [(1, 1 / 2), (3, 3 / 4)])
def test_ref_avs_chance_is_the_better_of_null_and_a_constant_box(nulls, best):
    # One thing fills its box; each constant answer is right on one kind of sample only.
    records, _ = ref_avs([("test_u", HALF, FALSE)] + [("test_n", tasks.NULL, FALSE)] * nulls)
    assert tasks.chance("ref_avs", records, masks=MASKS) == pytest.approx(best)
    assert tasks.chance("ref_avs", records[:1], masks=MASKS) == tasks.chance("ref_avs", records[1:], masks=MASKS) == 1


MUSIC_AVQA = {"": 2 / 3, "/audio": 1, "/audio/counting": 1, "/audio-visual": 0.5}
MUSIC_AVQA |= {"/audio-visual/counting": 1, "/audio-visual/location": 0}
AVQA = {"": 1 / 3, "/relation/sound": 0.5, "/relation/both": 0, "/type/which": 0.5, "/type/from": 0}


@pytest.mark.parametrize(
    ("slot", "truths", "texts", "metrics", "scores", "chance"),
    [
        ("ks", "", "swaying bell|swaying bell|klingon", {"accuracy": 1 / 3}, [1, 0, 0], 2 / 3),
        ("a2v", "", "one|1|3", {"accuracy": 1 / 3}, [1, 0, 0], 2 / 3),
        ("v2a", "", "second|one|1", {"accuracy": 2 / 3}, [1, 0, 1], 2 / 3),
        ("avqa", "", "YES|one|yes", {f"accuracy{name}": v for name, v in MUSIC_AVQA.items()}, [1, 0, 1], 2 / 3),
        # A place is no answer; the words are.
        ("avqa_thu", "", "BELL|horn|2", {f"accuracy{name}": v for name, v in AVQA.items()}, [1, 0, 0], 2 / 3),
        # n: 3 true, 2 answered, 2 right, F = 4/5. j: 1, 2, 1, F = 2/3. s: no answer. Always n: F = 6/8.
        ("meld", "n|n|n|j|s", "n|N|j|j|", {"weighted_f1": 46 / 75, "accuracy": 0.6}, [1.2, 1.2, 0, 2 / 3, 0], 0.45),
        ("mafw", "sad|sad|sad|fear", "sad|sad|sad|sad", {"WAR": 3 / 4, "UAR": 1 / 2}, [1, 1, 1, 0], 3 / 4),
        # Only the space between words may differ.
        ("ucf", "AbCd|AbCd|AbCd|AbCd|AbCd", "ab cd|AbCd|ab_c-d|ab|", {"accuracy": 0.6}, [1, 1, 1, 0, 0], 1),
        ("ucf", "YoYo|yo yo|TaiChi", "yo-yo|tai|tai", {"accuracy": 1 / 3}, [1, 0, 0], 2 / 3),
    ],
)
def test_labels_by_hand(slot, truths, texts, metrics, scores, chance):
    truths, texts = truths.split("|") if truths else None, texts.split("|")
    result = score(slot, truths, [label(text) for text in texts])
    assert result["metrics"] == pytest.approx(metrics) and result["per_sample"] == pytest.approx(scores)
    assert result["primary"] == pytest.approx(np.mean(scores)) and result["n_unparsable"] == texts.count("")
    assert tasks.chance(slot, make_records(slot, truths)) == pytest.approx(chance)


def test_labels_agree_as_the_scorer_compares_them():
    assert tasks.agree("ucf", "yo yo", "yoyo") and not tasks.agree("ucf", "yo yo", None)
    assert not tasks.agree("meld", "yo yo", "yoyo") and tasks.agree("meld", "joy", "joy")


@pytest.mark.parametrize(
    ("cases", "chance"),  # always the second; always "a"; either
    [("abcd 1,efgh 1,ijkl 1", 1), ("abcd a,bacd a,bcad a,bcda a", 1), ("abcd 0,abcd 1,abcd 2,bcda 0", 0.5)],
)
def test_avqa_thu_chance_is_the_best_constant_place_or_words(cases, chance):
    rows = [case.split() for case in cases.split(",")]
    records = [{"multi_choice": list(choices), "answer": answer} for choices, answer in rows]
    assert tasks.chance("avqa_thu", records) == chance


feelings = st.sampled_from(["neutral", "joy", "anger", "fear"])


@fast
@given(st.lists(st.tuples(feelings, st.one_of(feelings, st.sampled_from(["klingon", ""]))), min_size=1, max_size=12))
def test_emotions_against_scikit_learn(cases):
    truths, answers = ([case[i] for case in cases] for i in (0, 1))
    meld, mafw = (score(slot, truths, [label(answer) for answer in answers]) for slot in ("meld", "mafw"))
    f1 = known.f1_score(truths, answers, average="weighted", zero_division=0)
    uar = known.recall_score(truths, answers, labels=sorted(set(truths)), average="macro", zero_division=0)
    accuracy = known.accuracy_score(truths, answers)
    assert meld["metrics"] == pytest.approx({"weighted_f1": f1, "accuracy": accuracy})
    assert mafw["metrics"] == pytest.approx({"WAR": accuracy, "UAR": uar})
    for result in meld, mafw:
        assert result["primary"] == pytest.approx(np.mean(result["per_sample"]))
        assert [value > 0 for value in result["per_sample"]] == [truth == answer for truth, answer in cases]
    assert max(meld["per_sample"]) < 2


def test_resampled_shares_of_weighted_f1_spread_like_the_metric():
    rng = np.random.default_rng(0)
    truths = rng.choice(list("nnnnnjsaf"), size=200)
    answers = np.where(rng.random(200) < 0.6, truths, "n")
    shares = np.array(score("meld", truths.tolist(), [label(answer) for answer in answers])["per_sample"])
    draws = rng.integers(200, size=(400, 200))
    metric = [known.f1_score(truths[d], answers[d], average="weighted", zero_division=0) for d in draws]
    assert shares[draws].mean(1).std() == pytest.approx(np.std(metric), rel=0.15)
    assert shares[draws].mean() == pytest.approx(np.mean(metric), abs=0.01)
