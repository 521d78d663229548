"""Metrics against cases worked by hand and against short independent references."""

import numpy as np
import pytest
from conftest import MASKS, box_mask, make_record
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


@pytest.mark.parametrize(("times", "range_"), [((2, 6), (2, 6)), (("2", "10"), (2, 10)), ((2.0, "06"), (2, 6)), ((0, 1), (0, 1))])
def test_ave_times_are_whole_seconds(times, range_):
    record = make_record("ave", 0, "", ("bell", *times))
    assert tasks.truth("ave", record) == ("bell", *range_)
    for bad in (2.7, "2.7", "2.0", "\u0663", "1_0", True, None, float("nan"), float("inf"), [2]):
        with pytest.raises(ValueError, match="start_time, end_time must be a label and whole seconds 0 <= start < end <= 10, not 'bell', "):
            tasks.truth("ave", record | {"start_time": bad, "end_time": 10})


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


@pytest.mark.parametrize("text", [
    "<audio>dog,(0 3),(5 8)</audio>", "<audio>dog,(0 3) dog,(5 8)</audio>", "<audio>dog, ( 0 , 3 ) ,(5 8)</audio>",
    "<visual>cat,(0 3)</visual> <audio>dog (0,3),(5 8)</audio>",
])
def test_avvp_a_piece_of_two_intervals_makes_the_whole_answer_unreadable(text):
    assert tasks.parse("avvp", text) is None
    truth = (("audio", "dog", 5, 8), ("visual", "cat", 0, 3))
    assert run("avvp", [truth], [text])["metrics"] == dict.fromkeys(run("avvp", [truth], [""])["metrics"], 0)


def test_avvp_labels_may_hold_brackets_commas_and_numbers():
    for label in ("frying_(food)", "horn, small", "drum (2)", "band (no 3, live)", "take 5 8"):
        assert tasks.parse("avvp", f"<audio>{label},(5 8)</audio>") == (("audio", label, 5, 8),)


# --- UnAV

@pytest.mark.parametrize(("text", "events"), [
    ("<event>Bell</event> <range>2,6</range>", [("bell", 2, 6)]),
    ("so . <event>bell</event><range> 2 , 6 </range> and <event>drum</event> at <range>0,44</range>", [("bell", 2, 6), ("drum", 0, 44)]),
    ("<event>bell</event> <range>0.5,6.25</range>", [("bell", 0.5, 6.25)]),
    ("<event>bell</event> <range>2,6</range> <event>bell</event> <range>2,6</range>", [("bell", 2, 6)] * 2),
    *((text, None) for text in (
        "", "bell", "<event>bell</event>", "<range>2,6</range>", "<range>2,6</range> <event>bell</event>",
        "<event>bell</event> <event>drum</event> <range>2,6</range> <range>0,4</range>",
        "<event>bell</event> <range>2,6</range> <event>drum</event>", "<event>bell</event> <range>2,6</range> <range>7,8</range>",
        "<event>bell</event> <range>6,2</range>", "<event>bell</event> <range>2,2</range>", "<event>bell</event> <range>-2,6</range>",
        "<event>bell</event> <range>2,6</range> <event>drum</event> <range>6,2</range>", "<event> </event> <range>2,6</range>",
        "<event><event>bell</event></event> <range>2,6</range>", "<event>bell <range>2,6</range></event>",
        "<event>bell</event> <range>٢,٦</range>", "<event>bell</event> <range>2.,6</range>", "<event>bell</event> <range>2 6</range>",
        "<event>bell</event> <range>2,6,8</range>", "<event>bell</event> <range>1e1,20</range>", "<event>bell</event> <range>0,inf</range>",
    )),
])
def test_unav_by_hand(text, events):
    assert tasks.parse("unav", text) == (None if events is None else tuple(events))


def test_unav_truth_is_in_the_answer(records_of):
    record = records_of("unav")[0]
    assert tasks.truth("unav", record) == (("bell", 2, 6), ("drum", 0, 4), ("bell", 7, 9))
    with pytest.raises(ValueError, match="label_content"):
        tasks.truth("unav", record | {"label_content": "<event>bell</event>"})


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


def test_black_true_masks_are_counted_and_agree_with_nothing_but_a_black_mask(records_of):
    records, said = records_of("ms3"), tasks.answer("ms3", ((0, 0, 8, 8), ((1, 1), (2, 2), (3, 3))))
    black = np.zeros((8, 8), bool)
    masks = tasks.Masks(lambda r: black if r["frame_idx"] else ~black, lambda r, box, points: ~black if r["vid"] == "seen" else black)
    for record, frame, vid in zip(records, (1, 1, 0), ("seen", "unseen", "seen"), strict=True):
        record |= {"frame_idx": frame, "vid": vid}
    got = tasks.score("ms3", records, [said] * 3, masks=masks)
    assert got["per_sample"] == [0, 1, 1] and got["metrics"]["F"] == pytest.approx(2 / 3) and got["metrics"]["empty_truth"] == 2
    assert tasks.score("ms3", records, ["", said, said], masks=masks)["metrics"]["empty_truth"] == 2  # whatever is answered
    assert "empty_truth" not in tasks.score("ms3", records[2:], [said], masks=masks)["metrics"]


@pytest.mark.parametrize("text", [
    "[16,24,80,88] [40,48] [48,56]", "[16,24,80,88] [40,48] [48,56] [56,64] [1,1]", "[40,48] [16,24,80,88] [48,56] [56,64]",
    "[80,24,16,88] [40,48] [48,56] [56,64]", "[16,24,80,88] [40,48] [48,56] [56,225]", "[[16,24,80,88] [40,48] [48,56] [56,64]]",
    "[16,24,80,88] [40,48] [48,56] [56,64", "[16 24 80 88] [40,48] [48,56] [56,64]", "[16,24,80,88.0] [40,48] [48,56] [56,64]",
])
def test_s4_malformed(text):
    assert tasks.parse("s4", text) is None


def test_s4_chance_uses_the_same_segmenter(records_of):
    records = records_of("s4")
    got = tasks.chance("s4", records, masks=MASKS)
    # the whole image is the box of highest mean IoU among those tried: J of it over the three
    areas = [64 * 64 / 224**2, 1, 64 * 64 / 224**2]
    assert got >= np.mean(areas) - 1e-9
    half = tasks.chance("s4", records, masks=MASKS._replace(segment=lambda r, b, p: np.zeros((224, 224), bool)))
    assert half == 0


# --- UCF

def test_ucf_labels_are_compared_without_what_parts_their_words():
    """A class as the set names it, and the words in which the answer to be learned says it."""
    said = ["apply eye makeup", "ApplyEyeMakeup", "apply_eye_makeup", "applyeyemakeup", "apply makeup", "apply lipstick", ""]
    records = [{"label": "ApplyEyeMakeup"}] * len(said)
    got = tasks.score("ucf", records, [f"<answer>{text}</answer>" for text in said])
    assert got["per_sample"] == [1, 1, 1, 1, 0, 0, 0] and got["metrics"]["accuracy"] == pytest.approx(4 / 7) and got["n_unparsable"] == 1
    mixed = [{"label": "YoYo"}, {"label": "yo yo"}, {"label": "TaiChi"}]
    assert tasks.chance("ucf", mixed) == pytest.approx(2 / 3)
    assert tasks.truth("ucf", mixed[0]) == "yoyo" and tasks.truth("ucf", mixed[1]) == "yo yo"  # shown as they are written
    assert tasks.agree("ucf", "yo yo", "yoyo") and not tasks.agree("meld", "yo yo", "yoyo") and tasks.agree("meld", "joy", "joy")


# --- MS3

def test_ms3_is_scored_on_the_mask_of_all_that_sounds():
    # two sounding things of 80 x 80; their common box is 200 x 80, which the segmenter fills
    true = box_mask((0, 0, 80, 80)) | box_mask((120, 0, 200, 80))
    masks = tasks.Masks(lambda r: true, lambda r, box, points: box_mask(box))
    points = ((40, 40), (160, 40), (48, 48))
    both, one = ((0, 0, 200, 80), points), ((0, 0, 80, 80), points)
    got = run("ms3", [both] * 3, [tasks.answer("ms3", both), tasks.answer("ms3", one), "two bells"], masks=masks)
    assert got["per_sample"] == [pytest.approx(160 / 200), pytest.approx(1 / 2), 0]
    assert got["metrics"]["J"] == got["primary"] == pytest.approx(1.3 / 3)
    # P = 160/200, R = 1: 1.3 * 0.8 / (0.3 * 0.8 + 1);  P = 1, R = 1/2: 1.3 * 0.5 / (0.3 + 0.5)
    f = 1.04 / 1.24, 0.65 / 0.8
    assert got["metrics"]["F"] == pytest.approx(sum(f) / 3)
    assert got["metrics"]["F_answered"] == pytest.approx(sum(f) / 2) and got["metrics"]["no_mask"] == 1


# --- Ref-AVS

POINTS = ((8, 8), (16, 16), (24, 24))
WHOLE, HALF, QUARTER = (((0, 0, *corner), POINTS) for corner in ((224, 224), (224, 112), (112, 112)))
FALSE, TRUE = "<answer>false</answer>", "<answer>true</answer>"


def ref_avs(cases, masks=MASKS):
    """Cases are (split, truth, text)."""
    records = [make_record("ref_avs", i, tasks.answer("ref_avs", t), t) | {"split": split} for i, (split, t, _) in enumerate(cases)]
    return records, tasks.score("ref_avs", records, [text for _, _, text in cases], masks=masks)


def test_ref_avs_by_hand():
    said = lambda prompt: tasks.answer("ref_avs", prompt)  # noqa: E731
    cases = [
        ("test_s", HALF, said(HALF)),               # J 1
        ("test_s", HALF, said(WHOLE)),              # J 1/2, P 1/2, R 1: F = 1.3 * 0.5 / 1.15
        ("test_s", HALF, FALSE),                    # J 0: an empty mask
        ("test_s", HALF, "the bell"),               # unreadable
        ("test_u", QUARTER, said(HALF)),            # J 1/2
        ("test_n", tasks.NULL, FALSE),              # right, S 0
        ("test_n", tasks.NULL, said(WHOLE)),        # S 1
        ("test_n", tasks.NULL, said(QUARTER)),      # S = sqrt(1/4)
        ("test_n", tasks.NULL, TRUE),               # no box: unreadable, S 1
    ]
    f = 1.3 * 0.5 / (0.3 * 0.5 + 1)
    _, got = ref_avs(cases)
    assert got["per_sample"] == [pytest.approx(v) for v in (1, 0.5, 0, 0, 0.5, 1, 0, 0, 0)]
    assert got["n_unparsable"] == 2
    assert got["metrics"] == {k: pytest.approx(v) for k, v in {
        "J": 3 / 9, "J_seen": 1.5 / 4, "F_seen": (1 + f) / 4, "J_unseen": 0.5, "F_unseen": f, "S_null": (0 + 1 + 0.5 + 1) / 4,
        "J_seen_answered": 1.5 / 3, "F_seen_answered": (1 + f) / 3, "J_unseen_answered": 0.5, "F_unseen_answered": f,
        "S_null_answered": (0 + 1 + 0.5) / 3, "no_mask": 2,
    }.items()}


def test_ref_avs_where_no_mask_can_be_made():
    prompt = tasks.answer("ref_avs", HALF)
    masks = MASKS._replace(segment=lambda *a: None)
    _, got = ref_avs([("test_s", HALF, prompt), ("test_n", tasks.NULL, prompt)], masks)
    assert got["per_sample"] == [0, 0] and got["n_unparsable"] == 0
    assert got["metrics"] == {"J": 0, "J_seen": 0, "F_seen": 0, "S_null": 1, "J_seen_answered": 0, "F_seen_answered": 0,
                              "S_null_answered": 1, "no_mask": 2}
    with pytest.raises(ValueError, match="masks="):
        ref_avs([("test_s", HALF, prompt)], None)


def test_ref_avs_a_thing_out_of_view_in_this_frame_is_an_empty_mask():
    masks = MASKS._replace(truth=lambda r: np.zeros((224, 224), bool))
    _, got = ref_avs([("test_s", HALF, FALSE), ("test_s", HALF, tasks.answer("ref_avs", HALF))], masks)
    assert got["per_sample"] == [1, 0]


@pytest.mark.parametrize("text", [
    "", TRUE, "[16,24,80,88] [40,48] [48,56] [56,64]", f"{FALSE} [16,24,80,88] [40,48] [48,56] [56,64]", f"{FALSE} [", f"{TRUE}{FALSE}",
    f"{TRUE} [16,24,80,88] [40,48] [48,56]", f"{TRUE} [80,24,16,88] [40,48] [48,56] [56,64]",
    f"{TRUE} [16,24,80,88] [40,48] [48,56] [56,225]", "<answer>maybe</answer> [16,24,80,88] [40,48] [48,56] [56,64]",
    "<answer>[16,24,80,88] [40,48] [48,56] [56,64]</answer>", "false",
])
def test_ref_avs_malformed(text):
    assert tasks.parse("ref_avs", text) is None


def test_ref_avs_reads_the_published_prose_and_other_words_for_the_same():
    text = "<answer>True</answer>, it is a bell . its box is [16,24,80,88], its points are [40,48],[48,56],[56,64]."
    want = ((16, 24, 80, 88), ((40, 48), (48, 56), (56, 64)))
    assert tasks.parse("ref_avs", text) == tasks.parse("ref_avs", text.replace("True", "yes")) == want
    for word in "false", "No", " FALSE ":
        assert tasks.parse("ref_avs", f"<answer>{word}</answer>, it is not there.") == tasks.NULL
    assert tasks.target("ref_avs", {"output": text}, "bare") == "<answer>True</answer> [16,24,80,88] [40,48] [48,56] [56,64]"


@pytest.mark.parametrize(("nulls", "want"), [(1, 1 / 2), (3, 3 / 4)])
def test_ref_avs_chance_is_the_better_of_null_and_a_constant_box(nulls, want):
    # one thing that fills its constant box beside as many nulls: either constant is right on its own kind only
    records, _ = ref_avs([("test_u", HALF, FALSE)] + [("test_n", tasks.NULL, FALSE)] * nulls)
    assert tasks.chance("ref_avs", records, masks=MASKS) == pytest.approx(want)
    assert tasks.chance("ref_avs", records[:1], masks=MASKS) == 1
    assert tasks.chance("ref_avs", records[1:], masks=MASKS) == 1


# --- labels

def test_avqa_accuracy_by_modality_and_type(records_of):
    got = tasks.score("avqa", records_of("avqa"), ["<answer> YES </answer>", "<answer>one</answer>", "<answer>yes</answer>"])
    assert got["metrics"] == {
        "accuracy": pytest.approx(2 / 3), "accuracy/audio": 1.0, "accuracy/audio/counting": 1.0,
        "accuracy/audio-visual": 0.5, "accuracy/audio-visual/counting": 1.0, "accuracy/audio-visual/location": 0.0,
    }
    assert tasks.chance("avqa", records_of("avqa")) == pytest.approx(2 / 3)


@pytest.mark.parametrize("slot", ["cremad", "ks", "ucf", "a2v", "v2a"])
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
    for slot in "a2v", "avqa", "avqa_thu", "ks", "ucf", "cremad", "meld", "mer24", "mafw", "dfew", "ref_avs":
        assert tasks.parse(slot, text) is None


def test_matching_reads_numbers_and_words():
    for text, choice in (("1", "one"), ("first", "one"), ("two", "two"), ("Second", "two"), ("three", "three")):
        assert tasks.parse("a2v", f"<answer>{text}</answer>") == choice


# --- AVQA

def test_avqa_thu_by_hand(records_of):
    records = records_of("avqa_thu")  # the truth is a place, the words of a choice, a place written as text
    assert [tasks.truth("avqa_thu", r) for r in records] == ["bell", "car horn", "bell"]
    got = tasks.score("avqa_thu", records, ["<answer>BELL</answer>", "<answer>horn</answer>", "<answer>2</answer>"])
    assert got["per_sample"] == [1, 0, 0] and got["n_unparsable"] == 0  # a place is no answer: the words are
    assert got["metrics"] == {
        "accuracy": pytest.approx(1 / 3), "accuracy/relation/sound": 0.5, "accuracy/relation/both": 0,
        "accuracy/type/which": 0.5, "accuracy/type/come from": 0,
    }


def test_avqa_thu_a_choice_that_is_a_number_is_meant_as_words(records_of):
    record = records_of("avqa_thu")[0] | {"multi_choice": ["2", "1", "0", "three"]}
    assert tasks.truth("avqa_thu", record | {"answer": "0"}) == "0"
    assert tasks.truth("avqa_thu", record | {"answer": 0}) == "2"


def test_avqa_thu_chance_is_the_best_constant_place_or_words(records_of):
    record = records_of("avqa_thu")[0]
    places = [record | {"multi_choice": list(words), "answer": 1} for words in ("abcd", "efgh", "ijkl")]
    assert tasks.chance("avqa_thu", places) == 1  # always the second
    words = [record | {"multi_choice": list(w), "answer": "a"} for w in ("abcd", "bacd", "bcad", "bcda")]
    assert tasks.chance("avqa_thu", words) == 1  # always "a"
    mixed = [record | {"multi_choice": list(w), "answer": a} for w, a in (("abcd", 0), ("abcd", 1), ("abcd", 2), ("bcda", 0))]
    assert tasks.chance("avqa_thu", mixed) == 0.5


# --- emotion

def test_meld_by_hand():
    # neutral: 3 true, 2 said, 2 right: F = 4/5; joy: 1 true, 2 said, 1 right: F = 2/3; sadness: 1 true, none said: F = 0
    truths = ["neutral", "neutral", "neutral", "joy", "sadness"]
    texts = [f"<answer>{e}</answer>" for e in ("neutral", "Neutral", "joy", "joy")] + ["i see nothing ."]
    got = run("meld", truths, texts)
    assert got["metrics"] == {"weighted_f1": pytest.approx((3 * 4 / 5 + 2 / 3) / 5), "accuracy": 3 / 5}
    assert got["per_sample"] == [pytest.approx(v) for v in (6 / 5, 6 / 5, 0, 2 / 3, 0)]
    assert got["primary"] == got["metrics"]["weighted_f1"] == pytest.approx(np.mean(got["per_sample"]))
    assert got["n_unparsable"] == 1
    # always neutral: 3 true, 5 said: F = 6/8 for 3 of 5 samples
    records = [make_record("meld", i, "", t) for i, t in enumerate(truths)]
    assert tasks.chance("meld", records) == pytest.approx(3 / 5 * 6 / 8)


@pytest.mark.parametrize("slot", ["mafw", "dfew"])
def test_war_and_uar_by_hand(slot):
    truths = ["sad"] * 3 + ["fear"]
    got = run(slot, truths, ["<answer>sad</answer>"] * 4)
    assert got["metrics"] == {"WAR": 3 / 4, "UAR": 1 / 2} and got["per_sample"] == [1, 1, 1, 0]
    got = run(slot, truths, ["<answer>sad</answer>", "<answer>joy</answer>", "sad", "<answer>fear</answer>"])
    assert got["metrics"] == {"WAR": 1 / 2, "UAR": pytest.approx((1 / 3 + 1) / 2)} and got["n_unparsable"] == 1
    assert tasks.chance(slot, [make_record(slot, i, "", t) for i, t in enumerate(truths)]) == 3 / 4


feelings = st.sampled_from(["neutral", "joy", "anger", "fear"])


@fast
@given(st.lists(st.tuples(feelings, st.one_of(feelings, st.sampled_from(["klingon", None]))), min_size=1, max_size=12))
def test_emotions_against_scikit_learn(cases):
    truths, said = [t for t, _ in cases], [a or "unread" for _, a in cases]
    texts = ["what ?" if a is None else f"<answer>{a}</answer>" for _, a in cases]
    got = {slot: run(slot, truths, texts) for slot in ("meld", "mafw")}
    meld, mafw = got["meld"]["metrics"], got["mafw"]["metrics"]
    assert meld["weighted_f1"] == pytest.approx(known.f1_score(truths, said, average="weighted", zero_division=0))
    assert meld["accuracy"] == mafw["WAR"] == pytest.approx(known.accuracy_score(truths, said))
    assert mafw["UAR"] == pytest.approx(known.recall_score(truths, said, labels=sorted(set(truths)), average="macro", zero_division=0))
    for result in got.values():
        assert result["primary"] == pytest.approx(np.mean(result["per_sample"]))
        assert [v > 0 for v in result["per_sample"]] == [t == a for t, a in cases]
    assert max(got["meld"]["per_sample"]) < 2


def test_resampled_shares_of_weighted_f1_spread_like_the_metric_itself():
    rng = np.random.default_rng(0)
    truths = rng.choice(list("nnnnnjsaf"), size=200)
    said = np.where(rng.random(200) < 0.6, truths, "n")
    shares = np.array(run("meld", truths.tolist(), [f"<answer>{a}</answer>" for a in said])["per_sample"])
    draws = rng.integers(200, size=(400, 200))
    metric = [known.f1_score(truths[d], said[d], average="weighted", zero_division=0) for d in draws]
    assert shares[draws].mean(1).std() == pytest.approx(np.std(metric), rel=0.15)
    assert shares[draws].mean() == pytest.approx(np.mean(metric), abs=0.01)
