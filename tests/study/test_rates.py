"""The choice of a learning rate, with a stand-in for training whose best rate is known."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from crab.study import rates as module
from crab.study.cells import cells_of, families_of
from crab.study.rates import Grid, choose_rates, mean_over_slots, rate_beyond, rates_from_params

SLOTS = ("ave", "unav", "ks", "cremad")
TRIED = [1e-3, 2e-3, 4e-3]


class World:
    """Trains nothing: the score of a sample falls with the distance, in factors of two, from the family's best rate."""

    ledger = None

    def __init__(self, best, noise=0.0, flat=False):
        self.best, self.noise, self.flat, self.calls = best, noise, flat, []

    def run(self, cells, label):
        self.calls.append(list(cells))
        return cells

    def scores(self, ledger, cells):
        rows = []
        for cell in cells:
            off = abs(math.log2(cell.learning_rate / self.best[cell.family]))
            for slot in cell.scored_slots:
                draw = np.random.default_rng(len(slot))
                for i in range(cell.held_out):
                    score = 0.5 if self.flat else 1 / (1 + off) + self.noise * draw.standard_normal()
                    rows.append([cell.name, cell.family, cell.seed, slot, f"{slot}/train/{i:05d}", score])
        return pd.DataFrame(rows, columns=["cell", "family", "seed", "slot", "id", "score"])

    def tries(self, family):
        return sorted({c.learning_rate for call in self.calls for c in call if c.family == family})


@pytest.fixture
def go(monkeypatch):
    def run(world, families=("single", "joint"), **changes):
        monkeypatch.setattr(module, "sample_scores", world.scores)
        grid = Grid(**{"tried": TRIED, "extend": 2, "seeds": [0], "held_out": 5, **changes})

        def cells_at(family):
            return lambda rate, seeds, held_out, passes: cells_of(
                family, family, "lora", {"r": 4}, rate, SLOTS, passes or 3, seeds, held_out=held_out
            )

        return choose_rates({family: cells_at(family) for family in families}, grid, world, 50)

    return run


def test_planted_optimum_is_chosen_and_no_more_is_tried(go):
    world = World({"single": 2e-3, "joint": 2e-3})
    result = go(world)
    assert result.chosen == {"single": 2e-3, "joint": 2e-3}
    assert len(world.calls) == 1 and result.inside("single") is True


@pytest.mark.parametrize(
    ("best", "tried", "rate", "inside"),
    [
        (8e-3, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3], 8e-3, True),
        (4e-3, [1e-3, 2e-3, 4e-3, 8e-3], 4e-3, True),  # one rate beyond shows that the best lies inside
        (1e-3, [0.5e-3, 1e-3, 2e-3, 4e-3], 1e-3, True),
        (1.0, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3], 16e-3, False),  # two extensions, and no more
        (1e-6, [0.25e-3, 0.5e-3, 1e-3, 2e-3, 4e-3], 0.25e-3, False),
    ],
)
def test_grid_is_extended_until_the_optimum_is_inside(go, best, tried, rate, inside):
    world = World({"single": 2e-3, "joint": best})
    result = go(world)
    assert world.tries("joint") == pytest.approx(tried) and world.tries("single") == TRIED
    assert result.chosen["joint"] == pytest.approx(rate) and result.inside("joint") is inside


def test_every_family_gets_the_same_tries_samples_and_seeds(go):
    families = ("joint", "single")
    world = World(dict.fromkeys(families, 2e-3))
    go(world, families, seeds=[0, 1])
    (cells,) = world.calls
    joint = [c for c in cells if c.family == "joint"]
    single = [c for c in cells if c.family == "single"]
    assert {(c.learning_rate, c.seed) for c in joint} == {(r, s) for r in TRIED for s in (0, 1)}
    assert sorted((c.learning_rate, c.seed, c.slots[0]) for c in single) == sorted(
        (r, s, slot)
        for r in TRIED
        for s in (0, 1)
        for slot in ("ave", "ks", "cremad")  # unav has no test split
    )
    assert {(c.passes, c.held_out) for c in cells} == {(3, 5)}


def test_a_single_rate_is_taken_as_it_is(go):
    world = World({})
    result = go(world, tried=[1e-4], held_out=0)
    assert result.chosen == {"single": 1e-4, "joint": 1e-4} and not world.calls
    assert result.points.empty and result.inside("joint") is None


def test_rates_of_params_are_taken_as_they_are():
    families = families_of({"lora": {"r": 4, "runs": ["single-bare", "joint-bare"]}})
    given = {"lora": {"single-bare": 4e-3, "joint-bare": 2e-3}}
    assert rates_from_params(given, families) == {"single-lora-bare": 4e-3, "joint-lora-bare": 2e-3}
    for change, message in (
        ({"lora": {"single-bare": 1e-3}}, "no rate of joint-lora-bare; add it"),
        ({"lora": {**given["lora"], "joint-long": 1}}, "joint-lora-long is not among the runs"),
        ({"lora": {**given["lora"], "joint-bare": 0}}, "joint-lora-bare has 0; give a number above 0"),
    ):
        with pytest.raises(ValueError, match=f"train.given_rates: {message}"):
            rates_from_params(change, families)


def test_score_is_the_mean_over_slots_of_the_mean_over_samples():
    scores = {"ave": [1, 1, 1, 0], "ks": [0, 0]}
    rows = [(s, 0, f"{s}{i}", v) for s, values in scores.items() for i, v in enumerate(values)]
    mean, draws = mean_over_slots(pd.DataFrame(rows, columns=["slot", "seed", "id", "score"]), 4000)
    assert mean == (0.75 + 0) / 2
    # Of four samples with one zero, the mean of draws is binomial(4, 3/4) / 4; ks adds nothing.
    assert draws.mean() == pytest.approx(0.375, abs=0.01)
    assert draws.std() == pytest.approx(math.sqrt(0.75 * 0.25 / 4) / 2, rel=0.05)


def test_the_effect_of_a_seed_on_all_slots_is_in_the_interval():
    """Two seeds score all of three slots .6 and .4. Seeds are drawn once for all slots, which cannot average it out."""
    rows = [
        (s, seed, f"{s}{i}", v) for s in ("ave", "ks", "ucf") for seed, v in enumerate((0.6, 0.4)) for i in range(4)
    ]
    _, draws = mean_over_slots(pd.DataFrame(rows, columns=["slot", "seed", "id", "score"]), 20000)
    low, high = np.quantile(draws, [0.025, 0.975])
    half = stats.t.ppf(0.975, 1) * np.std([0.6, 0.4], ddof=1) / math.sqrt(2)
    assert high - low == pytest.approx(2 * half, rel=0.1)


def test_lead_of_the_best_rate_is_paired(go):
    result = go(World({"single": 2e-3, "joint": 2e-3}, noise=0.3))
    part = result.points[result.points["family"] == "joint"].set_index("rate")
    # The noise is the same at each rate, so the paired difference is exact, however wide the intervals are.
    assert part.loc[1e-3, "behind"] == pytest.approx(0.5) and part.loc[1e-3, "behind_low"] == pytest.approx(0.5)
    assert part.loc[1e-3, "high"] - part.loc[1e-3, "low"] > 0.05
    flat = go(World({"single": 1, "joint": 1}, flat=True))
    assert flat.chosen["joint"] == pytest.approx(0.25e-3)  # of equal rates the lowest


def test_next_rate_by_hand():
    for scores, beyond in (((0.1, 0.3, 0.2), None), ((0.1, 0.3), 4e-3), ((0.4, 0.3), 5e-4), ((0.3, 0.3, 0.3), 5e-4)):
        assert rate_beyond({rate: (score, None) for rate, score in zip(TRIED, scores, strict=False)}) == beyond


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tried": []}, "rates.tried"),
        ({"tried": [1e-3, 1e-3]}, "rates.tried.*different numbers above 0"),
        ({"tried": [1e-3, -1.0]}, "rates.tried"),
        ({"tried": ["1e-3", 1e-2]}, "rates.tried"),
        ({"held_out": 0}, "held_out is 0 .* give at least 1 of each"),
        ({"seeds": []}, "give at least 1 of each"),
    ],
)
def test_bad_grids_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Grid(**{"tried": TRIED, "extend": 1, "seeds": [0], "held_out": 5, **change})


def test_passes_of_the_grid_replace_those_of_the_family(go, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "sample_scores", lambda ledger, cells: SimpleNamespace())
    monkeypatch.setattr(module, "mean_over_slots", lambda scores, resamples: (1.0, np.ones(resamples)))
    world = World({})
    world.run = lambda cells, label: seen.extend(cells) or cells

    def cells_at(rate, seeds, held_out, passes):
        return cells_of("f", "joint", "lora", {}, rate, SLOTS, passes, seeds, held_out=held_out)

    choose_rates({"f": cells_at}, Grid(TRIED, 0, [0], 5, passes=7), world, 10)
    assert {cell.passes for cell in seen} == {7}
