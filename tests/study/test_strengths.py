"""Comparisons over strengths of the base, with a stand-in for training whose scores are planted."""

from dataclasses import replace

import pytest

from crab.study import rates, strengths, variants
from crab.study.rates import Grid
from crab.study.strengths import JOINT, LONG, REASONING, ROUTED, SINGLE, SIZED, Design, Point
from tests.study.test_experiments import World, size

SLOTS = ("ks", "cremad", "mafw", "dfew")
DESIGN = Design([4000, None], [1, 2], SLOTS, ["bare", "explicit"], num_heads=3, passes=2, seeds=2)
FIXED, SWEPT = Grid([2e-3], 0, [0], 0), Grid([1e-3, 2e-3, 4e-3], 0, [0], 5)


class Kept(World):
    """A world that says which cells are not finished."""

    finished = frozenset()

    def missing(self, cells):
        return {cell.key: cell for cell in cells if cell.key not in self.finished}

    def keyed(self, cells):
        return [replace(cell, key=f"{cell.name}-{cell.form}-{cell.held_out}") for cell in cells]

    def run(self, cells, label):
        return self.keyed(super().run(cells, label))

    def costs(self, ledger, cells):
        return super().costs(ledger, cells).assign(seed=[cell.seed for cell in cells], steps=10)


@pytest.fixture
def world(monkeypatch):
    def make(truth, finished=()):
        store = Kept(truth)
        for module in (rates, strengths):
            monkeypatch.setattr(module, "sample_scores", store.scores)
        monkeypatch.setattr(variants, "adapter_parameters", size)
        monkeypatch.setattr(strengths, "cost_table", store.costs)
        store.finished = set(finished)
        return store

    return make


def truth(cell, slot):
    """On the weak base joint LoRA of rank 1 is worse, and I-LoRA and its rival are better; elsewhere all are equal."""
    if cell.base_steps is None or cell.options["r"] == 2 or len(cell.slots) == 1:
        return 0.6
    return 0.4 if cell.method == "lora" and cell.options["r"] == 1 else 0.8


def table(store, design=DESIGN, **more):
    trained, _ = strengths.train_points(design, 4000, FIXED, store, 50, **more)
    return trained, strengths.compare_points(trained, store, SLOTS, 0.02, 200)


def test_planted_differences_are_seen_at_their_point_and_nowhere_else(world):
    trained, (points, by_slot) = table(world(truth))
    assert len(trained) == 2 * 2 * 2 * 8  # seeds, bases, ranks; four methods with two forms
    rows = points.set_index(["base", "rank", "one", "other"])
    weak = rows.loc["4,000 steps", 1]
    assert weak.loc[(JOINT, SINGLE), ["gain", "tie", "loss"]].tolist() == [0, 0, 4]
    assert weak.loc[(ROUTED, SINGLE), ["gain", "tie", "loss"]].tolist() == [4, 0, 0]
    assert weak.loc[(ROUTED, SIZED), "tie"] == 4 and weak.loc[(SIZED, JOINT), "gain"] == 4
    assert weak.loc[(ROUTED + REASONING, ROUTED), "tie"] == 4
    assert weak.loc[(JOINT, SINGLE), ["losses", "losses_high"]].tolist() == [1, 1]
    assert weak.loc[(JOINT, SINGLE), "losses_low"] == pytest.approx(0.025 ** (1 / 4))  # Clopper and Pearson, 4 of 4
    others = rows.drop(index=("4,000 steps", 1)).xs(JOINT, level="one").xs(SINGLE, level="other")
    assert len(others) == 3 and (others["tie"] == 4).all()
    assert len(by_slot) == 4 * len(points) and (points["seeds"] == 2).all()


def test_the_same_rates_are_tried_for_all_on_the_one_base(world):
    store = world(truth)
    design = replace(DESIGN, as_many_steps=[Point(None, 2)])
    _, chosen = strengths.train_points(design, 4000, SWEPT, store, 50)
    tried = {}
    for cell in filter(lambda cell: cell.held_out, store.cells):
        assert (cell.base_steps, cell.form, cell.seed, cell.held_out) == (4000, "bare", 0, 5)
        tried.setdefault(cell.family, set()).add(cell.learning_rate)
    long = {name: rates for name, rates in tried.items() if LONG in name}
    assert all(rates == {1e-3, 2e-3, 4e-3} for name, rates in tried.items() if name not in long) and len(tried) == 9
    assert list(long.values()) == [{1e-3, 2e-3}]  # half the rate that single-task LoRA got, and that rate
    assert set(chosen.chosen.values()) == {2e-3} and len(chosen.chosen) == 9


def test_long_single_task_runs_take_as_many_steps_as_the_joint_run(world):
    store = world(truth)
    trained, (points, _) = table(store, replace(DESIGN, as_many_steps=[Point(4000, 1)]))
    passes = {family: {cell.passes for cells in part["cells"] for cell in cells} for family, part in
              trained.groupby("family")}  # fmt: skip
    assert passes.pop(LONG) == {2 * len(SLOTS)} and set.union(*passes.values()) == {2}
    assert set(points[points["other"] == LONG]["one"]) == {JOINT, SIZED, ROUTED}
    assert set(points[points["other"] == LONG]["base"]) == {"4,000 steps"}


def test_without_time_left_only_what_is_finished_is_compared(world):
    store = world(truth)
    everything, _ = table(store)
    first = everything[(everything["seed"] == 0) & (everything["base"] == "finished")]
    finished = [cell.key for cells in first["cells"] for cell in cells]
    store = world(truth, finished)
    trained, (points, _) = table(store, minutes=1e-9)
    begun = trained[trained["cells"].map(len) > 0]
    assert {cell.key for cells in begun["cells"] for cell in cells} == set(finished)
    assert set(points["base"]) == {"finished"} and (points["seeds"] == 1).all() and len(trained) == len(everything)


def test_bare_answers_at_all_points_come_first_and_a_rank_is_tuned_when_it_is_needed(world):
    store = world(truth)
    trained, rates = strengths.train_points(DESIGN, 4000, SWEPT, store, 50)
    forms = trained["family"].str.contains(REASONING, regex=False).tolist()
    assert forms == ([False] * 16 + [True] * 16) * 2  # two seeds, four points, four methods
    ranks = [cell.options["r"] for cell in store.cells if cell.method == "ilora"]
    assert ranks == [1] * 3 + [1] * 2 + [2] * 3 + [2] * 2 + [1, 1, 2, 2] * 3  # three rates; two bases; then the rest
    assert set(rates.chosen.values()) <= set(SWEPT.tried) and len(rates.points) == 2 * 4 * 3


def test_without_time_a_rank_that_is_tuned_is_not_forgotten(world):
    store = world(truth)
    everything, _ = strengths.train_points(DESIGN, 4000, SWEPT, store, 50)
    tuned = [cell.key for cell in store.keyed([cell for cell in store.cells if cell.held_out])]
    first = [cell.key for cells in everything.iloc[:4]["cells"] for cell in cells]
    store = world(truth, tuned + first)
    trained, rates = strengths.train_points(DESIGN, 4000, SWEPT, store, 50, minutes=1e-9)
    assert [len(cells) > 0 for cells in trained["cells"]] == [True] * 4 + [False] * 60 and len(rates.chosen) == 8
    trained, rates = strengths.train_points(DESIGN, 4000, SWEPT, world(truth), 50, minutes=1e-9)
    assert not rates.chosen and not trained["cells"].map(len).any()


def test_costs_are_those_of_one_seed(world):
    store = world(truth)
    trained, _ = table(store)
    rows = strengths.costs(trained, store).set_index(["base", "rank", "family"])
    assert rows.loc[("finished", 1, SINGLE)].tolist() == [10, 40, 6.0]  # four adapters of 10 steps and 1.5 s
    assert rows.loc[("finished", 1, ROUTED)].tolist() == [23, 10, 1.5]
    assert rows.loc[("finished", 1, SIZED), "parameters"] >= 23 > rows.loc[("finished", 1, SIZED), "parameters"] - 10


def test_no_points_are_nothing_done(world):
    trained, (points, by_slot) = table(world(truth), replace(DESIGN, steps=[]))
    assert trained.empty and points.empty and by_slot.empty
    assert {"one", "other", "losses", "mean"} <= set(points.columns)  # the page asks for them
