"""Transfer against hand-worked cases and closed forms."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from crab.study import transfer

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
    table, summary = transfer.compare(SAMPLES, CHANCE, SINGLE, JOINT, margin=0.02)
    assert table["verdict"].tolist() == ["gain", "loss", "tie", "gain"]
    assert table["at_chance"].tolist() == [False, False, False, True]
    assert np.allclose(table["difference"], [0.30, -0.15, 0.01, 0.06])
    assert (summary["slots"], summary["slots_counted"], summary["at_chance"]) == (4, 3, ["d"])
    assert summary["positive_rate"] == summary["negative_rate"] == pytest.approx(1 / 3)
    assert summary["mean_difference"] == pytest.approx((0.30 - 0.15 + 0.01) / 3)
    assert summary["mean_relative_change"] == pytest.approx((0.30 / 0.5 - 0.15 / 0.6 + 0.01 / 0.5) / 3)
    assert summary["sign_test_p"] == 1.0


def test_paired_interval_agrees_with_the_normal_one():
    table, _ = transfer.compare(SAMPLES, CHANCE, SINGLE, JOINT, resamples=4000)
    row = table.iloc[0]  # the differences are 30 ones and 70 zeros
    error = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert row["low"] == pytest.approx(0.3 - error, abs=0.015)
    assert row["high"] == pytest.approx(0.3 + error, abs=0.015)


def test_pairing_narrows_the_interval():
    """The same scores on the same samples differ by nothing at all, though each run alone is uncertain."""
    same = pd.concat([frame(SINGLE, "a", ones(50)), frame(JOINT, "a", ones(50))])
    table, _ = transfer.compare(same, CHANCE, SINGLE, JOINT)
    assert table.loc[0, ["difference", "low", "high"]].tolist() == [0, 0, 0]
    assert table.loc[0, "verdict"] == "tie"


def test_margin_itself_is_a_tie():
    assert [transfer.verdict(d, 0.25) for d in (0.25, -0.25, 0.26, -0.26)] == ["tie", "tie", "gain", "loss"]


@pytest.mark.parametrize(("gains", "losses", "p"), [(0, 0, 1), (5, 0, 2 / 32), (4, 1, 2 * 6 / 32), (2, 2, 1)])
def test_sign_test(gains, losses, p):
    assert transfer.sign_test(gains, losses) == pytest.approx(p)


def test_seeds_are_averaged():
    two = pd.concat([SAMPLES, frame(SINGLE, "a", ones(30), 1), frame(JOINT, "a", ones(90), 1)])
    table, _ = transfer.compare(two, CHANCE, SINGLE, JOINT)
    row = table.iloc[0]
    assert (row["seeds"], row["single"], row["joint"]) == (2, pytest.approx(0.4), pytest.approx(0.85))
    assert row["low"] <= 0.3 + 0.1 and row["high"] >= 0.6 - 0.1  # seeds are drawn again too


def test_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="different samples or seeds"):
        transfer.compare(pd.concat([frame(SINGLE, "a", ones(5)), frame(JOINT, "a", ones(5, 90))]), CHANCE, SINGLE, JOINT)
    with pytest.raises(ValueError, match="joint-ilora-bare on a"):
        transfer.compare(frame(SINGLE, "a", ones(5)), CHANCE, SINGLE, JOINT)
    with pytest.raises(ValueError, match="no scores of the baseline"):
        transfer.compare(SAMPLES, CHANCE, "single-ilora-bare", JOINT)


def test_all_at_chance_gives_no_rate(tmp_path):
    part = SAMPLES[SAMPLES["slot"] == "d"]
    scores = pd.DataFrame({"slot": ["d"], "primary": [True], "chance": [0.25]})
    _, summary = transfer.transfer(part, scores, tmp_path)
    assert summary[JOINT]["positive_rate"] is None and summary[JOINT]["slots_at_chance"] == 1
    assert json.loads((tmp_path / "metrics.json").read_text())["baseline"] == SINGLE
    assert len(pd.read_csv(tmp_path / "transfer.csv")) == 1
