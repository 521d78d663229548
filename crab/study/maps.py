"""Maps of where joint training loses, and where routing helps.

A *map* varies two of `AXES` and holds the others. At each of its points the same samples train plain LoRA for each task
alone, plain LoRA for all tasks, each routed method, and joint plain LoRA of the same size as that method.

``tasks`` deals the slots out into groups that share an adapter. Every slot is scored and takes the same number of steps
at every point; only its company changes. ``conventions`` is how many incompatible ways to answer are asked for
(:mod:`crab.study.prompts`); each is a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pandas as pd

from crab import tasks
from crab.study.cells import Cell
from crab.study.compare import judge
from crab.study.ledger import sample_scores
from crab.study.prompts import check_conventions
from crab.study.rates import Grid, choose_rates
from crab.study.store import Store
from crab.study.variants import family_costs, plain, plain_rank, train_families

AXES = ("rank", "tasks", "passes", "samples", "conventions")
OWN, JOINT, RIVAL = "single-task LoRA", "joint LoRA", "joint LoRA of its size"


@dataclass(frozen=True)
class Map:
    """Slots, number of seeds, and points: all combinations of two lists of `AXES`, the first axis slowest.

    Beside joint and single-task LoRA, the routed methods named in ``routed`` are trained.
    """

    name: str
    slots: tuple[str, ...]
    seeds: int
    routed: dict[str, Mapping[str, Any]]
    axes: tuple[str, str]
    points: tuple[dict[str, Any], ...]

    @classmethod
    def of(
        cls, name: str, section: Mapping[str, Any], routed: Mapping[str, Mapping[str, Any]], words: Sequence[str]
    ) -> Map:
        """From ``experiments.maps`` of params.yaml: ``slots``, ``seeds``, all of `AXES`, two of them lists, and
        ``routed``, names of routed methods (None for all). ValueError, naming the map and the field, on anything else.
        """
        start = f"experiments.maps: {name}"
        axes = tuple(axis for axis in AXES if isinstance(section[axis], list))
        if len(axes) != 2 or not all(section[axis] for axis in axes):
            raise ValueError(
                f"{start} varies {', '.join(axes) or 'nothing'}; give a list for exactly two of {', '.join(AXES)}"
            )
        slots = tuple(section["slots"])
        if untested := [slot for slot in slots if not tasks.get_slot(slot).test]:
            raise ValueError(f"{start}: slot {untested[0]} has no test split; give benchmarks only")
        values = {axis: section[axis] if axis in axes else [section[axis]] for axis in AXES}
        if max(values["tasks"]) > len(slots):
            raise ValueError(
                f"{start}: tasks is {max(values['tasks'])}, but there are {len(slots)} slots; give no more"
            )
        if max(values["conventions"]) > len(words):
            raise ValueError(f"experiments.words: {len(words)} for {max(values['conventions'])} conventions; add words")
        if max(values["conventions"]) > 1:
            check_conventions(slots, words)
        names = list(routed) if section["routed"] is None else section["routed"]
        if unknown := [method for method in names if method not in routed]:
            raise ValueError(
                f"{start}: experiments.routed has no method {unknown[0]!r}; known: {', '.join(routed) or 'none'}"
            )
        for method in names:
            if fixed := {"r", "lora_alpha"} & set(routed[method]):
                raise ValueError(
                    f"experiments.routed: {method}: {sorted(fixed)[0]} follows from the map's rank; take it out"
                )
        points = tuple(dict(zip(AXES, place, strict=True)) for place in product(*values.values()))
        return cls(name, slots, section["seeds"], {method: routed[method] for method in names}, axes, points)


def groups_of(slots: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """The slots dealt out in turn into as few groups of at most ``size`` as possible.

    Neighbours in the registry are of one task family. Dealt out, they come into different groups.
    """
    count = -(-len(slots) // size)
    return [tuple(slots[i::count]) for i in range(count)]


def _cells(
    family: str, method: str, options: Mapping[str, Any], each: Map, point: Mapping[str, Any], words: tuple[str, ...],
    rate: float, seeds: Sequence[int] | None, held_out: int, passes: int | None,
) -> list[Cell]:  # fmt: skip
    """Cells of one kind of adapter at a point. `OWN` has one adapter per slot and convention."""
    own = family.startswith(f"{each.name}: {OWN} ")
    groups = groups_of(each.slots, 1 if own else point["tasks"])
    fields = {"held_out": held_out, "samples": point["samples"], "words": words}
    return [
        Cell(family, method, options, rate, group, passes or point["passes"], seed, convention=convention, **fields)
        for seed in (range(each.seeds) if seeds is None else seeds)
        for convention in (range(len(words)) if own and words else [None])
        for group in groups
    ]


def run_map(each: Map, words: Sequence[str], grid: Grid, store: Store, margin: float, resamples: int) -> pd.DataFrame:
    """Train, score and compare at every point of a map.

    Returns one row per point and pair of methods (``one`` minus ``other``): the axes, the mean difference over the
    slots that single-task LoRA lifts above chance with its 95% interval, gains, ties and losses, the parameters of
    both, and ``not_inside``: which of the two has its best learning rate at the edge of the grid, or was not swept.
    """
    families, places = {}, []
    for point in each.points:
        label = ", ".join(f"{axis} {point[axis]}" for axis in AXES)
        used = tuple(words[: point["conventions"]]) if point["conventions"] > 1 else ()
        methods = {OWN: ("lora", plain(point["rank"])), JOINT: ("lora", plain(point["rank"]))}
        pairs = [(JOINT, OWN, OWN)]  # one, other, and what the other is called in the table
        for name, options in each.routed.items():
            methods[name] = ("ilora", {**plain(point["rank"]), **options})
            rank = plain_rank(store.base, *methods[name])
            rival = f"{JOINT} of rank {rank}"
            methods[rival] = ("lora", plain(rank))
            pairs += [(name, OWN, OWN), (name, rival, RIVAL)]
        names = {name: f"{each.name}: {name} ({label})" for name in methods}
        for name, family in names.items():
            families[family] = partial(_cells, family, *methods[name], each, point, used)
        places.append((point, names, pairs))
    rates = choose_rates(families, grid, store, resamples, f"rates of map {each.name}")
    trained = train_families(store, families, rates, f"map {each.name}")
    costs = family_costs(store, trained, rates).set_index("family")
    chance = {slot: entry["chance"] for slot, entry in store.references(each.slots).items()}
    rows = []
    for point, names, pairs in places:
        samples = sample_scores(store.ledger, [cell for family in names.values() for cell in trained[family]])
        if point["conventions"] > 1:
            samples = by_clip(samples)
        for one, other, title in pairs:
            _, summaries = judge(samples, chance, {names[one]: names[other]}, names[OWN], margin, resamples)
            summary = summaries[names[one]]
            low, high = summary.get("mean_difference_interval", (None, None))
            rows.append({
                "map": each.name,
                **point,
                "one": one,
                "other": title,
                "mean": summary["mean_difference"],
                "low": low,
                "high": high,
                **{name: summary[name] for name in ("gain", "tie", "loss")},
                "slots": summary["slots_counted"],
                "parameters": costs.loc[names[one], "parameters"],
                "other_parameters": costs.loc[names[other], "parameters"],
                "not_inside": ", ".join(name for name in (one, other) if not costs.loc[names[name], "inside"]),
            })  # fmt: skip
    return pd.DataFrame(rows)


def by_clip(samples: pd.DataFrame) -> pd.DataFrame:
    """Scores per clip, the mean over its conventions. Drawn one by one, these would count as more clips than there are.

    The columns are family, seed, slot, id (`crab.study.prompts.renamed` adds the word to the clip's id) and score.
    """
    clips = samples.assign(id=samples["id"].str.rpartition("/")[0])
    return clips.groupby(["family", "seed", "slot", "id"], as_index=False, sort=False)["score"].mean()
