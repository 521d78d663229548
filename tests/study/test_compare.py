"""Comparisons against hand-worked cases and closed forms, and intervals by what they promise: their coverage."""

import math

import numpy as np
import pandas as pd
import pytest

from crab.study import compare
from crab.study.compare import bootstrap_means, interval

SINGLE, JOINT = "single-lora-bare", "joint-ilora-bare"


def frame(family, slot, scores, seed=0):
    ids = [f"{slot}/{i:03d}" for i in range(len(scores))]
    return pd.DataFrame({"family": family, "seed": seed, "slot": slot, "id": ids, "score": scores})


def ones(n, of=100):
    return np.repeat([1.0, 0.0], [n, of - n])


def right(seed=0, **slots):
    """Scores of both families: by slot, how many of 100 samples single-task and joint training get right."""
    runs = [(slot, family, n) for slot, pair in slots.items() for family, n in zip((SINGLE, JOINT), pair, strict=True)]
    return pd.concat([frame(family, slot, ones(n), seed) for slot, family, n in runs])


#: A gain of .30, a loss of .15, a tie, and a slot where both are at chance: no verdict is counted.
SAMPLES = right(a=(50, 80), b=(60, 45), c=(50, 51), d=(21, 27))
CHANCE = pd.Series(dict.fromkeys("abcdef", 0.25))


def test_hand_worked():
    table, summary = compare.compare(SAMPLES, CHANCE, SINGLE, JOINT, margin=0.02)
    assert table["verdict"].tolist() == ["gain", "loss", "tie", "gain"]
    assert table["at_chance"].tolist() == [False, False, False, True]
    assert np.allclose(table["difference"], [0.30, -0.15, 0.01, 0.06])
    assert (summary["slots"], summary["slots_counted"], summary["at_chance"]) == (4, 3, ["d"])
    assert summary["positive_rate"] == summary["negative_rate"] == pytest.approx(1 / 3)
    assert summary["mean_difference"] == pytest.approx((0.30 - 0.15 + 0.01) / 3)
    assert summary["mean_relative_change"] == pytest.approx((0.30 / 0.5 - 0.15 / 0.6 + 0.01 / 0.5) / 3)
    assert summary["sign_test_p"] == 1.0


def test_paired_interval_agrees_with_the_normal_one():
    table, _ = compare.compare(SAMPLES, CHANCE, SINGLE, JOINT, resamples=4000)
    row = table.iloc[0]  # the differences are 30 ones and 70 zeros
    error = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert row["low"] == pytest.approx(0.3 - error, abs=0.015)
    assert row["high"] == pytest.approx(0.3 + error, abs=0.015)


def test_clear_ones_are_verdicts_whose_interval_leaves_out_zero():
    """Of 100 samples .30 up and .15 down (no sample both ways) are clear; a .03 up and a tie of .02 are not."""
    samples = pd.concat([SAMPLES, right(e=(50, 53), f=(50, 52))])
    _, summary = compare.compare(samples, CHANCE, SINGLE, JOINT)
    assert (summary["gain"], summary["loss"], summary["tie"]) == (2, 1, 2)
    assert (summary["clear_gain"], summary["clear_loss"]) == (1, 1)


def test_single_training_decides_what_is_at_chance():
    """So that every joint run is judged on the same slots; what only joint training learns is counted apart."""
    table, summary = compare.compare(right(d=(21, 80), a=(50, 20)), CHANCE, SINGLE, JOINT)
    assert table.set_index("slot")["at_chance"].to_dict() == {"d": True, "a": False}
    assert (summary["slots_counted"], summary["at_chance"], summary["learned_only_jointly"]) == (1, ["d"], ["d"])
    assert (summary["gain"], summary["loss"]) == (0, 1)


def test_pairing_narrows_the_interval():
    """The same scores on the same samples differ by nothing at all, though each run alone is uncertain."""
    table, _ = compare.compare(right(a=(50, 50)), CHANCE, SINGLE, JOINT)
    assert table.loc[0, ["difference", "low", "high"]].tolist() == [0, 0, 0]
    assert table.loc[0, "verdict"] == "tie"


def test_margin_itself_is_a_tie():
    assert [compare.verdict(d, 0.25) for d in (0.25, -0.25, 0.26, -0.26)] == ["tie", "tie", "gain", "loss"]
    assert [compare.verdict(d, 0.02) for d in (0.52 - 0.50, 0.50 - 0.52, 0.53 - 0.50)] == ["tie", "tie", "gain"]


@pytest.mark.parametrize(("gains", "losses", "p"), [(0, 0, 1), (5, 0, 2 / 32), (4, 1, 2 * 6 / 32), (2, 2, 1)])
def test_sign_test(gains, losses, p):
    assert compare.sign_test(gains, losses) == pytest.approx(p)


@pytest.mark.parametrize(
    ("p", "corrected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 * .01; 2 * .03; 1 * .04, but not below the one before
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm(p, corrected):
    assert compare.holm(p) == pytest.approx(corrected)


def test_rate_by_hand():
    """Clopper and Pearson's bounds at the ends solve p^n = .025."""
    assert compare.rate(0, 10) == pytest.approx((0, 0, 1 - 0.025**0.1))
    assert compare.rate(10, 10) == pytest.approx((1, 0.025**0.1, 1))
    share, low, high = compare.rate(14, 16)
    tail = [
        sum(math.comb(16, k) * p**k * (1 - p) ** (16 - k) for k in ks)
        for p, ks in ((low, range(14, 17)), (high, range(15)))
    ]
    assert share == 14 / 16 and tail == pytest.approx([0.025, 0.025])


def test_rows_are_corrected_together():
    """Six gains of six: p = 2 / 64. A second row of one gain only: p = 1. Holm doubles the first."""
    slots = [*"abcdef"]
    parts = [right(**dict.fromkeys(slots, (50, 80))), *(frame("other", s, ones(80 if s == "a" else 50)) for s in slots)]
    pairs = {JOINT: SINGLE, "other": SINGLE}
    table, summaries = compare.judge(pd.concat(parts), dict.fromkeys(slots, 0.25), pairs, SINGLE, 0.02, 500)
    assert summaries[JOINT]["sign_test_p"] == pytest.approx(2 / 64)
    assert summaries[JOINT]["sign_test_holm"] == pytest.approx(4 / 64)
    assert summaries["other"]["sign_test_holm"] == 1 and len(table) == 12


def test_relative_change_by_hand():
    """.5 -> .8 and .6 -> .45: +60 % and -25 %. For one slot the first-order interval is that of J - 1.6 S over .5."""
    part = SAMPLES[SAMPLES["slot"].isin(["a", "b"])]
    _, summary = compare.compare(part, CHANCE, SINGLE, JOINT)
    assert summary["mean_relative_change"] == pytest.approx((0.6 - 0.25) / 2)
    _, summary = compare.compare(SAMPLES[SAMPLES["slot"] == "a"], CHANCE, SINGLE, JOINT, resamples=8000)
    error = 1.96 * np.std([1 - 1.6] * 50 + [1] * 30 + [0] * 20) / math.sqrt(100) / 0.5
    assert summary["mean_relative_change_interval"] == pytest.approx([0.6 - error, 0.6 + error], abs=0.02)


def test_seeds_are_averaged():
    part = SAMPLES[SAMPLES["slot"] == "a"]
    two = pd.concat([part, right(1, a=(30, 90))])
    table, summary = compare.compare(two, CHANCE, SINGLE, JOINT, resamples=20_000)
    row = table.iloc[0]
    assert (row["seeds"], row["baseline"], row["joint"]) == (2, pytest.approx(0.4), pytest.approx(0.85))
    assert summary["seeds"] == 2
    # the seeds gain .3 and .6: a standard error of .15 and one degree of freedom, +- 12.7 of them
    assert row[["low", "high"]].tolist() == pytest.approx([0.45 - 12.7 * 0.15, 0.45 + 12.7 * 0.15], rel=0.15)


def planted(rng, effect, of_seed, slots=6, seeds=3, samples=40):
    """Scores where joint training adds ``effect`` everywhere, and each joint run has a share in all its slots."""
    joint_seed = rng.normal(0, of_seed, seeds)
    parts = []
    for slot in range(slots):
        hard = rng.normal(0.5, 0.2, samples)
        for family, gain in ((SINGLE, 0.0), (JOINT, effect)):
            for k in range(seeds):
                scores = hard + gain + rng.normal(0, 0.1, samples)
                scores = scores + (joint_seed[k] if family == JOINT else rng.normal(0, of_seed))
                parts.append(frame(family, str(slot), scores, k))
    return pd.concat(parts)


def test_planted_effect_is_found_and_none_is_not_invented():
    rng = np.random.default_rng(0)
    chance = pd.Series(-5.0, index=[str(s) for s in range(6)])
    _, summary = compare.compare(planted(rng, 0.2, 0.01), chance, SINGLE, JOINT)
    low, high = summary["mean_difference_interval"]
    assert 0.1 < low < 0.2 < high < 0.3 and summary["clear_gain"] == 6
    _, summary = compare.compare(planted(rng, 0.0, 0.01), chance, SINGLE, JOINT, margin=0.1)
    assert summary["tie"] == 6


def test_seeds_of_a_joint_run_move_all_its_slots_together():
    """Three seeds that gain .1, .2 and .3 on every sample of four slots are three observations, not twelve."""
    parts = [
        frame(f, s, np.full(5, 0.4 + g), k)
        for s in "abcd"
        for k, gain in enumerate((0.1, 0.2, 0.3))
        for f, g in ((SINGLE, 0), (JOINT, gain))
    ]
    table, summary = compare.compare(pd.concat(parts), CHANCE, SINGLE, JOINT)
    assert summary["mean_difference_interval"] == pytest.approx(table.loc[0, ["low", "high"]].tolist())
    assert table.loc[0, "low"] < -0.02 and table.loc[0, "high"] > 0.42 and summary["clear_gain"] == 0


def test_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="a: the runs compared hold different samples or seeds .100 and 90 samples"):
        part = pd.concat([frame(SINGLE, "a", ones(5)), frame(JOINT, "a", ones(5, 90))])
        compare.compare(part, CHANCE, SINGLE, JOINT)
    with pytest.raises(ValueError, match="joint-ilora-bare on a"):
        compare.compare(frame(SINGLE, "a", ones(5)), CHANCE, SINGLE, JOINT)
    with pytest.raises(ValueError, match="no scores of the baseline"):
        compare.compare(SAMPLES, CHANCE, "single-ilora-bare", JOINT)


def test_all_at_chance_gives_no_rate():
    _, summaries = compare.judge(SAMPLES[SAMPLES["slot"] == "d"], CHANCE, {JOINT: SINGLE}, SINGLE, 0.02, 100)
    assert summaries[JOINT]["positive_rate"] is None and summaries[JOINT]["slots_at_chance"] == 1
    assert "sign_test_holm" not in summaries[JOINT]


def test_a_rival_is_judged_on_the_slots_of_the_floor_and_on_shared_seeds():
    """The rival has a second seed, which the floor lacks: it does not count."""
    parts = [frame("rival", s, ones(n)) for s, n in zip("abcd", (70, 70, 50, 90), strict=True)]
    parts += [frame("rival", s, ones(0), 1) for s in "abcd"]
    table, summaries = compare.judge(pd.concat([SAMPLES, *parts]), CHANCE, {JOINT: "rival"}, SINGLE, 0.02, 100)
    assert np.allclose(table["difference"], [0.10, -0.25, 0.01, -0.63]) and (table["seeds"] == 1).all()
    assert (summaries[JOINT]["slots_counted"], summaries[JOINT]["at_chance"]) == (3, ["d"])


def test_mean_scores_know_how_far_apart_seeds_lie():
    """Seeds score .5 and 1: Student's t with one degree of freedom is wider than all scores there are."""
    part = pd.concat([frame(JOINT, "a", ones(50)), frame(JOINT, "a", ones(100), 1), frame(JOINT, "b", ones(50))])
    table = compare.mean_scores(part, 4000).set_index("slot")
    assert table.loc["a", "score"] == 0.75 and table.loc["a", "low"] < 0 and table.loc["a", "high"] > 1
    error = 1.96 * 0.5 / math.sqrt(100)
    assert table.loc["b", ["low", "high"]].tolist() == pytest.approx([0.5 - error, 0.5 + error], abs=0.015)
    assert table[["seeds", "samples"]].to_numpy().tolist() == [[2, 100], [1, 100]]


# ---- intervals


def test_samples_agree_with_the_normal_interval():
    values = np.repeat([1.0, 0.0], [30, 70])
    low, high = interval(bootstrap_means(values, 4000, 0))
    error = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert (low, high) == (pytest.approx(0.3 - error, abs=0.015), pytest.approx(0.3 + error, abs=0.015))


def test_seeds_agree_with_students_interval():
    """Three seeds at .1, .2, .3, every sample alike: .2 +- 4.303 * .1 / sqrt(3), far beyond the range of the three."""
    values = np.repeat([[0.1], [0.2], [0.3]], 8, axis=1)
    low, high = interval(bootstrap_means(values, 60_000, 0))
    assert (low, high) == (pytest.approx(0.2 - 0.2484, abs=0.006), pytest.approx(0.2 + 0.2484, abs=0.006))


def test_draws_are_paired_within_a_stream():
    first, second = np.random.default_rng(0).normal(size=(2, 3, 20))
    draws = [bootstrap_means(v, 50, 7, "ks") for v in (first, second, second - first)]
    assert np.allclose(draws[1] - draws[0], draws[2])


def test_streams_share_seeds_and_not_samples():
    by_seed = np.repeat([[0.1], [0.4]], 5, axis=1)
    assert (bootstrap_means(by_seed, 50, 7, "ks") == bootstrap_means(by_seed, 50, 7, "ave")).all()
    by_sample = np.random.default_rng(0).normal(size=200)
    draws = [bootstrap_means(by_sample, 3000, 7, stream) for stream in ("ks", "ave")]
    assert abs(np.corrcoef(draws)[0, 1]) < 0.06


def test_nothing_to_draw_from():
    with pytest.raises(ValueError, match=r"expected non-empty \[samples\] or \[seeds, samples\], got \[1, 0\]"):
        bootstrap_means(np.empty(0), 10, 0)


def covered(seeds: int, of_seed: float, of_sample: float, of_both: float, trials: int = 500) -> float:
    """How often the interval holds the true mean 0 when scores are seed + sample + noise, all normal."""
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(trials):
        values = rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, of_sample, (1, 40))
        values = values + rng.normal(0, of_both, (seeds, 40))
        low, high = interval(bootstrap_means(values, 400, trial))
        hits += low <= 0 <= high
    return hits / trials


@pytest.mark.parametrize(
    ("seeds", "of_seed", "of_sample", "of_both"),
    [(1, 0, 1, 0), (3, 0, 1, 1), (3, 0.2, 1, 1), (3, 1, 0.1, 0.1), (5, 1, 1, 1)],
)
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, of_seed, of_sample, of_both):
    assert covered(seeds, of_seed, of_sample, of_both) >= 0.92


def test_intervals_are_not_merely_wide():
    assert covered(1, 0, 1, 0) <= 0.97 and covered(3, 1, 0.1, 0.1) <= 0.98


def test_mean_over_streams_holds_the_truth_though_they_share_seeds():
    """A joint run's seed moves all slots at once; drawn slot by slot it would seem to average out."""
    rng = np.random.default_rng(2)
    hits, apart = 0, 0
    for trial in range(300):
        shared = rng.normal(0, 0.3, (3, 1))
        slots = [shared + rng.normal(size=(3, 20)) for _ in range(4)]
        for together in (True, False):
            draws = np.mean(
                [bootstrap_means(v, 300, trial if together else trial + 1000 * k, str(k)) for k, v in enumerate(slots)],
                axis=0,
            )
            low, high = interval(draws)
            if together:
                hits += low <= 0 <= high
            else:
                apart += low <= 0 <= high
    assert hits / 300 >= 0.92 and apart < hits
