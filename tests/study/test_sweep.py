"""The choice of a learning rate, with a stand-in for training whose optimum is known."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from crab import tasks
from crab.study import sweep as module
from crab.study.runs import Run
from crab.study.sweep import headline, rate_beyond, sweep, sweep_table, swept_settings, write
from crab.study.train import learning_rates

SLOTS = ("ave", "unav", "ks", "cremad")
LORA = {"r": 4, "lora_alpha": 8, "runs": ["single-bare", "joint-bare", "joint-explicit"]}
RATES = [1e-3, 2e-3, 4e-3]


class World:
    """Trains nothing: a sample's score falls with the distance, in factors of two, from the setting's best rate."""

    def __init__(self, best, noise=0.0):
        self.best, self.noise, self.calls = best, noise, []

    def __call__(self, cells, *, label, **where):
        self.calls.append(list(cells))
        rows = []
        for cell in cells:
            off = abs(math.log2(cell.settings["learning_rate"] / self.best[f"{cell.run.setting}-{cell.run.form}"]))
            for slot in cell.scored_slots:
                draw = np.random.default_rng(len(slot))
                for i in range(cell.held_out):
                    score = 1 / (1 + off) + self.noise * draw.standard_normal()
                    rows.append([cell.name, cell.run.name, cell.run.family, cell.run.seed, slot, f"{slot}/train/{i:05d}", score])
        columns = ["cell", "run", "family", "seed", "slot", "id", "score"]
        return pd.DataFrame(rows, columns=columns), None

    def tries(self, setting):
        kind, _, form = setting.partition("-")
        return sorted({c.settings["learning_rate"] for call in self.calls for c in call if (c.run.setting, c.run.form) == (kind, form)})


def go(world, settings=LORA, method="lora", **changes):
    given = dict(rates=RATES, extend=2, forms=["bare"], seeds=[0], slots=SLOTS, passes=3, held_out=5, resamples=50)
    return sweep(method, settings, run=world, **given | changes)


def test_planted_optimum_is_found_and_no_more_is_tried():
    world = World({"single-bare": 2e-3, "joint-bare": 2e-3})
    found = go(world)
    assert found.rates == {"single-bare": 2e-3, "joint-bare": 2e-3, "joint-explicit": 2e-3}
    assert found.borrowed == {"joint-explicit": "joint-bare"}
    assert len(world.calls) == 1 and found.inside("single-bare")


@pytest.mark.parametrize(
    ("best", "tried", "rate", "inside"),
    [
        (8e-3, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3], 8e-3, True),
        (4e-3, [1e-3, 2e-3, 4e-3, 8e-3], 4e-3, True),  # one beyond shows that it is inside
        (1e-3, [0.5e-3, 1e-3, 2e-3, 4e-3], 1e-3, True),
        (1.0, [1e-3, 2e-3, 4e-3, 8e-3, 16e-3], 16e-3, False),  # two extensions, and no more
        (1e-6, [0.25e-3, 0.5e-3, 1e-3, 2e-3, 4e-3], 0.25e-3, False),
    ],
)
def test_grid_is_extended_until_the_optimum_is_inside(best, tried, rate, inside):
    world = World({"single-bare": 2e-3, "joint-bare": best})
    found = go(world)
    assert world.tries("joint-bare") == pytest.approx(tried) and world.tries("single-bare") == RATES
    assert found.rates["joint-bare"] == pytest.approx(rate) and found.inside("joint-bare") == inside
    assert found.extended == {"single-bare": 0, "joint-bare": len(tried) - 3}
    assert ("a better one may lie beyond" in headline(found)) == (not inside)


def test_every_method_gets_the_same_tries_samples_and_seeds():
    seen = {}
    for method, settings in (("lora", LORA), ("lora_matched", LORA | {"r": 10}), ("ilora", LORA | {"num_heads": 3})):
        world = World({"single-bare": 2e-3, "joint-bare": 2e-3})
        go(world, settings, method, seeds=[0, 1])
        seen[method] = [
            (c.run.setting, c.run.form, c.run.slot, c.run.seed, c.settings["learning_rate"], c.passes, c.slots, c.held_out)
            for call in world.calls
            for c in call
        ]
    assert seen["lora"] == seen["lora_matched"] == seen["ilora"]
    singles = [s for s in seen["lora"] if s[0] == "single"]
    assert {s[2] for s in singles} == {"ave", "ks", "cremad"}  # unav has no test split
    assert len(singles) == 3 * 2 * len(RATES) and len(seen["lora"]) == len(singles) + 2 * len(RATES)


def test_forms_that_are_swept_have_their_own_rate():
    world = World({"single-bare": 2e-3, "joint-bare": 2e-3, "joint-explicit": 4e-3})
    found = go(world, forms=["bare", "explicit"])
    assert found.rates["joint-explicit"] == 4e-3 and not found.borrowed
    # a row whose form is not swept brings its bare setting in
    assert swept_settings(["joint-explicit"], ["bare"]) == {"joint-explicit": "joint-bare"}


def test_a_single_rate_is_taken_as_it_is(tmp_path):
    def never(*args, **kwargs):
        raise AssertionError("trained")

    found = go(never, rates=[1e-4], held_out=0)
    assert found.rates == dict.fromkeys(LORA["runs"], 1e-4)
    assert "1e-4" in headline(found).replace("0.0001", "1e-4") and "nothing was swept" in headline(found)
    assert sweep_table(found).empty
    write(found, tmp_path / "metrics.json")
    assert learning_rates(tmp_path / "metrics.json") == found.rates


def test_given_rates_are_taken_as_they_are():
    rates = {"single-bare": 4e-3, "joint-bare": 2e-3, "joint-explicit": 1e-3}
    world = World({"single-bare": 2e-3, "joint-bare": 2e-3})
    found = go(world, given={"lora": rates, "ilora": {"joint-bare": 1.0}})
    assert found.rates == rates and not world.calls and found.points.empty
    assert headline(found).count("as given in params.yaml") == 3


def test_what_train_reads_is_what_was_found(tmp_path):
    found = go(World({"single-bare": 2e-3, "joint-bare": 8e-3}))
    write(found, tmp_path / "metrics.json")
    assert learning_rates(tmp_path / "metrics.json") == found.rates
    said = json.loads((tmp_path / "metrics.json").read_text())["settings"]["joint-bare"]
    assert said["tries"] == 5 and said["extended"] == 2 and said["inside"] and said["scores"]["0.008"]["score"] == 1.0
    write(go(World({"joint-bare": 2e-3}), LORA | {"runs": ["joint-explicit"]}), tmp_path / "metrics.json")  # a bare setting, no row
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["settings"]["joint-bare"]["inside"] and found["rates"] == {"joint-explicit": 2e-3}
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="metrics.json: no learning rates in it; run the sweep stage"):
        learning_rates(tmp_path / "metrics.json")
    with pytest.raises(ValueError, match="no such file"):
        learning_rates(tmp_path / "other.json")


def test_score_is_the_mean_over_slots_of_the_mean_over_samples():
    samples = pd.DataFrame(
        [(s, 0, f"{s}{i}", v) for s, values in (("ave", [1, 1, 1, 0]), ("ks", [0, 0])) for i, v in enumerate(values)],
        columns=["slot", "seed", "id", "score"],
    )
    mean, draws = module.slot_draws(samples, 4000)
    assert mean == (0.75 + 0) / 2
    # of four samples with one zero, mean of draws is binomial(4, 3/4) / 4; ks adds nothing
    assert draws.mean() == pytest.approx(0.375, abs=0.01) and draws.std() == pytest.approx(math.sqrt(0.75 * 0.25 / 4) / 2, rel=0.05)


def test_what_a_seed_does_to_all_slots_is_in_the_interval():
    """Two seeds that score all of three slots .6 and .4: seeds are drawn once for all slots, so that slots do not average it out."""
    rows = [(slot, seed, f"{slot}{i}", value) for slot in ("ave", "ks", "ucf") for seed, value in enumerate((0.6, 0.4)) for i in range(4)]
    _, draws = module.slot_draws(pd.DataFrame(rows, columns=["slot", "seed", "id", "score"]), 20000)
    low, high = np.quantile(draws, [0.025, 0.975])
    half = stats.t.ppf(0.975, 1) * np.std([0.6, 0.4], ddof=1) / math.sqrt(2)
    assert high - low == pytest.approx(2 * half, rel=0.1)


def test_rates_that_differ_by_nothing_on_every_sample_are_said_to_be_close():
    found = go(World({"single-bare": 2e-3, "joint-bare": 2e-3}, noise=0.3))
    part = found.points[found.points["setting"] == "joint-bare"].set_index("rate")
    # the noise is the same at each rate, so the paired difference is exact however wide the intervals are
    assert part.loc[1e-3, "behind"] == pytest.approx(0.5) and part.loc[1e-3, "behind_low"] == pytest.approx(0.5)
    assert part.loc[1e-3, "high"] - part.loc[1e-3, "low"] > 0.05
    assert "clearly the best" in headline(found)
    flat = go(lambda cells, **kwargs: World({"single-bare": 1, "joint-bare": 1})([], label="") if not cells else _flat(cells))
    assert flat.rates["joint-bare"] == pytest.approx(0.25e-3)  # of equal ones the lowest
    assert "not clearly better than" in headline(flat)


def _flat(cells):
    samples, _ = World({"single-bare": 1e-3, "joint-bare": 1e-3})(cells, label="")
    return samples.assign(score=0.5), None


def test_next_rate_by_hand():
    assert rate_beyond({1e-3: 0.1, 2e-3: 0.3, 4e-3: 0.2}) is None
    assert rate_beyond({1e-3: 0.1, 2e-3: 0.3}) == 4e-3
    assert rate_beyond({1e-3: 0.4, 2e-3: 0.3}) == 5e-4
    assert rate_beyond({1e-3: 0.3, 2e-3: 0.3, 4e-3: 0.3}) == 5e-4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rates": []}, "sweep.rates"),
        ({"rates": [1e-3, 1e-3]}, "sweep.rates.*different numbers above 0"),
        ({"rates": [1e-3, -1.0]}, "sweep.rates"),
        ({"rates": ["1e-3", 1e-2]}, "sweep.rates"),
        ({"extend": -1}, "sweep.extend: -1"),
        ({"extend": 1.5}, "sweep.extend: 1.5"),
        ({"held_out": 0}, "sweep.held_out: 0; at least 1 sample"),
        ({"seeds": []}, "sweep.seeds"),
        ({"forms": ["long"]}, "sweep.forms: 'long' is unknown; use bare and explicit"),
        ({"given": {"ilora": {}}}, "sweep.given: no rate of lora for single-bare; add it"),
        ({"given": {"lora": dict.fromkeys([*LORA["runs"], "joint-long"], 1e-3)}}, "sweep.given: lora has no row 'joint-long'"),
        ({"given": {"lora": dict.fromkeys(LORA["runs"], 0)}}, "sweep.given: lora, single-bare: 0; give a number above 0"),
        ({"settings": LORA | {"runs": ["both-bare"]}}, "methods.*runs: 'both-bare' is unknown"),
        ({"settings": LORA | {"learning_rate": 1e-3}}, "methods.lora.learning_rate.*alone in sweep.rates"),
        ({"settings": {"rank": 4, "runs": ["joint-bare"]}}, "methods.lora.*rank"),
        ({"slots": ["unav"]}, "none of its slots"),
    ],
)
def test_bad_parameters_are_refused_before_anything_is_trained(change, said):
    world = World({"single-bare": 1e-3, "joint-bare": 1e-3})
    with pytest.raises(ValueError, match=said):
        go(world, **change)
    assert not world.calls


def test_cells_hold_what_the_train_stage_would_train():
    (cell,) = module.cells_of("ilora", "joint-bare", 5e-3, {"r": 4, "lora_alpha": 8, "num_heads": 3}, SLOTS, [2], 6, 40)
    assert cell.run == Run("joint", "ilora", "bare", None, 2) and cell.settings["learning_rate"] == 5e-3
    assert cell.trained_slots == list(SLOTS) and cell.scored_slots == [s for s in SLOTS if tasks.get_slot(s).test]
