"""Metrics against cases worked by hand and against short independent references."""

import numpy as np
import pytest
from conftest import box_mask, make_record
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as known

from crab import tasks
from crab.tasks.segmentation import mask_scores

names = st.sampled_from(["bell", "drum", "horn"])
ranges = st.lists(st.integers(0, 10), min_size=2, max_size=2, unique=True).map(sorted)
# Two different multiples of 8 in order: the near and far edge of a box along one axis.
edges = st.lists(st.integers(0, 28).map(lambda v: 8 * v), min_size=2, max_size=2, unique=True).map(sorted)
boxes = st.tuples(edges, edges).map(lambda e: (e[0][0], e[1][0], e[0][1], e[1][1]))
fast = settings(max_examples=60, deadline=None)


def run(slot, truths, texts, **options):
    records = [make_record(slot, i, tasks.answer(slot, t), t) for i, t in enumerate(truths)]
    return tasks.score(slot, records, texts, **options)


# --- AVE

@pytest.mark.parametrize(("text", "share"), [
    ("<event>bell</event> <range>2,6</range>", 1.0),
    ("<range>2,6</range><event>Bell</event>", 1.0),
    ("<event>bell</event> <range>4,8</range>", 0.6),   # 2 bell + 0,1,8,9 background
    ("<event>drum</event> <range>2,6</range>", 0.6),   # the six background segments
    ("<event>drum</event> <range>0,10</range>", 0.0),
    ("<event>bell</event> <range>0,10</range>", 0.4),
    ("<event>bell</event> <range>6,2</range>", 0.0),
    ("<event>bell</event> <range>2,12</range>", 0.0),
    ("<event>bell</event> <range>-2,6</range>", 0.0),
    ("<event>bell</event> <range>2,6</range> <range>2,6</range>", 0.0),
    ("<event><event>bell</event></event> <range>2,6</range>", 0.0),
    ("<event>bell <range>2,6</range></event>", 0.0),
    ("<event>bell</event> <range>٢,٦</range>", 0.0),
    ("<event>bell</event>", 0.0),
])
def test_ave_by_hand(text, share):
    assert run("ave", [("bell", 2, 6)], [text])["primary"] == pytest.approx(share)


@fast
@given(st.lists(st.tuples(names, ranges, names, ranges), min_size=1, max_size=6))
def test_ave_against_scikit_learn(cases):
    truths = [(e, *r) for e, r, _, _ in cases]
    given_ = [(e, *r) for _, _, e, r in cases]
    flat = lambda rows: [e if a <= s < b else "background" for e, a, b in rows for s in range(10)]  # noqa: E731
    got = run("ave", truths, [tasks.answer("ave", g) for g in given_])
    assert got["primary"] == pytest.approx(known.accuracy_score(flat(truths), flat(given_)))
    assert got["primary"] == pytest.approx(np.mean(got["per_sample"]))
    records = [make_record("ave", i, "", t) for i, t in enumerate(truths)]
    constants = [(e, a, b) for e in ("bell", "drum", "horn") for a in range(10) for b in range(a + 1, 11)]
    true = flat(truths)
    best = max(sum(t == g for t, g in zip(true, flat([c]) * len(truths))) for c in constants) / len(true)
    assert tasks.chance("ave", records) == pytest.approx(best)


# --- AVVP

def test_avvp_by_hand():
    truth = (("audio", "bell", 0, 4), ("visual", "bell", 2, 6), ("visual", "drum", 0, 10))
    text = "<audio>bell,(0 4)</audio> <visual>bell,(4 8)</visual> <audio>horn,(0 2)</audio>"
    got = run("avvp", [truth], [text])["metrics"]
    # A: bell 1, horn (never there) 0.  V: bell TP 2 FP 2 FN 2 = 1/2, drum 0.  AV: bell true 2-4, predicted none: 0.
    assert got["segment_a"] == pytest.approx(1 / 2)
    assert got["segment_v"] == pytest.approx(1 / 4)
    assert got["segment_av"] == 0
    assert got["segment_type_av"] == pytest.approx(1 / 4)
    # pooled: bell TP 6 FP 2 FN 2 = 3/4; drum 0; horn 0
    assert got["segment_event_av"] == pytest.approx(1 / 4)
    # events: bell heard meets; bell seen 2-6 against 4-8 has IoU 1/3, so one FP, one FN
    assert got["event_a"] == pytest.approx(1 / 2) and got["event_v"] == 0 and got["event_av"] == 0
    assert got["event_type_av"] == pytest.approx(1 / 6)
    assert got["event_event_av"] == pytest.approx((2 / 4 + 0 + 0) / 3)


def test_avvp_all_negative_counts_one_but_never_for_an_unreadable_answer():
    truth = (("audio", "bell", 0, 4),)
    got = run("avvp", [truth], ["<audio>bell,(0 4)</audio>"])["metrics"]
    assert set(got.values()) == {1.0}  # V and AV: nothing there, nothing said
    got = run("avvp", [truth, truth], ["<audio>drum,(0 4)</audio>", "silence"])["metrics"]
    assert got["segment_a"] == 0 and got["segment_v"] == got["segment_av"] == 0.5
    assert got["segment_type_av"] == pytest.approx(1 / 3)


def test_avvp_half_overlap_is_a_match_and_runs_join():
    truth = (("audio", "bell", 0, 4),)
    for text, f in (
        ("<audio>bell,(0 2)</audio>", 1.0),                                   # IoU exactly 1/2
        ("<audio>bell,(0 2)</audio> <audio>bell,(2 4)</audio>", 1.0),         # one run of 0-4
        ("<audio>bell,(0 1)</audio>", 0.0),
        ("<audio>bell,(0 3)</audio> <audio>bell,(5 6)</audio>", 2 / 3),       # TP 1 FP 1
    ):
        assert run("avvp", [truth], [text])["metrics"]["event_a"] == pytest.approx(f)


def reference_avvp(true, given_, pool):
    """The mean F over classes of one clip from sets of (modality, class, second) or of runs."""
    both = [{(c, s) for m, c, s in x if m == "audio"} & {(c, s) for m, c, s in x if m == "visual"} for x in (true, given_)]
    table = {"a": [{(c, s) for m, c, s in x if m == "audio"} for x in (true, given_)],
             "v": [{(c, s) for m, c, s in x if m == "visual"} for x in (true, given_)], "av": both}
    def counts(cls, kind):
        t, g = ({s for c, s in x if c == cls} for x in table[kind])
        if not pool:
            return len(t & g), len(g - t), len(t - g)
        t, g = (to_runs(x) for x in (t, g))
        tp = sum(any(2 * len(p & a) >= len(p | a) for a in t) for p in g)
        return tp, len(g) - tp, sum(all(2 * len(p & a) < len(p | a) for p in g) for a in t)
    def f(kinds):
        rows = [np.sum([counts(c, k) for k in kinds], 0) for c in ("bell", "drum", "horn")]
        rows = [2 * tp / (2 * tp + fp + fn) for tp, fp, fn in rows if tp + fp + fn]
        return np.mean(rows) if rows else 1.0
    a, v, av = f("a"), f("v"), f(["av"])
    return [a, v, av, (a + v + av) / 3, f("av")]


def to_runs(seconds):
    out = []
    for s in sorted(seconds):
        if out and s - 1 in out[-1]:
            out[-1].add(s)
        else:
            out.append({s})
    return out


parsings = st.lists(
    st.tuples(st.sampled_from(["audio", "visual"]), names, ranges).map(lambda e: (e[0], e[1], *e[2])), min_size=1, max_size=5,
)


@fast
@given(st.lists(st.tuples(parsings, parsings), min_size=1, max_size=3))
def test_avvp_against_a_reference_on_sets(cases):
    got = run("avvp", [t for t, _ in cases], [tasks.answer("avvp", g) for _, g in cases])
    seconds = lambda x: {(m, c, s) for m, c, a, b in x for s in range(a, b)}  # noqa: E731
    for level, pool in (("segment", False), ("event", True)):
        want = np.mean([reference_avvp(seconds(t), seconds(g), pool) for t, g in cases], 0)
        have = [got["metrics"][f"{level}_{k}"] for k in ("a", "v", "av", "type_av", "event_av")]
        assert have == pytest.approx(want)
    assert got["primary"] == pytest.approx(np.mean(got["per_sample"]))


@fast
@given(st.lists(parsings, min_size=1, max_size=4))
def test_avvp_chance_beats_every_single_whole_clip_event(truths):
    records = [make_record("avvp", i, tasks.answer("avvp", t), t) for i, t in enumerate(truths)]
    chance = tasks.chance("avvp", records)
    assert 0 < chance <= 1 + 1e-9
    for name in {event for t in truths for _, event, _, _ in t}:
        for modality in "audio", "visual":
            texts = [tasks.answer("avvp", ((modality, name, 0, 10),))] * len(truths)
            assert chance >= tasks.score("avvp", records, texts)["primary"] - 1e-9


def test_avvp_chance_by_hand():
    # "bell heard and seen throughout" is right for two clips of three and wrong in all of the third
    truths = [(("audio", "bell", 0, 10), ("visual", "bell", 0, 10))] * 2 + [(("audio", "drum", 0, 10),)]
    records = [make_record("avvp", i, tasks.answer("avvp", t), t) for i, t in enumerate(truths)]
    assert tasks.chance("avvp", records) == pytest.approx(2 / 3)
    texts = ["<audio>bell,(0 10)</audio><visual>bell,(0 10)</visual>"] * 3
    assert tasks.score("avvp", records, texts)["primary"] == pytest.approx(2 / 3)


# --- ARIG

@pytest.mark.parametrize(("text", "iou", "hit"), [
    ("<obj>(0,0)(80,80)</obj>", 1.0, 1),
    ("<obj>(0,0)(80,40)</obj>", 0.5, 1),
    ("<obj>(40,0)(120,80)</obj>", 1 / 3, 0),
    ("<obj>(80,80)(160,160)</obj>", 0.0, 0),
    ("<obj>(80,80)(0,0)</obj>", 0.0, 0),
    ("<obj>(0,0)(80,225)</obj>", 0.0, 0),
    ("<obj>(0,0)(80,-8)</obj>", 0.0, 0),
    ("<obj>(0,0)(0,80)</obj>", 0.0, 0),
    ("<obj>(0,0)(80,80)</obj><obj>(0,0)(80,80)</obj>", 0.0, 0),
    ("<obj>(0,0)(80,99999999999999999999999)</obj>", 0.0, 0),
])
def test_arig_by_hand(text, iou, hit):
    got = run("arig", [(0, 0, 80, 80)], [text])
    assert got["metrics"]["iou"] == pytest.approx(iou)
    assert got["per_sample"] == [hit]


def test_arig_auc_of_nothing_readable_is_zero():
    assert run("arig", [(0, 0, 80, 80)], ["no"])["metrics"]["auc"] == 0
    # an IoU of 1/2 succeeds at thresholds 0 to 0.5: ten whole steps of 0.05 and half of the next
    assert run("arig", [(0, 0, 80, 80)], ["<obj>(0,0)(80,40)</obj>"])["metrics"]["auc"] == pytest.approx(0.525)


@fast
@given(st.lists(st.tuples(boxes, boxes), min_size=1, max_size=5))
def test_arig_against_masks_and_scikit_learn(cases):
    overlaps = [known.jaccard_score(box_mask(t)[::8, ::8].ravel(), box_mask(g)[::8, ::8].ravel()) for t, g in cases]
    x = [i / 20 for i in range(21)]
    got = run("arig", [t for t, _ in cases], [tasks.answer("arig", g) for _, g in cases])["metrics"]
    assert got["ciou"] == pytest.approx(np.mean([o >= 0.5 for o in overlaps]))
    assert got["auc"] == pytest.approx(known.auc(x, [np.mean([o >= t for o in overlaps]) for t in x]))
    assert got["iou"] == pytest.approx(np.mean(overlaps))


def test_arig_chance_is_the_best_constant_box():
    truths = [(0, 0, 80, 80)] * 2 + [(8, 0, 80, 80), (120, 120, 200, 200)]
    records = [make_record("arig", i, "", t) for i, t in enumerate(truths)]
    assert tasks.chance("arig", records) == 0.75


def test_arig_truth_may_stand_in_the_answer():
    record = {"label_content": "it is a bell . <obj>(16,24)(80,88)</obj>"}
    assert tasks.truth("arig", record) == (16, 24, 80, 88)


# --- S4

def test_masks_by_hand():
    true, given_ = box_mask((0, 0, 4, 4), 8), box_mask((2, 0, 6, 4), 8)
    j, f = mask_scores(true, given_)  # 8 shared, 16 each: P = R = 1/2
    assert (j, f) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
    empty = np.zeros((8, 8), bool)
    assert mask_scores(true, empty) == mask_scores(empty, true) == (0, 0)
    assert mask_scores(empty, empty) == (1, 1)


@fast
@given(boxes, boxes)
def test_masks_against_scikit_learn(a, b):
    true, given_ = box_mask(a)[::8, ::8], box_mask(b)[::8, ::8]
    j, f = mask_scores(true, given_)
    assert j == pytest.approx(known.jaccard_score(true.ravel(), given_.ravel()))
    assert f == pytest.approx(known.fbeta_score(true.ravel(), given_.ravel(), beta=0.3**0.5, zero_division=0))


def test_s4_counts_what_fails_as_wrong(records_of):
    masks = tasks.Masks(
        lambda r: box_mask(tasks.truth("s4", r).box),
        lambda r, box, points: None if box[0] else box_mask(box),
    )
    records = records_of("s4")
    texts = [tasks.target("s4", r, "bare") for r in records]
    got = tasks.score("s4", records, [texts[0], texts[1], "[1,2,3,4]"], masks=masks)
    # first: the segmenter gives up; second: right; third: not readable
    assert got["per_sample"] == [0, 1, 0] and got["primary"] == pytest.approx(1 / 3)
    assert got["metrics"]["J_answered"] == got["metrics"]["F_answered"] == 1
    assert got["metrics"]["no_mask"] == 2 and got["n_unparsable"] == 1
    with pytest.raises(ValueError, match="masks="):
        tasks.score("s4", records, texts)
    with pytest.raises(ValueError, match="224.*8, 8"):
        tasks.score("s4", records, texts, masks=masks._replace(segment=lambda *a: np.ones((8, 8), bool)))


@pytest.mark.parametrize("text", [
    "[16,24,80,88] [40,48] [48,56]", "[16,24,80,88] [40,48] [48,56] [56,64] [1,1]", "[40,48] [16,24,80,88] [48,56] [56,64]",
    "[80,24,16,88] [40,48] [48,56] [56,64]", "[16,24,80,88] [40,48] [48,56] [56,225]", "[[16,24,80,88] [40,48] [48,56] [56,64]]",
    "[16,24,80,88] [40,48] [48,56] [56,64", "[16 24 80 88] [40,48] [48,56] [56,64]", "[16,24,80,88.0] [40,48] [48,56] [56,64]",
])
def test_s4_malformed(text):
    assert tasks.parse("s4", text) is None


def test_s4_chance_uses_the_same_segmenter(records_of, box_masks):
    records = records_of("s4")
    got = tasks.chance("s4", records, masks=box_masks)
    # the whole image is the box of highest mean IoU among those tried: J of it over the three
    areas = [64 * 64 / 224**2, 1, 64 * 64 / 224**2]
    assert got >= np.mean(areas) - 1e-9
    half = tasks.chance("s4", records, masks=box_masks._replace(segment=lambda r, b, p: np.zeros((224, 224), bool)))
    assert half == 0


# --- labels

def test_avqa_accuracy_by_modality_and_type(records_of):
    got = tasks.score("avqa", records_of("avqa"), ["<answer> YES </answer>", "<answer>one</answer>", "<answer>yes</answer>"])
    assert got["metrics"] == {
        "accuracy": pytest.approx(2 / 3), "accuracy/audio": 1.0, "accuracy/audio/counting": 1.0,
        "accuracy/audio-visual": 0.5, "accuracy/audio-visual/counting": 1.0, "accuracy/audio-visual/location": 0.0,
    }
    assert tasks.chance("avqa", records_of("avqa")) == pytest.approx(2 / 3)


@pytest.mark.parametrize("slot", ["cremad", "ks", "a2v", "v2a"])
def test_accuracy_by_hand(slot, records_of):
    records = records_of(slot)
    first = tasks.target(slot, records[0], "bare")
    got = tasks.score(slot, records, [first, first, "<answer>klingon</answer>"])
    same = tasks.truth(slot, records[0]) == tasks.truth(slot, records[1])
    assert got["per_sample"] == [1.0, float(same), 0.0]
    assert got["n_unparsable"] == 0  # a label outside the vocabulary is read, and wrong
    assert tasks.chance(slot, records) == pytest.approx(2 / 3)


@pytest.mark.parametrize("text", ["one", "<answer></answer>", "<answer> </answer>", "<answer>one</answer><answer>two</answer>",
                                  "<answer><answer>one</answer></answer>", "<answer>one", "one</answer>", "<answer>one</event>",
                                  "</answer>one<answer>", "<Answer>one</Answer>"])
def test_no_one_answer(text):
    for slot in "a2v", "avqa", "ks", "cremad":
        assert tasks.parse(slot, text) is None


def test_matching_reads_numbers_and_words():
    for text, choice in (("1", "one"), ("first", "one"), ("two", "two"), ("Second", "two"), ("three", "three")):
        assert tasks.parse("a2v", f"<answer>{text}</answer>") == choice
