"""Transfer against hand-worked cases and closed forms."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from crab.study import compare, transfer

SINGLE, JOINT = "single-lora-bare", "joint-ilora-bare"


def frame(family, slot, scores, seed=0):
    return pd.DataFrame(
        {"run": family, "family": family, "seed": seed, "slot": slot,
         "id": [f"{slot}/{i:03d}" for i in range(len(scores))], "score": scores}  # fmt: skip
    )


def ones(n, of=100):
    return np.repeat([1.0, 0.0], [n, of - n])


SAMPLES = pd.concat(
    [
        frame(SINGLE, "a", ones(50)), frame(JOINT, "a", ones(80)),  # gain of .30
        frame(SINGLE, "b", ones(60)), frame(JOINT, "b", ones(45)),  # loss of .15
        frame(SINGLE, "c", ones(50)), frame(JOINT, "c", ones(51)),  # tie
        frame(SINGLE, "d", ones(21)), frame(JOINT, "d", ones(27)),  # both at chance: no verdict counted
    ]
)  # fmt: skip
CHANCE = pd.Series({"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25})


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
    more = [frame(SINGLE, "e", ones(50)), frame(JOINT, "e", ones(53)), frame(SINGLE, "f", ones(50)), frame(JOINT, "f", ones(52))]
    _, summary = compare.compare(pd.concat([SAMPLES, *more]), CHANCE.reindex([*"abcdef"], fill_value=0.25), SINGLE, JOINT)
    assert (summary["gain"], summary["loss"], summary["tie"]) == (2, 1, 2)
    assert (summary["clear_gain"], summary["clear_loss"]) == (1, 1)


def test_single_training_decides_what_is_at_chance():
    """So that every joint run is judged on the same slots; what only joint training learns is counted apart."""
    learned = pd.concat([frame(SINGLE, "d", ones(21)), frame(JOINT, "d", ones(80)), frame(SINGLE, "a", ones(50)), frame(JOINT, "a", ones(20))])
    table, summary = compare.compare(learned, CHANCE, SINGLE, JOINT)
    assert table.set_index("slot")["at_chance"].to_dict() == {"d": True, "a": False}
    assert (summary["slots_counted"], summary["at_chance"], summary["learned_only_jointly"]) == (1, ["d"], ["d"])
    assert (summary["gain"], summary["loss"]) == (0, 1)


def test_pairing_narrows_the_interval():
    """The same scores on the same samples differ by nothing at all, though each run alone is uncertain."""
    same = pd.concat([frame(SINGLE, "a", ones(50)), frame(JOINT, "a", ones(50))])
    table, _ = compare.compare(same, CHANCE, SINGLE, JOINT)
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
    tail = [sum(math.comb(16, k) * p**k * (1 - p) ** (16 - k) for k in ks) for p, ks in ((low, range(14, 17)), (high, range(15)))]
    assert share == 14 / 16 and tail == pytest.approx([0.025, 0.025])


def test_rows_are_corrected_together(tmp_path):
    """Six gains of six: 2 / 64. A second row of one gain only: p = 1. Holm doubles the first."""
    slots = [*"abcdef"]
    parts = [frame(SINGLE, s, ones(50)) for s in slots]
    parts += [frame(JOINT, s, ones(80)) for s in slots]
    parts += [frame("joint-lora-bare", s, ones(80 if s == "a" else 50)) for s in slots]
    scores = pd.DataFrame({"slot": slots, "primary": True, "chance": 0.25})
    (_, summary), _, _ = transfer.transfer(pd.concat(parts), scores, tmp_path)
    assert summary[JOINT]["sign_test_p"] == pytest.approx(2 / 64)
    assert summary[JOINT]["sign_test_holm"] == pytest.approx(4 / 64)
    assert summary["joint-lora-bare"]["sign_test_holm"] == 1


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
    two = pd.concat([part, frame(SINGLE, "a", ones(30), 1), frame(JOINT, "a", ones(90), 1)])
    table, summary = compare.compare(two, CHANCE, SINGLE, JOINT, resamples=20_000)
    row = table.iloc[0]
    assert (row["seeds"], row["baseline"], row["joint"]) == (2, pytest.approx(0.4), pytest.approx(0.85))
    assert summary["seeds"] == 2
    # the seeds gain .3 and .6: a standard error of .15 and one degree of freedom, +- 12.7 of them
    assert row["low"] == pytest.approx(0.45 - 12.7 * 0.15, rel=0.15) and row["high"] == pytest.approx(0.45 + 12.7 * 0.15, rel=0.15)


def planted(rng, effect, of_seed, slots=6, seeds=3, samples=40):
    """Scores where joint training adds ``effect`` everywhere, and each joint run has a share in all its slots."""
    joint_seed = rng.normal(0, of_seed, seeds)
    parts = []
    for slot in range(slots):
        hard = rng.normal(0.5, 0.2, samples)
        for family, gain in ((SINGLE, 0.0), (JOINT, effect)):
            for k in range(seeds):
                scores = hard + gain + rng.normal(0, 0.1, samples) + (joint_seed[k] if family == JOINT else rng.normal(0, of_seed))
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
    parts = [frame(f, s, np.full(5, 0.4 + g), k) for s in "abcd" for k, gain in enumerate((0.1, 0.2, 0.3)) for f, g in ((SINGLE, 0), (JOINT, gain))]
    table, summary = compare.compare(pd.concat(parts), CHANCE, SINGLE, JOINT)
    assert summary["mean_difference_interval"] == pytest.approx(table.loc[0, ["low", "high"]].tolist())
    assert table.loc[0, "low"] < -0.02 and table.loc[0, "high"] > 0.42 and summary["clear_gain"] == 0


def test_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="a: the runs compared hold different samples or seeds .100 and 90 samples"):
        compare.compare(pd.concat([frame(SINGLE, "a", ones(5)), frame(JOINT, "a", ones(5, 90))]), CHANCE, SINGLE, JOINT)
    with pytest.raises(ValueError, match="joint-ilora-bare on a"):
        compare.compare(frame(SINGLE, "a", ones(5)), CHANCE, SINGLE, JOINT)
    with pytest.raises(ValueError, match="no scores of the baseline"):
        compare.compare(SAMPLES, CHANCE, "single-ilora-bare", JOINT)
    with pytest.raises(ValueError, match="no joint run among"):
        transfer.transfer(SAMPLES[SAMPLES["family"] == SINGLE], pd.DataFrame({"slot": [], "primary": [], "chance": []}), "unused")


def test_all_at_chance_gives_no_rate(tmp_path):
    part = SAMPLES[SAMPLES["slot"] == "d"]
    scores = pd.DataFrame({"slot": ["d"], "primary": [True], "chance": [0.25]})
    (_, summary), (beside, against), (forms, _) = transfer.transfer(part, scores, tmp_path)
    assert summary[JOINT]["positive_rate"] is None and summary[JOINT]["slots_at_chance"] == 1
    assert json.loads((tmp_path / "metrics.json").read_text())["baseline"] == SINGLE
    assert len(pd.read_csv(tmp_path / "transfer.csv")) == 1 and len(beside) == len(against) == len(forms) == 0
    assert "cannot be judged" in transfer.finding(summary, against, JOINT, JOINT)
    assert transfer.summary_table(summary).loc[JOINT, "gains"] == "none above chance"


def test_rival_of_the_same_form_is_judged_on_the_slots_of_the_baseline(tmp_path):
    rival = "joint-lora_matched-bare"
    parts = pd.concat([SAMPLES, *(frame(rival, s, ones(n)) for s, n in zip("abcd", (70, 70, 50, 90)))])
    scores = pd.DataFrame({"slot": [*"abcd"], "primary": True, "chance": 0.25})
    _, (beside, against), _ = transfer.transfer(parts, scores, tmp_path)
    assert list(against) == [JOINT] and set(beside["comparison"]) == {f"{JOINT} vs {rival}"}
    assert np.allclose(beside["difference"], [0.10, -0.25, 0.01, -0.63])
    assert (against[JOINT]["slots_counted"], against[JOINT]["at_chance"]) == (3, ["d"])


def test_explicit_answers_are_held_against_bare_ones_of_the_same_runs_on_the_slots_of_the_baseline(tmp_path):
    explicit = "joint-ilora-explicit"
    parts = pd.concat([SAMPLES, *(frame(explicit, s, ones(n)) for s, n in zip("abcd", (70, 70, 50, 90)))])
    scores = pd.DataFrame({"slot": [*"abcd"], "primary": True, "chance": 0.25})
    _, _, (forms, found) = transfer.transfer(parts, scores, tmp_path)
    assert list(found) == [explicit] and set(forms["comparison"]) == {f"{explicit} vs {JOINT}"}
    assert np.allclose(forms["difference"], [-0.10, 0.25, -0.01, 0.63])
    assert (found[explicit]["gain"], found[explicit]["tie"], found[explicit]["loss"], found[explicit]["at_chance"]) == (1, 1, 1, ["d"])
    assert json.loads((tmp_path / "metrics.json").read_text())["explicit_against_bare"] == found
    assert len(pd.read_csv(tmp_path / "forms.csv")) == 4


def test_a_rival_that_is_no_method_is_refused(tmp_path):
    scores = pd.DataFrame({"slot": [*"abcd"], "primary": True, "chance": 0.25})
    with pytest.raises(ValueError, match="transfer.rival: 'lora_match' is no method; choose one of lora, lora_unrouted, lora_matched, ilora"):
        transfer.transfer(SAMPLES, scores, tmp_path, rival="lora_match")


def values(gain, loss, low, high):
    return {"gain": gain, "loss": loss, "slots_counted": 16, "positive_rate": gain / 16, "positive_rate_interval": [0.1, 0.9],
            "negative_rate": loss / 16, "negative_rate_interval": [0.1, 0.9], "mean_difference": (low + high) / 2,
            "mean_difference_interval": [low, high]}  # fmt: skip


def test_finding_comes_out_either_way():
    plain, routed = "joint-lora-bare", "joint-ilora-explicit"
    good = transfer.finding({plain: values(2, 9, -0.2, -0.1), routed: values(14, 1, 0.1, 0.2)}, {routed: values(12, 2, 0.01, 0.03)})
    assert "`joint-lora-bare` loses on 9 of 16 slots" in good and "56 %" in good and "a loss overall" in good
    assert "`joint-ilora-explicit` gains on 14 of 16" in good and "a gain overall" in good and "in its favour" in good
    bad = transfer.finding({plain: values(8, 1, 0.1, 0.2), routed: values(3, 9, -0.2, -0.1)}, {routed: values(2, 9, -0.1, -0.05)})
    assert "loses on 1 of 16" in bad and "gains on 3 of 16" in bad and "a loss overall" in bad and "against it" in bad
    assert "no clear difference" in transfer.finding({plain: values(5, 5, -0.1, 0.1)}, {}) and "was not run" in transfer.finding({}, {})
    assert good.count(". ") == 1  # two sentences


def test_finding_says_what_both_forms_do_against_the_rival():
    """The form that was not asked for may be the one that is clear."""
    bare, explicit = "joint-ilora-bare", "joint-ilora-explicit"
    said = transfer.finding({explicit: values(14, 1, 0.1, 0.2)}, {bare: values(0, 5, -0.05, -0.01), explicit: values(2, 2, -0.03, 0.01)})
    assert "of its size that of `joint-ilora-explicit` is -0.010 [-0.030, +0.010], which favours neither" in said
    assert ", and that of `joint-ilora-bare` is -0.030 [-0.050, -0.010], against it." in said
    assert transfer.finding({}, {bare: values(0, 5, -0.05, -0.01)}, routed=bare).count("joint-ilora-bare") == 2
