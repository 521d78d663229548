"""Ablation and regime, with a stand-in for training whose scores are planted."""

import json
import math
import zlib
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from crab import tasks
from crab.data.files import write_json
from crab.study import ablation as tables
from crab.pipeline import params
from crab.study import regime as maps
from crab.study.ablation import ablation, expand, finding, rivals_of, with_rivals
from crab.study.figures.ablation import slot_map, variant_bars
from crab.study.figures.regime import heat_maps
from crab.study.regime import LOSS, OWN, Map, groups, regime, versus_own, versus_rival
from crab.study.tuned import Tuning, plain_rank

SLOTS = ("ks", "cremad", "mafw", "dfew", "unav")  # the last has no test split
TUNING = {"rates": [1e-3, 2e-3, 4e-3], "extend": 1, "seeds": [0], "passes": None, "held_out": 5}
FIXED = TUNING | {"rates": [2e-3], "extend": 0}
CHANCE = dict.fromkeys(SLOTS, 0.2)
BEST = 2e-3


def size(base, method, options):
    """Ten parameters a rank; of I-LoRA twice that, and three for its router."""
    return 10 * options["r"] * (2 if method == "ilora" else 1) + (3 if method == "ilora" else 0)


class World:
    """Trains nothing: a test sample is right with a planted probability, less off the best rate; held-out ones score just that."""

    def __init__(self, truth, best=BEST, versions=lambda encoded: [""]):
        self.truth, self.best, self.versions, self.calls, self.cells = truth, best, versions, [], []

    def __call__(self, cells, *, label, encoded=None, **where):
        self.calls.append((label, list(cells), encoded))
        self.cells += cells
        rows, summaries = [], []
        for cell in cells:
            off = abs(math.log2(cell.settings["learning_rate"] / self.best))
            for slot in cell.scored_slots:
                right = self.truth(cell, slot, encoded) - 0.1 * off
                draw = np.random.default_rng(zlib.crc32(f"{slot} {cell.held_out}".encode())).random(cell.held_out or 60)
                head = [cell.name, cell.run.name, cell.run.family, cell.run.seed, slot]
                rows += [
                    [*head, f"{slot}/{i}{version}", right if cell.held_out else float(u < right)]
                    for version in self.versions(encoded)
                    for i, u in enumerate(draw)
                ]
            summaries.append({"cell": cell.name, "seconds": 1.5, "trainable_parameters": size(None, cell.run.method, cell.settings)})
        return pd.DataFrame(rows, columns=["cell", "run", "family", "seed", "slot", "id", "score"]), pd.DataFrame(summaries)


def some_base(folder):
    if not (folder / "base" / "config.json").exists():
        write_json(folder / "base" / "config.json", {})
    return folder / "base"


def go(world, variants, tmp_path, **changes):
    given = dict(baseline="own", slots=SLOTS, passes=3, seeds=2, tuning=FIXED, margin=0.02, resamples=300, chance=CHANCE)
    where = {name: tmp_path / name for name in ("encoded", "dataset", "base", "out")} | {"work": tmp_path / "grid"}
    some_base(tmp_path)
    return ablation(variants, run=world, size=size, **given | where | changes)


VARIANTS = {
    "own": {"method": "lora", "setting": "single", "r": 4},
    "lora": {"method": "lora", "r": 4},
    "ilora": {"method": "ilora", "r": 4, "num_heads": 3},
    "sharp": {"method": "ilora", "r": 4, "num_heads": 3, "router_temperature": 0.5},
}


def planted(cell, slot, encoded):
    if cell.run.method == "ilora":
        return 0.95 if "router_temperature" in cell.settings else 0.5
    return 0.6 if cell.settings["r"] == 4 else 0.7


def test_planted_order_is_found_and_every_variant_is_held_against_lora_of_its_size(tmp_path):
    world = World(planted)
    result = go(world, VARIANTS, tmp_path)
    # 83 parameters need a rank of 9, which nobody gave; a slot's own adapter is held against `lora`, which is given
    assert result.rows["variant"].tolist() == ["own", "lora", "ilora", "plain LoRA r=9", "sharp"]
    assert rivals_of(result) == {"own": "lora", "ilora": "plain LoRA r=9", "sharp": "plain LoRA r=9"}
    assert result.rows["kind"].tolist() == ["own adapters", "plain", "routed", "plain", "routed"]
    assert result.rows["adapters"].tolist() == [4, 1, 1, 1, 1] and result.rows["parameters"].tolist() == [40, 40, 83, 90, 83]
    assert result.rows["seconds"].tolist() == [12.0, 3.0, 3.0, 3.0, 3.0]  # 1.5 s an adapter and seed
    score = result.rows.set_index("variant")["score"]
    samples = world([c for c in world.cells if c.name.startswith("joint-ilora") and "router_temperature" in c.settings], label="")[0]
    assert score["sharp"] == pytest.approx(samples.groupby("slot")["score"].mean().mean())
    assert result.against_rival["sharp"]["gain"] == 4 and result.against_rival["ilora"]["loss"] == 4
    assert result.against_rival["sharp"]["mean_difference"] == pytest.approx(score["sharp"] - score["plain LoRA r=9"])
    assert {v.kind for v in expand({"u": {"method": "ilora", "r": 1, "router": "uniform"}}, 1, 1)} == {"unrouted heads"}
    assert set(result.against_baseline) == {"lora", "ilora", "plain LoRA r=9", "sharp"}
    said = finding(result)
    assert "Of 2 routed variants 1 score clearly above plain LoRA of their size and 1 clearly below; 1 also gain on 75%" in said
    assert "`sharp`" in said and "flattered by the choice" in said and "given, not swept" in said and "One seed" not in said
    lead = score["sharp"] - score["plain LoRA r=9"]
    assert f"on 4 slots above chance ({lead:+.3f} on all)" in said
    shown = tables.table(result)
    assert shown.set_index("variant")["on all slots"]["sharp"] == f"{lead:+.3f}"
    assert shown["variant"].tolist() == result.rows["variant"].tolist()  # losers stay
    assert shown["parameters"].tolist()[0] == "40 x 4" and shown["rival"].tolist() == ["lora", "", "plain LoRA r=9", "", "plain LoRA r=9"]
    # two of a kind: Holm's rule doubles the smaller p, and the larger is not below it
    p = [result.against_rival[n]["sign_test_p"] for n in ("own", "ilora", "sharp")]
    assert [result.against_rival[n]["sign_test_holm"] for n in ("ilora", "sharp")] == pytest.approx([3 * p[1], 3 * p[2]])


def test_finding_comes_out_the_other_way(tmp_path):
    said = finding(go(World(lambda cell, slot, encoded: 0.5), VARIANTS, tmp_path, seeds=1))
    assert "0 score clearly above" in said and "none also gains on 75%" in said and "One seed" in said
    assert "is not clearly apart from joint LoRA of the same size" in said
    said = finding(go(World(lambda cell, slot, encoded: 0.1), VARIANTS, tmp_path))
    assert "No variant can be judged" in said
    assert finding(go(World(planted), {"own": VARIANTS["own"]}, tmp_path)).startswith("No routed variant was tried.")


def test_nothing_given_is_nothing_done(tmp_path):
    world = World(planted)
    result = go(world, {}, tmp_path)
    assert not world.calls and finding(result).startswith("No variant is given in this profile")
    assert tables.table(result).empty and rivals_of(result) == {}
    variant_bars(result.rows, result.baseline, {}, {}, tmp_path / "v.png")
    slot_map(result.slots, {}, tmp_path / "s.png")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["score"] == {}


def test_all_get_the_same_tries_seeds_samples_and_passes(tmp_path):
    world = World(planted)
    go(world, VARIANTS, tmp_path, tuning=TUNING)
    seen = {}
    for cell in world.cells:
        who = (cell.run.setting, json.dumps({k: v for k, v in cell.settings.items() if k != "learning_rate"}))
        seen.setdefault(who, Counter())[(cell.settings["learning_rate"], cell.run.seed, cell.passes, cell.held_out, cell.slots)] += 1
    joint = [tries for (setting, _), tries in seen.items() if setting == "joint"]
    assert len(joint) == 4 and all(tries == joint[0] for tries in joint)
    assert {k: v / 4 for k, v in next(t for (s, _), t in seen.items() if s == "single").items()} == joint[0]
    # every rate once with the samples held out, then the best with each seed on all of them
    assert joint[0] == {(r, 0, 3, 5, SLOTS): 1 for r in TUNING["rates"]} | {(BEST, s, 3, 0, SLOTS): 1 for s in (0, 1)}


def test_rate_at_an_edge_is_said_to_be(tmp_path):
    result = go(World(planted, best=1.6e-2), VARIANTS, tmp_path, tuning=TUNING)
    assert result.rows["rate"].tolist() == [8e-3] * 5 and result.rows["inside"].tolist() == [False] * 5
    assert "lies at the edge of those tried" in finding(result)
    assert set(tables.table(result)["learning rate"]) == {"0.008 (edge)"}


def test_lists_are_crossed_and_alpha_is_twice_the_rank():
    made = expand({"a": {"method": "ilora", "r": [1, 2], "num_heads": 3, "form": ["bare", "explicit"]}}, 6, 3)
    assert [v.name for v in made] == ["a r=1 form=bare", "a r=1 form=explicit", "a r=2 form=bare", "a r=2 form=explicit"]
    assert made[3].options == {"r": 2, "num_heads": 3, "lora_alpha": 4} and made[3].row == "joint-explicit"
    assert (made[0].passes, made[0].seeds) == (6, 3)
    (own,) = expand({"b": {"method": "lora", "r": 2, "lora_alpha": 2, "passes": 9, "seeds": 5, "setting": "single"}}, 6, 3)
    assert own.options == {"r": 2, "lora_alpha": 2} and (own.passes, own.seeds, own.row) == (9, 5, "single-bare")


def test_rivals_agree_in_form_passes_and_seeds_and_are_shared():
    given = expand(
        {
            "i": {"method": "ilora", "r": 4, "form": ["bare", "explicit"]},
            "more seeds": {"method": "ilora", "r": 4, "top_k": 1, "seeds": 5},
            "long": {"method": "ilora", "r": 4, "passes": 9},
            "dropout": {"method": "lora", "r": 9, "lora_dropout": 0.1},  # plain, but not what a rival is
            "first": {"method": "lora", "r": 9, "order": "instruction"},
        },
        3, 2,
    )  # fmt: skip
    rows, rivals = with_rivals(given, lambda method, options: size(None, method, options))
    assert rivals == {
        "i form=bare": "plain LoRA r=9 passes=3", "i form=explicit": "plain LoRA r=9 explicit passes=3",
        "more seeds": "plain LoRA r=9 passes=3", "long": "plain LoRA r=9 passes=9", "first": "plain LoRA r=9 passes=3",
    }  # fmt: skip
    assert [v.name for v in rows][:4] == ["i form=bare", "plain LoRA r=9 passes=3", "i form=explicit", "plain LoRA r=9 explicit passes=3"]
    assert {v.name: v.seeds for v in rows}["plain LoRA r=9 passes=3"] == 5 and len(rows) == len(given) + 3
    assert [plain_rank(n, 10) for n in (1, 10, 11, 83)] == [1, 1, 2, 9]  # never fewer parameters


def test_comparisons_use_the_seeds_that_both_have(tmp_path):
    result = go(World(planted), VARIANTS | {"sharp": VARIANTS["sharp"] | {"seeds": 4}}, tmp_path)
    assert result.against_rival["sharp"]["seeds"] == 2  # own adapters, which say what can be learned, have two
    assert result.rows.set_index("variant")["seeds"].to_dict()["plain LoRA r=9"] == 4


def on_disk(tmp_path):
    return {name: (tmp_path / "out" / name).read_bytes() for name in ("variants.csv", "slots.csv", "metrics.json")}


def test_only_new_variants_and_those_they_are_compared_with_are_trained(tmp_path):
    soft = {"soft": {"method": "ilora", "r": 4, "num_heads": 3, "router_temperature": 2.0}}
    go(World(planted), VARIANTS, tmp_path)
    first = on_disk(tmp_path)
    idle = World(planted)
    go(idle, VARIANTS, tmp_path)
    assert not idle.calls and on_disk(tmp_path) == first
    world = World(planted)
    result = go(world, {"own": VARIANTS["own"], **soft, **VARIANTS}, tmp_path)
    assert {cell.settings["learning_rate"] for cell in world.cells} == {BEST}
    assert [label.partition(" (")[0] for label, *_ in world.calls] == ["own", "soft", "plain LoRA r=9"]
    (tmp_path / "other").mkdir()
    whole = go(World(planted), {"own": VARIANTS["own"], **soft, **VARIANTS}, tmp_path / "other")
    assert result.against_rival == whole.against_rival and result.against_baseline == whole.against_baseline
    taken, made = (r.rows.drop(columns="seconds").to_csv(float_format="%.6g") for r in (result, whole))
    assert taken == made
    assert finding(result) == finding(whole) and tables.table(result).equals(tables.table(whole))
    less = go(World(planted), {"own": VARIANTS["own"], "sharp": VARIANTS["sharp"]}, tmp_path)
    assert less.rows["variant"].tolist() == ["own", "plain LoRA r=4", "sharp", "plain LoRA r=9"]
    assert set(less.slots["comparison"]) == {
        "own vs plain LoRA r=4", "plain LoRA r=4 vs own", "sharp vs own", "sharp vs plain LoRA r=9", "plain LoRA r=9 vs own",
    }  # fmt: skip


def test_what_is_trained_once_more_to_be_compared_with_keeps_the_rate_of_its_row(tmp_path):
    go(World(planted, best=1e-3), VARIANTS, tmp_path, tuning=TUNING)
    world = World(planted, best=4e-3)
    result = go(world, VARIANTS | {"soft": VARIANTS["sharp"] | {"router_temperature": 2.0}}, tmp_path, tuning=TUNING)
    assert result.rows.set_index("variant")["rate"].to_dict() | {"soft": None} == dict.fromkeys(result.rows["variant"], 1e-3) | {"soft": None}
    rates = {label.partition(" (")[0]: {c.settings["learning_rate"] for c in cells} for label, cells, _ in world.calls if "sweep" not in label}
    assert rates == {"own": {1e-3}, "plain LoRA r=9": {1e-3}, "soft": {4e-3}}


def test_what_is_taken_over_is_corrected_for_the_number_that_is_left(tmp_path):
    go(World(planted), VARIANTS, tmp_path)
    fewer = {name: VARIANTS[name] for name in ("own", "lora", "sharp")}
    idle = World(planted)
    taken = go(idle, fewer, tmp_path)
    (tmp_path / "other").mkdir()
    assert not idle.calls and taken.against_rival == go(World(planted), fewer, tmp_path / "other").against_rival


def test_a_variant_that_cannot_be_judged_does_not_hide_the_others(tmp_path):
    result = go(World(planted), VARIANTS, tmp_path)
    result.against_rival["ilora"] |= {"mean_difference": None, "slots_counted": 0}  # as on fewer seeds, which show less
    said = finding(result)
    assert "Of 1 routed variants that can be judged 1 score clearly above" in said and "is `sharp`" in said


@pytest.mark.parametrize("change", [{"passes": 2}, {"margin": 0.1}, {"baseline": "lora"}, {"tuning": FIXED | {"rates": [1e-3]}}, {"slots": SLOTS[:3]}])
def test_variants_whose_settings_changed_are_made_anew(tmp_path, change):
    go(World(planted), VARIANTS, tmp_path)
    again = World(planted)
    go(again, VARIANTS, tmp_path, **change)
    assert {label.partition(" (")[0] for label, *_ in again.calls} >= {"own", "lora", "ilora", "sharp"}


@pytest.mark.parametrize(("at", "done"), [("own", []), ("lora", ["own"]), ("ilora", ["own", "lora"])])
def test_what_is_finished_is_on_disk_when_the_rest_fails_and_the_rest_can_follow(tmp_path, at, done):
    def killed(cells, label, **kwargs):
        if label.startswith(f"{at} ("):
            raise KeyboardInterrupt
        return World(planted)(cells, label=label, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        go(killed, VARIANTS, tmp_path)
    assert pd.read_csv(tmp_path / "out" / "variants.csv")["variant"].tolist() == done
    assert go(World(planted), VARIANTS, tmp_path).rows["variant"].tolist() == ["own", "lora", "ilora", "plain LoRA r=9", "sharp"]


def test_a_study_of_which_nothing_holds_any_more_can_be_killed_and_go_on(tmp_path):
    """Tables of a head and no row are then what is on disk."""
    go(World(planted), VARIANTS, tmp_path)

    def killed(cells, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(killed, VARIANTS, tmp_path, margin=0.1)
    assert len((tmp_path / "out" / "slots.csv").read_text().splitlines()) == 1
    assert go(World(planted), VARIANTS, tmp_path, margin=0.1).rows["variant"].tolist() == ["own", "lora", "ilora", "plain LoRA r=9", "sharp"]


def test_only_variants_of_one_seed_are_said_to_hold_for_it_alone(tmp_path):
    said = finding(go(World(planted), VARIANTS | {"sharp": VARIANTS["sharp"] | {"seeds": 1}}, tmp_path))
    assert "One seed of `sharp`: these intervals hold for it alone." in said


def test_instruction_first_is_trained_on_the_reordered_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "reordered", lambda encoded, base, out, slots: out / "other")
    world = World(planted)
    result = go(world, VARIANTS | {"first": {"method": "lora", "r": 4, "order": "instruction"}}, tmp_path)
    places = {encoded for label, _, encoded in world.calls if label.startswith("first")}
    assert places == {tmp_path / "trees" / "other"} and {e for _, _, e in world.calls} - places == {tmp_path / "encoded"}
    assert rivals_of(result)["first"] == "lora" and "reads the instruction before the media (`first`)" in finding(result)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variants": {"x": {"method": "dora", "r": 1}}}, "x: method is 'dora'; use lora or ilora"),
        ({"variants": {"x": {"r": 1}}}, "x: method is None"),
        ({"variants": {"own": {"method": "lora", "r": 1, "order": "last"}}}, "order is 'last'; use media or instruction"),
        ({"variants": {"own": {"method": "lora", "r": 1, "form": "long"}}}, "form is 'long'"),
        ({"variants": {"own": {"method": "lora", "r": 1, "seeds": 0}}}, "seeds is 0"),
        ({"variants": {"own": {"method": "lora", "rank": 1}}}, "own: methods.lora.*rank"),
        ({"variants": {"own": {"method": "ilora", "r": 1, "top_k": 9}}}, "own: .*top_k"),
        ({"variants": {"own": {"method": "lora", "r": 1, "passes": 0}}}, "passes is 0"),
        ({"baseline": "owm"}, "ablation.baseline: 'owm' is no variant; use one of own"),
        ({"tuning": {"rates": [1e-3]}}, "tuning holds rates; it must hold extend, held_out, passes, rates, seeds"),
        ({"tuning": FIXED | {"rates": []}}, "sweep.rates"),
    ],
)
def test_bad_variants_are_refused_before_anything_is_trained(tmp_path, change, said):
    world = World(planted)
    with pytest.raises(ValueError, match=said):
        go(world, **{"variants": VARIANTS, "tmp_path": tmp_path} | change)
    assert not world.calls


@pytest.mark.parametrize("profile", params.load()["profiles"])
def test_what_params_ask_for_can_be_trained(profile):
    found = params.load()["profiles"][profile]
    asked, words = found["ablation"], found["regime"]["words"]
    tables.check(expand(asked["variants"], asked["passes"], asked["seeds"]), asked["slots"], Tuning.of(asked["tuning"]), asked["baseline"])
    for name, given in found["regime"]["maps"].items():
        left = found["build"]["train_samples"] - found["regime"]["tuning"]["held_out"]
        for point in Map.of(name, given).points:
            assert point.conventions <= len(words) and (point.samples or 1) <= left
    Tuning.of(found["regime"]["tuning"])


def test_figures_show_what_there_is(tmp_path):
    result = go(World(planted), VARIANTS, tmp_path)
    figure = variant_bars(result.rows, result.baseline, result.against_baseline, result.against_rival, tmp_path / "v.png")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == result.rows["variant"].tolist()
    figure = slot_map(result.slots, rivals_of(result), tmp_path / "s.png")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["own", "ilora", "sharp"]
    assert figure.axes[0].images[0].get_array().shape == (3, 4)


# Regime

BENCH = ("ks", "cremad", "mafw", "dfew")
PLACE = {"slots": list(BENCH), "rank": 2, "tasks": 4, "passes": 3, "samples": 20, "conventions": 1, "seeds": 2}
ROUTED = {"ilora": {"num_heads": 3}}
ROOM = PLACE | {"rank": [1, 2], "tasks": [2, 4]}


def explore(world, given, tmp_path, routed=ROUTED, **changes):
    for slot in BENCH:
        write_json(tmp_path / "encoded" / slot / "train.json", {"ids": [f"{slot}/{i}" for i in range(30)]})
    some_base(tmp_path)
    options = dict(words=["one", "two"], tuning=FIXED, margin=0.02, resamples=300, chance=CHANCE)
    where = {name: tmp_path / name for name in ("encoded", "dataset", "base", "work", "out")}
    return regime(given, routed, run=world, size=size, **options | where | changes)


def hurts(cell, slot, encoded):
    """Plain LoRA loses by company, the more the lower its rank; routing does not."""
    if cell.run.method == "ilora":
        return 0.9
    return 0.9 - 0.2 * math.log2(len(cell.slots)) / cell.settings["r"]


def test_planted_loss_is_mapped(tmp_path):
    world = World(hurts)
    result = explore(world, {"room": ROOM}, tmp_path)
    loss = result.points[result.points["measure"] == LOSS].set_index(["rank", "tasks"])
    assert list(loss.index) == [(1, 2), (1, 4), (2, 2), (2, 4)]
    # a rate of right answers p gives the same samples right wherever p is the same, and more where it is higher
    assert loss["mean"].is_monotonic_increasing is False and loss.loc[(1, 4), "mean"] == loss["mean"].min()
    assert loss.loc[(1, 2), "mean"] == pytest.approx(loss.loc[(2, 4), "mean"]) and loss.loc[(1, 4), "mean"] == pytest.approx(-0.4, abs=0.1)
    own = result.points[result.points["measure"] == versus_own("ilora")]
    assert own["mean"].tolist() == [0, 0, 0, 0]
    rival = result.points[result.points["measure"] == versus_rival("ilora")]
    assert rival["parameters"].tolist() == [23, 23, 43, 43] and rival["rival_parameters"].tolist() == [30, 30, 50, 50]
    assert set(result.points["slots"]) == {4} and result.seconds == 1.5 * len([c for c in world.cells if not c.held_out])
    said = maps.finding(result)
    assert "own adapters: clearly worse at 4 of 4 points, clearly better at 0; most below at rank 1, tasks 4: -0.4" in said
    assert "was given, the same for all, and not swept" in said and "(rank and tasks; 2 seeds)" in said and "one seed" not in said
    assert len(maps.table(result)) == 12
    figure = heat_maps(result, tmp_path / "m.png")
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 3 and len(panels[0].patches) == 4 and len(panels[1].patches) == 0


def without_key(points):
    return points.drop(columns="key").to_csv(index=False, float_format="%.6g")


def test_a_finished_map_is_taken_over_and_only_what_is_new_is_trained(tmp_path):
    first = explore(World(hurts), {"room": ROOM, "few": ROOM | {"rank": [1], "seeds": 1}}, tmp_path)
    again = World(hurts)
    result = explore(again, {"room": ROOM | {"rank": [1, 2, 4]}, "alone": ROOM | {"rank": [1], "routed": []}}, tmp_path)
    assert {label.partition(":")[0] for label, *_ in again.calls} == {"room 5 of 6", "room 6 of 6", "alone 1 of 2", "alone 2 of 2"}
    assert not any(cell.run.method == "ilora" for label, cells, _ in again.calls if label.startswith("alone") for cell in cells)
    old, new = (r.points[(r.points["map"] == "room") & (r.points["rank"] < 4)] for r in (first, result))
    assert len(old) == 12 and without_key(old) == without_key(new)
    assert set(result.points[result.points["map"] == "alone"]["measure"]) == {LOSS}
    assert "`ilora`" not in maps.finding(result).partition("Map `alone`")[2]
    panels = heat_maps(result, tmp_path / "m.png").axes
    assert [axes.axison for axes in panels[:6]] == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    "change",
    [
        {"tuning": FIXED | {"rates": [1e-3]}}, {"margin": 0.05}, {"resamples": 301}, {"chance": dict.fromkeys(SLOTS, 0.3)},
        {"routed": {"ilora": {"num_heads": 2}}}, {"batch_size": 4},
    ],
)  # fmt: skip
def test_a_map_whose_settings_changed_is_made_anew(tmp_path, change):
    explore(World(hurts), {"room": ROOM | {"rank": [1]}}, tmp_path)
    again = World(hurts)
    explore(again, {"room": ROOM | {"rank": [1]}}, tmp_path, **change)
    assert again.calls


@pytest.mark.parametrize("file", ["base/config.json", "encoded/ks/test.json", f"dataset/{tasks.json_path('ks', 'test')}"])
def test_a_map_whose_data_or_base_changed_is_made_anew(tmp_path, file):
    explore(World(hurts), {"room": ROOM | {"rank": [1]}}, tmp_path)
    write_json(tmp_path / file, [])
    again = World(hurts)
    explore(again, {"room": ROOM | {"rank": [1]}}, tmp_path)
    assert again.calls


def test_a_map_of_all_samples_is_taken_over_beside_one_that_varies_them(tmp_path):
    both = {"room": ROOM | {"samples": None}, "few": ROOM | {"tasks": 2, "samples": [10, 20]}}
    explore(World(hurts), both, tmp_path)
    idle = World(hurts)
    again = explore(idle, both, tmp_path)
    assert not idle.calls and again.points["samples"].tolist() == [None] * 12 + [10] * 3 + [20] * 3 + [10] * 3 + [20] * 3
    assert len([axes for axes in heat_maps(again, tmp_path / "m.png").axes if axes.images]) == 6


def test_maps_that_share_points_keep_their_own_rows(tmp_path):
    both = {"room": ROOM, "row": ROOM | {"rank": [1]}}
    first = explore(World(hurts), both, tmp_path)
    for _ in range(2):
        idle = World(hurts)
        again = explore(idle, both, tmp_path)
        assert not idle.calls and without_key(again.points) == without_key(first.points)
    assert again.points["map"].value_counts().to_dict() == {"room": 4 * 3, "row": 2 * 3}


def test_versions_of_a_clip_are_one_sample():
    rows = [("a", 0, "ks", f"ks/{clip}/{word}", score) for clip, scores in (("0", (1, 0)), ("1", (1, 1))) for word, score in zip(("one", "two"), scores)]
    samples = pd.DataFrame(rows, columns=["family", "seed", "slot", "id", "score"])
    found = maps.by_clip(samples)
    assert found.to_numpy().tolist() == [["a", 0, "ks", "ks/0", 0.5], ["a", 0, "ks", "ks/1", 1.0]]


def test_maps_come_out_the_other_way_and_can_be_empty(tmp_path):
    said = maps.finding(explore(World(lambda *_: 0.6), {"room": ROOM}, tmp_path))
    assert said.count("clearly worse at 0 of 4 points, clearly better at 0.") == 3
    low = explore(World(lambda *_: 0.1), {"room": ROOM}, tmp_path / "low")
    assert "no slot above chance at any point, so nothing can be judged" in maps.finding(low)
    assert not any(axes.patches for axes in heat_maps(low, tmp_path / "m.png").axes if axes.images)
    world = World(hurts)
    none = explore(world, {}, tmp_path / "none")
    assert not world.calls and maps.finding(none).startswith("No map is given in this profile") and maps.table(none).empty
    heat_maps(none, tmp_path / "m.png")


def test_each_map_has_its_own_number_of_seeds(tmp_path):
    world = World(hurts)
    result = explore(world, {"few": ROOM | {"seeds": 1}, "many": ROOM | {"seeds": 3}}, tmp_path)
    for label, cells, _ in world.calls:
        assert {c.run.seed for c in cells} == set(range({"few": 1, "many": 3}[label.split()[0]]))
    assert "With one seed the intervals hold for it alone." in maps.finding(result)


def test_a_map_of_few_points_says_each(tmp_path):
    result = explore(World(lambda *_: 0.6), {"two": ROOM | {"rank": [1]}, "one": ROOM | {"rank": [1], "tasks": [2], "samples": None}}, tmp_path)
    said = maps.finding(result)
    assert said.count("+0.000 [+0.000, +0.000] at tasks 2; +0.000 [+0.000, +0.000] at tasks 4.") == 3
    assert said.count("+0.000 [+0.000, +0.000] at its point.") == 3 and "`ilora` against own adapters" in said
    assert maps.table(result)["samples"].tolist() == [20] * 6 + ["all"] * 3


@pytest.mark.parametrize("size", range(1, 7))
def test_every_slot_is_in_one_group_at_every_size(size):
    slots = tuple("abcdef")
    made = groups(slots, size)
    assert sorted(s for group in made for s in group) == sorted(slots)
    assert len(made) == math.ceil(6 / size) and max(map(len, made)) <= size and max(map(len, made)) - min(map(len, made)) <= 1
    assert groups(tuple("aabbcc"), 3) == [tuple("abc"), tuple("abc")]  # dealt out, families mix


def test_all_at_a_point_see_the_same_samples_and_steps(tmp_path):
    world = World(hurts)
    explore(world, {"room": ROOM}, tmp_path, tuning=TUNING)
    for label, cells, _ in world.calls:
        assert {(c.passes, c.samples) for c in cells} == {(3, 20)}
        alone, tasks = OWN in label, 1
        if not alone and not label.startswith("sweep"):
            tasks = {"1": 2, "2": 4, "3": 2, "4": 4}[label.split()[1]]
        if not label.startswith("sweep"):
            assert sorted(s for c in cells for s in c.slots) == sorted(BENCH * 2)  # two seeds
            assert {len(c.slots) for c in cells} == {tasks}
    rates = {tuple(sorted({c.settings["learning_rate"] for c in cells})) for label, cells, _ in world.calls if label.startswith("sweep")}
    assert rates == {(1e-3, 2e-3, 4e-3)}


def test_each_convention_is_a_task_with_an_adapter_of_its_own(tmp_path, monkeypatch):
    asked = []

    def tree(encoded, dataset, base, out, slots, words, only=None):
        asked.append((len(words), only))
        return maps.Tree(tmp_path / f"{len(words)}-{only}", tmp_path, len(words) if only is None else 1)

    monkeypatch.setattr(maps, "conventions", tree)
    def versions(encoded):
        count, only = encoded.name.split("-")
        return range(int(count)) if only == "None" else [int(only)]

    world = World(lambda cell, slot, encoded: 0.9, versions=versions)
    explore(world, {"conflict": PLACE | {"rank": [2], "conventions": [1, 2]}}, tmp_path, tuning=TUNING)
    assert set(asked) == {(1, None), (2, None), (2, 0), (2, 1)}
    held, fitted = {}, {}
    for _, cells, encoded in world.calls:
        for cell in cells:
            (held if cell.held_out else fitted).setdefault(encoded.name, set()).add((cell.held_out, cell.samples, len(cell.slots)))
    # both versions of a clip are held out, or trained on, together
    assert held == {"1-None": {(5, 20, 1), (5, 20, 4)}, "2-None": {(10, 40, 4)}, "2-0": {(5, 20, 1)}, "2-1": {(5, 20, 1)}}
    assert fitted["2-None"] == {(0, 40, 4)} and fitted["2-1"] == {(0, 20, 1)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 1}, "room varies tasks; give a list for exactly two of rank, tasks"),
        ({"passes": [1, 2]}, "room varies rank, tasks, passes"),
        ({"slots": ["unav"]}, "room: slots unav; give benchmarks only"),
        ({"slots": []}, "give benchmarks only"),
        ({"rank": [0, 1]}, "room: rank is 0; give whole numbers"),
        ({"passes": None}, "room: passes is None"),
        ({"rank": 1, "samples": [20, None]}, "room: samples is None; give whole numbers"),
        ({"tasks": [2, 5]}, "tasks is 5, of 4 slots"),
        ({"samples": 31}, "31 samples of ks wanted, 30 are left when 0 are held out"),
        ({"conventions": 3}, "regime.words: 2 for up to 3 conventions"),
        ({"conventions": 2, "slots": ["ks", "ave"], "tasks": [1, 2]}, "slot ave takes no conventions"),
        ({"depth": 1}, "it must hold slots, seeds, rank"),
        ({"routed": ["ilroa"]}, "room: routed has no method 'ilroa'; known: ilora"),
        ({"seeds": 0}, "room: seeds is 0; give whole numbers"),
        ({"seeds": [1, 2]}, r"room: seeds is \[1, 2\]"),
    ],
)
def test_bad_maps_are_refused_before_anything_is_trained(tmp_path, change, said):
    world = World(hurts)
    with pytest.raises(ValueError, match=said):
        explore(world, {"room": ROOM | change}, tmp_path)
    assert not world.calls
    assert Map.of("room", ROOM).axes == ("rank", "tasks")


@pytest.mark.parametrize("option", ["r", "lora_alpha"])
def test_rank_of_a_routed_method_comes_from_the_map(tmp_path, option):
    with pytest.raises(ValueError, match=f"ilora: {option} follows from the map's rank"):
        explore(World(hurts), {"room": ROOM}, tmp_path, routed={"ilora": {option: 4}})
