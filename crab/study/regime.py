"""Where joint plain LoRA loses against an adapter a task, and where routing helps: maps over what may decide it.

A *map* varies two of `AXES` and holds the others. At each of its points four kinds of adapter are trained on the same
samples, each at a learning rate of its own: plain LoRA for each task alone, plain LoRA jointly, each routed method
jointly, and plain LoRA jointly with at least as many parameters as that.

``tasks`` deals the slots out into groups of so many, and trains an adapter a group. Every slot is therefore scored, and takes as
many training steps, at every point of the axis: what differs is only how many others share its adapter. ``conventions``
asks about each clip in so many incompatible ways (:mod:`crab.study.conventions`); each is a task with an adapter of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from crab import tasks
from crab.data.files import atomic_file, read_json, write_json
from crab.study.ablation import Variant, judge
from crab.study.conventions import Tree, check_slots, conventions
from crab.study.deciding import deciding
from crab.study.grid import Cell, run_grid
from crab.study.keys import key_of
from crab.study.tuned import Tuning, adapter_parameters, plain_rank, tuned

AXES = ("rank", "tasks", "passes", "samples", "conventions")
OWN, JOINT = "own adapters", "joint LoRA"
LOSS = f"{JOINT} less {OWN}"
COLUMNS = [
    "map", *AXES, "measure", "mean", "low", "high", "gain", "tie", "loss", "slots", "parameters", "rival_parameters", "not_inside", "key",
]  # fmt: skip
#: Modules that decide, with functions of this one, what comes out at a point.
DECIDING = "import crab.study.compare, crab.study.conventions, crab.study.encode, crab.study.grid, crab.study.tuned"


@dataclass(frozen=True)
class Point:
    """One place of a map.

    Args:
        rank: of plain LoRA, and of the routed methods' heads. tasks: slots that share an adapter.
        passes: over the samples. samples: of each slot that are trained on, for each convention; None for all, where it is no axis.
        conventions: incompatible ways to answer about the same clips.
    """

    rank: int
    tasks: int
    passes: int
    samples: int | None
    conventions: int


@dataclass(frozen=True)
class Map:
    """Slots, how many seeds, and two axes with their values in the order given; `points` has all places, the first axis slowest.

    Beside joint LoRA and own adapters the routed methods named in ``routed`` are trained, None for all.
    """

    name: str
    slots: tuple[str, ...]
    seeds: int
    routed: tuple[str, ...] | None
    axes: tuple[str, str]
    points: tuple[Point, ...]

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any]) -> Map:
        """From params.yaml: ``slots``, ``seeds`` (how many, counted from 0), all of `AXES`, two of them lists, and perhaps ``routed``.

        Raises:
            ValueError: naming the map, on anything else.
        """
        if set(given) - {"routed"} != {"slots", "seeds", *AXES}:
            raise ValueError(f"regime.maps: {name} holds {', '.join(given)}; it must hold slots, seeds, {', '.join(AXES)}, may hold routed")
        axes = tuple(axis for axis in AXES if isinstance(given[axis], list))
        if len(axes) != 2 or not all(given[axis] for axis in axes):
            raise ValueError(f"regime.maps: {name} varies {', '.join(axes) or 'nothing'}; give a list for exactly two of {', '.join(AXES)}")
        slots = tuple(given["slots"])
        if not slots or (untested := [slot for slot in slots if not tasks.get_slot(slot).test]):
            raise ValueError(f"regime.maps: {name}: slots {', '.join(untested if slots else ()) or 'none'}; give benchmarks only")
        values = [given[axis] if axis in axes else [given[axis]] for axis in AXES]
        for axis, tried in (("seeds", [given["seeds"]]), *zip(AXES, values, strict=True)):
            for value in tried:
                fine = isinstance(value, int) and not isinstance(value, bool) and value >= 1
                if not fine and not (axis == "samples" and value is None and axis not in axes):
                    raise ValueError(f"regime.maps: {name}: {axis} is {value!r}; give whole numbers of at least 1")
                if axis == "tasks" and value > len(slots):
                    raise ValueError(f"regime.maps: {name}: tasks is {value}, of {len(slots)} slots; give no more than these")
        if max(values[AXES.index("conventions")]) > 1:
            check_slots(slots)
        routed = None if given.get("routed") is None else tuple(given["routed"])
        return cls(name, slots, given["seeds"], routed, axes, tuple(Point(*place) for place in product(*values)))

    def of_these(self, routed: Mapping[str, Mapping]) -> dict[str, Mapping]:
        """Those of the routed methods that this map compares. Raises ValueError where it asks for another."""
        if unknown := [name for name in self.routed or () if name not in routed]:
            raise ValueError(f"regime.maps: {self.name}: routed has no method {unknown[0]!r}; known: {', '.join(routed) or 'none'}")
        return {name: options for name, options in routed.items() if self.routed is None or name in self.routed}


def groups(slots: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """The slots dealt out in turn into as few groups of at most ``size`` as there can be, as even as they come.

    Neighbours in the registry are of one family; dealt out, they come into different groups as long as there are several.
    """
    count = -(-len(slots) // size)
    return [tuple(slots[i::count]) for i in range(count)]


def run_parts(
    cells: Sequence[Cell], *, parts: Sequence[tuple[Tree, tuple[str, ...]]], samples: int | None, run, label: str, **where: Any
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """As `crab.study.grid.run_grid`, but each cell is trained once a part, and gets the samples of all parts.

    Args:
        parts: trees and the slots of them that share an adapter. samples: of each slot and version that are trained on.
        run: called for each tree with its cells, its ``encoded`` and ``dataset``, and ``where``.
    """
    of_tree: dict[Tree, list[tuple[int, tuple[str, ...]]]] = {}
    for number, (tree, slots) in enumerate(parts):
        of_tree.setdefault(tree, []).append((number, slots))
    frames, summaries = [], []
    for tree, those in of_tree.items():
        origin, many = {}, []
        for cell in cells:
            for number, slots in those:
                name = f"{cell.name} {number}"
                origin[name] = cell.name
                many.append(replace(
                    cell, name=name, slots=slots, held_out=cell.held_out * tree.versions,
                    samples=None if samples is None else samples * tree.versions,
                ))  # fmt: skip
        found, summary = run(many, encoded=tree.encoded, dataset=tree.dataset, label=label, **where)
        frames.append(found.assign(cell=found["cell"].map(origin)))
        summaries.append(summary.assign(cell=summary["cell"].map(origin)))
    return pd.concat(frames, ignore_index=True), pd.concat(summaries, ignore_index=True)


def by_clip(samples: pd.DataFrame) -> pd.DataFrame:
    """Scores a clip, the mean of its versions: drawn one by one these would pass for more clips than there are.

    Args:
        samples: columns family, seed, slot, id (`crab.study.conventions.renamed` puts a version's word behind the clip's) and score.
    """
    clip = samples.assign(id=samples["id"].str.rpartition("/")[0])
    return clip.groupby(["family", "seed", "slot", "id"], as_index=False, sort=False)["score"].mean()


@dataclass
class Regime:
    """What came out.

    Attributes:
        maps: as asked for.
        points: a row a map, point and measure (`COLUMNS`); a measure is the mean difference between two methods over the
            slots that own adapters lift above chance (`LOSS`, and two for each routed method), with its 95 % interval.
            ``not_inside``: methods of the two whose best learning rate was the highest or lowest tried, or was not swept;
            ``key``: of what decided the row.
        routed: names of the routed methods. swept: whether learning rates were; else the one given was taken.
        seconds: of training, test runs only, of points not taken over.
    """

    maps: list[Map]
    routed: list[str]
    swept: bool
    points: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COLUMNS))
    seconds: float = 0.0


def versus_own(name: str) -> str:
    """The measure: a routed method against an adapter a task."""
    return f"{name} less {OWN}"


def versus_rival(name: str) -> str:
    """The measure: a routed method against joint plain LoRA of its size."""
    return f"{name} less {JOINT} of its size"


def regime(
    maps: Mapping[str, Mapping[str, Any]],
    routed: Mapping[str, Mapping[str, Any]],
    *,
    words: Sequence[str],
    tuning: Mapping[str, Any],
    margin: float,
    resamples: int,
    encoded: str | Path,
    dataset: str | Path,
    base: str | Path,
    work: str | Path,
    out: str | Path,
    chance: Mapping[str, float],
    run=run_grid,
    size=adapter_parameters,
    **where: Any,
) -> Regime:
    """Train, score and compare at every point of every map, in the order given; ``out`` is written anew after each point.

    A point that ``points.csv`` there already has, decided by the same settings, data, base and code, is taken over as it is.

    Args:
        maps: by name, see `Map.of`. routed: by name, options of an I-LoRA config without ``r`` and ``lora_alpha``.
        words: of the conventions, the first ones of which are used.
        chance: score of the best constant answer of the slots as they are; under a convention it is the same.
        run, where: what trains and scores cells, and its further arguments; see `crab.study.grid.run_grid`.
        size: parameters of an adapter on ``base``, by method and options.

    Raises:
        ValueError: on maps that cannot be made, before anything is trained.
    """
    tuning, known = Tuning.of(tuning), [Map.of(name, given) for name, given in maps.items()]
    for each in known:
        _check(each, words, tuning, encoded)
        for name, options in each.of_these(routed).items():
            _variant(name, "ilora", each.points[0].rank, options, 1, each.seeds)
    result = Regime(known, list(routed), len(tuning.rates) > 1)
    place = dict(encoded=encoded, dataset=dataset, base=base)
    methods = {
        (each.name, point): _methods(each.of_these(routed), point, each.seeds, partial(size, base)) for each in known for point in each.points
    }
    same = {
        each.name: deciding(
            encoded, dataset, base, each.slots, [DECIDING, groups, run_parts, by_clip, judge], tuning, margin, resamples,
            [chance[slot] for slot in each.slots], where,
        )
        for each in known
    }  # fmt: skip
    keys = {
        (each.name, point): key_of([
            vars(point), words[: point.conventions] if point.conventions > 1 else [],
            {name: vars(v) for name, v in methods[each.name, point][0].items()}, *same[each.name],
        ])
        for each in known for point in each.points
    }  # fmt: skip
    before = _points_in(out)
    for (name, _), key in keys.items():
        # another map may have the same point, and so rows of the same key
        for row in before[before["key"] == key].drop_duplicates("measure").assign(map=name).itertuples(index=False):
            result.points.loc[len(result.points)] = list(row)
    _write(result, out)
    done = set(zip(result.points["map"], result.points["key"], strict=True))
    trees = Path(work).parent / "trees"
    for each in known:
        for number, point in enumerate(each.points, 1):
            key = keys[each.name, point]
            if (each.name, key) in done:
                continue
            used = words[: point.conventions]
            tree = partial(conventions, **place, out=trees, slots=each.slots, words=used)
            alone = [(tree(only=c if len(used) > 1 else None), (slot,)) for c in range(len(used)) for slot in each.slots]
            together = [(tree(), group) for group in groups(each.slots, point.tasks)]
            variants, pairs = methods[each.name, point]
            found, frames = {}, []
            for name, v in variants.items():
                run_them = partial(run_parts, parts=alone if name == OWN else together, samples=point.samples, run=run)
                found[name] = tuned(
                    v.method, v.row, v.options, each.slots, range(v.seeds), v.passes, tuning, run_them,
                    f"{each.name} {number} of {len(each.points)}: {name}", base=base, work=work, **where,
                )  # fmt: skip
                samples = found[name].samples.assign(family=name)
                frames.append(by_clip(samples) if len(used) > 1 else samples)
                result.seconds += found[name].seconds
            samples = pd.concat(frames, ignore_index=True)
            for measure, (first, second) in pairs.items():
                summary = judge(samples, chance, {first: second}, OWN, margin, resamples)[0][first]
                low, high = summary.get("mean_difference_interval", (None, None))
                odd = [name for name in (first, second) if not found[name].inside]
                result.points.loc[len(result.points)] = [
                    each.name, *vars(point).values(), measure, summary["mean_difference"], low, high, summary["gain"], summary["tie"],
                    summary["loss"], summary["slots_counted"], found[first].parameters, found[second].parameters, ", ".join(odd), key,
                ]  # fmt: skip
            _write(result, out)
    order = [(name, key) for (name, _), key in keys.items()]
    places = [order.index(which) for which in zip(result.points["map"], result.points["key"], strict=True)]
    result.points = result.points.iloc[sorted(range(len(places)), key=places.__getitem__)].reset_index(drop=True)
    _write(result, out)
    return result


def _points_in(out: str | Path) -> pd.DataFrame:
    """What an earlier run left; nothing where there is none."""
    path = Path(out) / "points.csv"
    blank = {name: "" for name in ("samples", "mean", "low", "high")}
    left = pd.read_csv(path, keep_default_na=False, na_values=blank) if path.is_file() else pd.DataFrame()
    if not set(COLUMNS) <= set(left.columns):
        return pd.DataFrame(columns=COLUMNS)
    counts = left["samples"].astype("Int64").astype(object)  # whole numbers and None, as in a `Point`
    return left[COLUMNS].assign(samples=counts.where(counts.notna(), None)).astype({"key": str})


def _methods(routed: Mapping[str, Mapping], point: Point, seeds: int, size) -> tuple[dict[str, Variant], dict[str, tuple[str, str]]]:
    """What is trained at a point, by name; and by measure the two that it compares."""
    made = {name: _variant(name, "lora", point.rank, {}, point.passes, seeds) for name in (OWN, JOINT)}
    pairs = {LOSS: (JOINT, OWN)}
    one = size("lora", {"r": 1, "lora_alpha": 2})
    for name, options in routed.items():
        made[name] = _variant(name, "ilora", point.rank, options, point.passes, seeds)
        rank = plain_rank(size("ilora", made[name].options), one)
        rival = f"{JOINT} of rank {rank}"
        made[rival] = _variant(rival, "lora", rank, {}, point.passes, seeds)
        pairs |= {versus_own(name): (name, OWN), versus_rival(name): (name, rival)}
    return made, pairs


def _variant(name: str, method: str, rank: int, options: Mapping[str, Any], passes: int, seeds: int) -> Variant:
    if fixed := {"r", "lora_alpha"} & set(options):
        raise ValueError(f"regime.routed: {name}: {sorted(fixed)[0]} follows from the map's rank (lora_alpha is 2 r); leave it out")
    return Variant(name, method, {"r": rank, "lora_alpha": 2 * rank, **options}, passes, seeds)


def _check(each: Map, words: Sequence[str], tuning: Tuning, encoded: str | Path) -> None:
    if max(p.conventions for p in each.points) > len(words):
        raise ValueError(f"regime.words: {len(words)} for up to {max(p.conventions for p in each.points)} conventions; give one for each")
    held = tuning.held_out if len(tuning.rates) > 1 else 0
    for slot in each.slots:
        left = len(read_json(Path(encoded) / slot / "train.json")["ids"]) - held
        if (most := max(p.samples or 1 for p in each.points)) > left:
            raise ValueError(f"regime.maps: {each.name}: {most} samples of {slot} wanted, {left} are left when {held} are held out; "
                             "take fewer, or build more (build.train_samples)")  # fmt: skip


def _write(result: Regime, out: str | Path) -> None:
    """``points.csv``, and ``metrics.json`` with the mean over points of each measure."""
    with atomic_file(Path(out) / "points.csv") as path:
        result.points.to_csv(path, index=False, float_format="%.6g")
    means = result.points.dropna(subset=["mean"]).groupby(["map", "measure"], sort=False)["mean"].mean()
    write_json(Path(out) / "metrics.json", {
        each.name: {measure: float(mean) for (name, measure), mean in means.items() if name == each.name} for each in result.maps
    })  # fmt: skip


def _at(each: Map, row) -> str:
    """Where a row lies, by the axes that the map varies."""
    return ", ".join(f"{axis} {getattr(row, axis)}" for axis in each.axes if len({getattr(p, axis) for p in each.points}) > 1) or "its point"


def _interval(row) -> str:
    return f"{row.mean:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"


def finding(result: Regime) -> str:
    """Of each map, in a Markdown list: where joint LoRA loses and where routing helps, by intervals that leave out zero."""
    if not result.maps:
        return "No map is given in this profile, so nothing was tried."
    words = {LOSS: "joint plain LoRA against own adapters"}
    for name in result.routed:
        words |= {versus_own(name): f"`{name}` against own adapters", versus_rival(name): f"`{name}` against joint plain LoRA of its size"}
    lines = []
    for each in result.maps:
        lines += [f"Map `{each.name}` ({' and '.join(each.axes)}; {each.seeds} {'seeds' if each.seeds > 1 else 'seed'}):", ""]
        for measure, said in words.items():
            rows = [r for r in result.points.itertuples() if (r.map, r.measure) == (each.name, measure)]
            judged = [r for r in rows if not pd.isna(r.mean)]
            if not rows:
                continue
            if not judged:
                lines.append(f"- {said}: own adapters lift no slot above chance at any point, so nothing can be judged.")
                continue
            if len(judged) <= 3:
                lines.append(f"- {said}: " + "; ".join(f"{_interval(r)} at {_at(each, r)}" for r in judged) + ".")
                continue
            worse, better = [r for r in judged if r.high < 0], [r for r in judged if r.low > 0]
            text = f"- {said}: clearly worse at {len(worse)} of {len(judged)} points, clearly better at {len(better)}"
            for name, some, pick in (("most below", worse, min), ("most above", better, max)):
                if some:
                    r = pick(some, key=lambda row: row.mean)
                    text += f"; {name} at {_at(each, r)}: {_interval(r)}"
            lines.append(text + ".")
        lines.append("")
    if not result.swept:
        lines.append("The learning rate was given, the same for all, and not swept.")
    if any(each.seeds == 1 for each in result.maps):
        lines.append("With one seed the intervals hold for it alone.")
    return "\n".join(lines).strip()


def table(result: Regime) -> pd.DataFrame:
    """A row a map, point and measure as text, ready to show."""
    rows = []
    for row in result.points.itertuples():
        known = not pd.isna(row.mean)
        rows.append({
            "map": row.map, **{axis: getattr(row, axis) for axis in AXES}, "samples": "all" if pd.isna(row.samples) else int(row.samples),
            "measure": row.measure, "mean difference": _interval(row) if known else "no slot above chance",
            "gain / tie / loss": f"{row.gain} / {row.tie} / {row.loss}",
            "parameters": f"{row.parameters:,} against {row.rival_parameters:,}",
            "rate not inside": row.not_inside,
        })  # fmt: skip
    return pd.DataFrame(rows)
