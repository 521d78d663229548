"""Variants and maps, with a stand-in for training whose scores are planted."""

import math
import zlib
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from crab import tasks
from crab.models import omni
from crab.pipeline import params
from crab.pipeline.paths import root
from crab.study import maps, rates, variants
from crab.study.ledger import cost_table
from crab.study.maps import JOINT, OWN, RIVAL, Map, by_clip, groups_of, run_map
from crab.study.rates import Grid
from crab.study.train import adapter_config
from crab.study.variants import adapter_parameters, expand, plain_rank, run_variants, with_rivals

SLOTS = ("ks", "cremad", "mafw", "dfew", "unav")  # the last has no test split
SWEPT = Grid([1e-3, 2e-3, 4e-3], 1, [0], 5)
FIXED = Grid([2e-3], 0, [0], 0)
BEST = 2e-3
MARGIN, RESAMPLES = 0.02, 300


def size(base, method, options):
    """Ten parameters per rank; I-LoRA has twice that, and three for its router."""
    return 10 * options["r"] * (2 if method == "ilora" else 1) + (3 if method == "ilora" else 0)


class World:
    """Trains nothing. A test sample is right with a planted probability; held-out samples score just that."""

    ledger = base = None

    def __init__(self, truth):
        self.truth, self.cells = truth, []

    def run(self, cells, label):
        self.cells += cells
        return [replace(cell, key=cell.name) for cell in cells]

    def references(self, slots):
        return {slot: {"chance": 0.2} for slot in slots if tasks.get_slot(slot).test}

    def scores(self, ledger, cells):
        rows = []
        for cell in cells:
            off = abs(math.log2(cell.learning_rate / BEST))
            words = cell.words if cell.convention is None else cell.words[cell.convention : cell.convention + 1]
            for slot in cell.scored_slots:
                right = self.truth(cell, slot) - 0.1 * off
                seed = zlib.crc32(f"{slot} {cell.held_out}".encode())
                draws = np.random.default_rng(seed).random(cell.held_out or 60)
                for version in [f"/{word}" for word in words] or [""]:
                    head = [cell.name, cell.family, cell.seed, slot]
                    rows += [
                        [*head, f"{slot}/{i}{version}", right if cell.held_out else float(u < right)]
                        for i, u in enumerate(draws)
                    ]
        return pd.DataFrame(rows, columns=["cell", "family", "seed", "slot", "id", "score"])

    def costs(self, ledger, cells):
        parameters = [size(None, cell.method, cell.options) for cell in cells]
        return pd.DataFrame({"trainable_parameters": parameters, "seconds": 1.5})


@pytest.fixture
def world(monkeypatch):
    """Makes a world and puts it in the place of real training."""

    def make(truth):
        planted = World(truth)
        for module in (rates, variants, maps):
            monkeypatch.setattr(module, "sample_scores", planted.scores)
        monkeypatch.setattr(variants, "adapter_parameters", size)
        monkeypatch.setattr(variants, "cost_table", planted.costs)
        return planted

    return make


def go(store, section, seeds=2, grid=FIXED, baseline="own"):
    return run_variants(expand(section, 3, seeds), baseline, SLOTS, grid, store, MARGIN, RESAMPLES)


VARIANTS = {
    "own": {"method": "lora", "setting": "single", "r": 4},
    "lora": {"method": "lora", "r": 4},
    "ilora": {"method": "ilora", "r": 4, "num_heads": 3},
    "sharp": {"method": "ilora", "r": 4, "num_heads": 3, "router_temperature": 0.5},
}


def planted(cell, slot):
    if cell.method == "ilora":
        return 0.95 if "router_temperature" in cell.options else 0.5
    return 0.6 if cell.options["r"] == 4 else 0.7


def test_planted_order_is_seen_and_every_variant_has_a_rival_of_its_size(world):
    store = world(planted)
    outcome = go(store, VARIANTS)
    rows = outcome.rows.set_index("variant")
    # 83 parameters need a rank of 9, which is not given. The rival of single-task LoRA is `lora`, which is given.
    assert list(rows.index) == ["own", "lora", "ilora", "plain LoRA r=9", "sharp"]
    assert rows["rival"].dropna().to_dict() == {"own": "lora", "ilora": "plain LoRA r=9", "sharp": "plain LoRA r=9"}
    assert rows["kind"].tolist() == ["single-task", "plain", "routed", "plain", "routed"]
    assert rows["adapters"].tolist() == [4, 1, 1, 1, 1] and rows["parameters"].tolist() == [40, 40, 83, 90, 83]
    assert rows["seconds"].tolist() == [12.0, 3.0, 3.0, 3.0, 3.0]  # 1.5 s per adapter and seed
    assert outcome.against_rival["sharp"]["gain"] == 4 and outcome.against_rival["ilora"]["loss"] == 4
    samples = store.scores(None, [c for c in store.cells if c.family in ("sharp", "plain LoRA r=9") and not c.held_out])
    means = samples.groupby(["family", "slot"])["score"].mean().groupby("family").mean()
    lead = means["sharp"] - means["plain LoRA r=9"]
    assert outcome.against_rival["sharp"]["mean_difference"] == pytest.approx(lead)
    assert set(outcome.against_baseline) == {"lora", "ilora", "plain LoRA r=9", "sharp"}
    # Holm over three comparisons: the smallest p is tripled, and the next is not below it.
    p = [outcome.against_rival[name]["sign_test_p"] for name in ("own", "ilora", "sharp")]
    holm = [outcome.against_rival[name]["sign_test_holm"] for name in ("ilora", "sharp")]
    assert holm == pytest.approx([3 * p[1], 3 * p[2]])


def test_nothing_given_is_nothing_done(world):
    outcome = go(world(planted), {})
    assert outcome.rows.empty and outcome.against_rival == {}


def test_all_get_the_same_tries_seeds_samples_and_passes(world):
    store = world(planted)
    outcome = go(store, VARIANTS, grid=SWEPT)
    tries, tests = {}, {}
    for cell in store.cells:
        table = tries if cell.held_out else tests
        if len(cell.slots) > 1:
            entry = (cell.learning_rate, cell.seed, cell.slots, cell.passes, cell.held_out, cell.samples)
            table.setdefault(cell.family, set()).add(entry)
    joint = [name for name in tries if name != "own"]
    assert len(joint) == 4 and all(tries[name] == tries[joint[0]] for name in joint)
    assert all(tests[name] == tests[joint[0]] for name in joint)
    assert outcome.rows["inside"].all() and set(outcome.rows["rate"]) == {BEST}
    assert set(outcome.points.groupby("family").size()) == {3}


def test_rate_at_an_edge_is_told(world):
    outcome = go(world(planted), VARIANTS, grid=replace(SWEPT, tried=[2e-3, 4e-3], extend=0))
    assert not outcome.rows["inside"].any()


def test_lists_are_crossed_and_alpha_is_twice_the_rank():
    rows = expand({"a": {"method": "ilora", "r": [1, 2], "num_heads": [3, 4], "passes": 5}}, 3, 2)
    assert [row.name for row in rows] == [f"a r={r} num_heads={n}" for r in (1, 2) for n in (3, 4)]
    assert [row.options["lora_alpha"] for row in rows] == [2, 2, 4, 4] and {row.passes for row in rows} == {5}
    assert expand({"a": {"method": "lora", "r": 2, "lora_alpha": 3}}, 1, 1)[0].options["lora_alpha"] == 3


def test_rivals_agree_in_form_passes_and_seeds_and_are_shared(monkeypatch):
    section = {
        "a": {"method": "ilora", "r": 4},
        "b": {"method": "ilora", "r": 4, "form": "explicit"},
        "c": {"method": "ilora", "r": 4, "passes": 6},
        "d": {"method": "ilora", "r": 4, "seeds": 5},
        "e": {"method": "lora", "r": 9, "lora_alpha": 9},  # its own alpha: no rival of the usual kind
    }
    monkeypatch.setattr(variants, "adapter_parameters", size)
    rows, rivals = with_rivals(expand(section, 3, 2), None)
    by_name = {row.name: row for row in rows}
    assert rivals["a"] == rivals["d"] == "plain LoRA r=9 passes=3"
    assert rivals["b"] == "plain LoRA r=9 explicit passes=3" and rivals["c"] == "plain LoRA r=9 passes=6"
    assert by_name[rivals["a"]].seeds == 5 and by_name[rivals["b"]].form == "explicit" and "e" not in rivals
    assert all(dict(by_name[name].options) == {"r": 9, "lora_alpha": 18} for name in rivals.values())


def test_comparisons_use_the_seeds_that_both_have(world):
    section = {**VARIANTS, "ilora": {**VARIANTS["ilora"], "seeds": 5}}
    outcome = go(world(planted), section, seeds=3)
    assert outcome.against_rival["ilora"]["seeds"] == 3 and outcome.rows.set_index("variant").loc["ilora", "seeds"] == 5


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"a": {"method": "vera"}}, "cell a: method is 'vera'; use one of lora, ilora"),
        ({"a": {"r": 2}}, "cell a: method is None"),
        ({"a": {"method": "lora", "setting": "both"}}, "setting is 'both'; use single or joint"),
        ({"a": {"method": "lora", "form": "long"}}, "form is 'long'"),
        ({"a": {"method": "lora", "order": "none"}}, "order is 'none'; use one of media, instruction"),
        ({"a": {"method": "lora", "seeds": 0}}, "seeds is 0; give at least 1"),
        ({"a": {"method": "lora", "r": [1, 1]}}, "two are called 'a r=1'"),
    ],
)
def test_bad_variants_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        expand(section, 1, 1)


def test_unknown_baseline_is_refused_before_anything_is_trained(world):
    store = world(planted)
    with pytest.raises(ValueError, match="experiments.baseline: 'none' is no variant; use one of own, lora"):
        go(store, VARIANTS, baseline="none")
    assert not store.cells


@pytest.mark.parametrize("profile", ["smoke", "tiny", "study", "full"])
def test_what_params_ask_for_can_be_trained(profile):
    """Options that the methods have, slots that exist, maps that can be."""
    section = params.resolve(root(), profile)["experiments"]
    for row in expand(section["variants"], section["passes"], section["seeds"]):
        adapter_config(row.method, row.options, omni.TARGETS)
    for name, each in section["maps"].items():
        plan = Map.of(name, each, section["routed"], section["words"])
        for options in plan.routed.values():
            adapter_config("ilora", {"r": 2, "lora_alpha": 4, **options}, omni.TARGETS)


def test_parameters_are_counted_without_weights(base, store, cell):
    (keyed,) = store.run([cell()], "test")
    counted = adapter_parameters(base, "lora", cell().options)
    assert cost_table(store.ledger, [keyed])["trainable_parameters"].tolist() == [counted]
    ranks = [adapter_parameters(base, "lora", {"r": r, "lora_alpha": 2 * r}) for r in (1, 5)]
    assert ranks[1] == 5 * ranks[0]
    count = partial(adapter_parameters, base)
    routed = {"r": 2, "num_heads": 2, "lora_alpha": 4}
    rank, needed = plain_rank(base, "ilora", routed), count("ilora", routed)
    assert count("lora", {"r": rank, "lora_alpha": 2}) >= needed > count("lora", {"r": rank - 1, "lora_alpha": 2})
    assert torch.get_default_device() == torch.device("cpu")


# ---- maps

MAP = {
    "slots": ["ks", "cremad"],
    "rank": [1, 4],
    "tasks": [1, 2],
    "passes": 3,
    "samples": 9,
    "conventions": 1,
    "seeds": 2,
    "routed": None,
}
ROUTED = {"ilora": {"num_heads": 2}, "sharp": {"num_heads": 2, "router_temperature": 0.5}}
WORDS = ("one", "two", "three")


def plan(changes=None, routed=ROUTED):
    return Map.of("m", {**MAP, **(changes or {})}, routed, WORDS)


def draw(store, changes=None, routed=ROUTED, grid=FIXED):
    return run_map(plan(changes, routed), WORDS, grid, store, MARGIN, RESAMPLES)


def shared(cell, slot):
    """Joint plain LoRA of rank 1 loses with company; routed methods do not."""
    crowded = len(cell.slots) > 1 and cell.method == "lora" and cell.options["r"] == 1
    return 0.5 if crowded else 0.8


def test_planted_loss_is_mapped(world):
    points = draw(world(shared)).set_index(["one", "other", "rank", "tasks"])
    assert points.loc[(JOINT, OWN, 1, 2), "mean"] < -0.1 and points.loc[(JOINT, OWN, 1, 2), "high"] < 0
    for place in ((1, 1), (4, 1), (4, 2)):
        assert points.loc[(JOINT, OWN, *place), "mean"] == 0
    assert (points.xs("ilora", level="one")["mean"] == 0).all()
    assert set(points.index.get_level_values("other")) == {OWN, RIVAL} and len(points) == 4 * 5
    row = points.loc[("ilora", RIVAL, 4, 2)]
    assert row["parameters"] == 83 and row["other_parameters"] == 90
    assert row["not_inside"] == "ilora, joint LoRA of rank 9"  # the rate was given


def test_chosen_rates_lie_inside(world):
    assert set(draw(world(shared), grid=SWEPT)["not_inside"]) == {""}


def test_slots_at_chance_leave_no_number(world):
    points = draw(world(lambda cell, slot: 0.2))
    assert points["mean"].isna().all() and (points["slots"] == 0).all()


def test_all_at_a_point_see_the_same_samples_and_steps(world):
    store = world(shared)
    draw(store, {"tasks": [2], "rank": [4]})
    steps = Counter((cell.family, slot) for cell in store.cells for slot in cell.slots)
    assert set(steps.values()) == {2}  # two seeds
    assert {(cell.passes, cell.samples) for cell in store.cells} == {(3, 9)}


@pytest.mark.parametrize("count", range(1, 6))
def test_every_slot_is_in_one_group_at_every_size(count):
    groups = groups_of(SLOTS, count)
    assert sorted(slot for group in groups for slot in group) == sorted(SLOTS)
    assert max(map(len, groups)) <= count and max(map(len, groups)) - min(map(len, groups)) <= 1


def test_each_convention_is_a_task_with_its_own_adapter(world):
    store = world(shared)
    draw(store, {"conventions": [1, 3], "tasks": 2, "slots": ["cremad", "mafw"]}, {})
    own = [cell for cell in store.cells if cell.words and OWN in cell.family]
    assert Counter((cell.slots, cell.convention) for cell in own) == {
        ((slot,), c): 2 * 2
        for slot in ("cremad", "mafw")
        for c in range(3)  # two seeds, two ranks
    }
    joint = [cell for cell in store.cells if cell.words and OWN not in cell.family]
    assert {(cell.slots, cell.convention, cell.words) for cell in joint} == {(("cremad", "mafw"), None, WORDS)}


def test_versions_of_a_clip_are_one_sample():
    rows = [("f", 0, "ks", f"a/{i}/{word}", score) for i in range(2) for word, score in (("one", 1.0), ("two", 0.0))]
    clips = by_clip(pd.DataFrame(rows, columns=["family", "seed", "slot", "id", "score"]))
    assert clips["id"].tolist() == ["a/0", "a/1"] and clips["score"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 1}, "varies tasks; give a list for exactly two"),
        ({"passes": [1, 2]}, "varies rank, tasks, passes"),
        ({"rank": []}, "give a list for exactly two"),
        ({"slots": ["ks", "unav"]}, "slot unav has no test split; give benchmarks only"),
        ({"tasks": [3]}, "tasks is 3, but there are 2 slots"),
        ({"conventions": 4}, "3 for 4 conventions; add words"),
        ({"conventions": 2, "slots": ["avqa", "ks"]}, "slot avqa takes no conventions"),
        ({"routed": ["gold"]}, "no method 'gold'; known: ilora, sharp"),
    ],
)
def test_bad_maps_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan(change)


@pytest.mark.parametrize("option", ["r", "lora_alpha"])
def test_rank_of_a_routed_method_comes_from_the_map(option):
    with pytest.raises(
        ValueError, match=f"experiments.routed: ilora: {option} follows from the map's rank; take it out"
    ):
        plan(routed={"ilora": {option: 2}})
