"""The study's comparison on bases of different strength, at several ranks: where does joint training hurt?

A *point* is a base and a rank. At each point the same samples train an adapter for each task alone, joint LoRA of the
same rank, joint LoRA of I-LoRA's size, and I-LoRA, with bare answers and with reasoning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from crab.models.checkpoint import base_name
from crab.study.cells import Cell, cells_of
from crab.study.compare import judge
from crab.study.ledger import cost_table, sample_scores
from crab.study.rates import COLUMNS, Grid, Rates, choose_rates
from crab.study.store import Store
from crab.study.variants import plain, plain_rank

SINGLE, JOINT, SIZED, ROUTED = "single-task LoRA", "joint LoRA", "joint LoRA, I-LoRA's size", "I-LoRA"
LONG = "single-task LoRA, joint LoRA's steps"
REASONING = " + reasoning"
#: Columns of the comparisons at points; each share and mean has its interval beside it.
POINTS = ["base", "rank", "one", "other", "seeds", "slots", "gain", "tie", "loss"]
POINTS += [f"{name}{end}" for name in ("gains", "losses", "mean") for end in ("", "_low", "_high")]


class Point(NamedTuple):
    """``steps`` of the base's language training (None: the finished base), and the ``rank`` of the adapters."""

    steps: int | None
    rank: int


class Family(NamedTuple):
    """Cells that differ in slots and seed only: a method, with a form of answer, at a point.

    ``name`` is for readers: the method, and whether it reasons. ``cells`` makes them, from a learning rate, seeds,
    held-out samples and passes (None: those of the design).
    """

    method: str
    form: str
    name: str
    cells: Callable[..., list[Cell]]


@dataclass(frozen=True)
class Design:
    """What is compared.

    Args:
        steps, ranks: of the points, which are all their combinations.
        slots: of the joint cells. Those with a test split are scored.
        forms: of the answers.
        num_heads: of I-LoRA. passes: over the training samples of every slot. seeds: how many.
        as_many_steps: points where single-task LoRA also trains with the optimizer steps of joint LoRA.
    """

    steps: Sequence[int | None]
    ranks: Sequence[int]
    slots: Sequence[str]
    forms: Sequence[str]
    num_heads: int
    passes: int
    seeds: int
    as_many_steps: Sequence[Point] = ()

    @property
    def points(self) -> list[Point]:
        return [Point(steps, rank) for rank, steps in product(self.ranks, self.steps)]

    def families(self, point: Point, base: Any) -> list[Family]:
        """All families at a point. ``base`` is the folder of a base, which gives the sizes of adapters."""
        own, routed = plain(point.rank), {**plain(point.rank), "num_heads": self.num_heads}
        methods = {
            SINGLE: ("single", "lora", own),
            JOINT: ("joint", "lora", own),
            SIZED: ("joint", "lora", plain(plain_rank(base, "ilora", routed))),
            ROUTED: ("joint", "ilora", routed),
        }
        rows = [
            self._family(method, form, point, *options) for form in self.forms for method, options in methods.items()
        ]
        if point in self.as_many_steps:
            rows.append(self._family(LONG, "bare", point, *methods[SINGLE], times=len(self.slots)))
        return rows

    def _family(
        self, method: str, form: str, point: Point, setting: str, kind: str, options: Mapping[str, Any], times: int = 1
    ) -> Family:
        name = method + (REASONING if form == "explicit" else "")

        def cells(rate: float, seeds: Sequence[int] | None, held_out: int, passes: int | None) -> list[Cell]:
            return cells_of(
                f"{name} ({place(point)})", setting, kind, options, rate, self.slots, times * (passes or self.passes),
                range(self.seeds) if seeds is None else seeds, form=form, held_out=held_out, base_steps=point.steps,
            )  # fmt: skip

        return Family(method, form, name, cells)


def place(point: Point) -> str:
    """A point, for readers."""
    return f"base {base_name(point.steps)}, rank {point.rank}"


def _tune_long(
    design: Design, rank: int, at: int | None, grid: Grid, store: Store, resamples: int, rates: Rates
) -> Rates:
    """The rate of `LONG`: half of `SINGLE`'s in ``rates``, or that rate, since longer trainings like lower ones."""
    own, point = rates.chosen[at_rank(SINGLE, rank)], Point(at, rank)
    family = replace(design, forms=["bare"], as_many_steps=[point]).families(point, store.base)[-1]
    grid = replace(grid, tried=[own / 2, own] if grid.swept else [own], extend=0)
    return choose_rates({at_rank(LONG, rank): family.cells}, grid, store, resamples, "rate of long runs")


def _tuned(design: Design, rank: int, at: int | None, store: Store) -> dict[str, Callable[..., list[Cell]]]:
    """The families of a rank whose rates are chosen, alike for all: with bare answers, on the one base."""
    bare = replace(design, forms=["bare"], as_many_steps=[])
    return {at_rank(family.method, rank): family.cells for family in bare.families(Point(at, rank), store.base)}


def at_rank(method: str, rank: int) -> str:
    """The name under which the learning rate of a method is chosen."""
    return f"{method}, rank {rank}"


def train_points(
    design: Design, at: int | None, grid: Grid, store: Store, resamples: int, minutes: float | None = None
) -> tuple[pd.DataFrame, Rates]:
    """Tune, train and score all points: one seed after the other, and bare answers first, so that a comparison of all
    points is there early. A rank is tuned when it is first needed.

    Args:
        at: steps of the base that rates are chosen on; None for the finished one.
        minutes: after this time no further point begins. The next call goes on.

    Returns one row per family, seed and point: ``base`` (its `base_name`), ``rank``, ``family``, ``seed``, and
    ``cells``, a list of keyed cells, empty where it was not begun. And the rates that were chosen.
    """
    began, rows, rates = time.monotonic(), [], Rates({}, pd.DataFrame(columns=COLUMNS))
    for seed, point, families in tqdm(list(_parts(design, store)), "points", mininterval=5):
        late = minutes is not None and time.monotonic() - began >= 60 * minutes
        first = at_rank(SINGLE, point.rank) not in rates.chosen
        if first and not (late and _untuned(design, point.rank, at, grid, store)):
            families_at = _tuned(design, point.rank, at, store)
            label = f"rates at rank {point.rank}"
            rates = rates.joined(choose_rates(families_at, grid, store, resamples, label))
        if families[0].method == LONG and at_rank(LONG, point.rank) not in rates.chosen and not late:
            rates = rates.joined(_tune_long(design, point.rank, at, grid, store, resamples, rates))
        keyed = [[] for _ in families]
        if all(at_rank(family.method, point.rank) in rates.chosen for family in families):
            chosen = [rates.chosen[at_rank(family.method, point.rank)] for family in families]
            cells = [family.cells(rate, [seed], 0, None) for family, rate in zip(families, chosen, strict=True)]
            together = [cell for part in cells for cell in part]
            if not (late and store.missing(store.keyed(together))):
                done = iter(store.run(together, f"{place(point)}, seed {seed}"))
                keyed = [[next(done) for _ in part] for part in cells]
        for family, part in zip(families, keyed, strict=True):
            rows.append([base_name(point.steps), point.rank, family.name, seed, part])
    return pd.DataFrame(rows, columns=["base", "rank", "family", "seed", "cells"]), rates


def _untuned(design: Design, rank: int, at: int | None, grid: Grid, store: Store) -> bool:
    """Whether choosing the rates of a rank would train."""
    families = _tuned(design, rank, at, store).values() if grid.swept else ()
    cells = [family(rate, grid.seeds, grid.held_out, grid.passes) for family in families for rate in grid.tried]
    return bool(store.missing(store.keyed([cell for part in cells for cell in part])))


def _parts(design: Design, store: Store) -> Iterator[tuple[int, Point, list[Family]]]:
    """Each seed, form and point with its families. The long trainings of `LONG` come last."""
    later, of_points = [], [(point, design.families(point, store.base)) for point in design.points]
    for seed in range(design.seeds):
        for form in design.forms:
            for point, families in of_points:
                yield seed, point, [family for family in families if family.form == form and family.method != LONG]
        later += [(seed, point, [row]) for point, families in of_points for row in families if row.method == LONG]
    yield from later


def compare_points(
    trained: pd.DataFrame, store: Store, slots: Sequence[str], margin: float, resamples: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare the methods at each point, on the seeds that are finished for all that is compared.

    ``trained`` is the table of `train_points`. Returns two tables. One row per point and pair (``one`` minus
    ``other``): seeds, slots that single-task LoRA lifts above chance, ``gain``, ``tie`` and ``loss`` among them, the
    shares of gains and losses with exact intervals over slots (``gains_low`` ...), and the mean difference with its
    interval over samples and seeds. And one row per point, pair and slot (`crab.study.compare.COLUMNS`).
    """
    chance = {slot: entry["chance"] for slot, entry in store.references(slots).items()} if len(trained) else {}
    rows, tables = [], []
    for point, part in trained.groupby(["base", "rank"], sort=False):
        part = part[part["cells"].map(len) > 0]
        if part.empty:
            continue
        samples = sample_scores(store.ledger, part["cells"].sum())
        samples["family"] = samples["family"].str.partition(" (")[0]
        known = set(samples["family"])
        for others in _pairs(known):
            table, summaries = judge(samples, chance, others, SINGLE, margin, resamples)
            tables.append(table.assign(base=point[0], rank=point[1]))
            rows += [_row(point, one, other, summaries[one]) for one, other in others.items()]
    return pd.DataFrame(rows, columns=POINTS), pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _pairs(known: set[str]) -> Iterator[dict[str, str]]:
    """What is compared with what: all with single-task LoRA; I-LoRA with LoRA of its rank and of its size; reasoning
    with none; long runs."""
    forms = ["", REASONING]
    pairs = [
        {method + form: SINGLE for form in forms for method in (JOINT, SIZED, ROUTED)},
        {ROUTED + form: SIZED + form for form in forms} | {SIZED + form: JOINT + form for form in forms},
        {ROUTED + form: JOINT + form for form in forms},
        {method + REASONING: method for method in (SINGLE, JOINT, SIZED, ROUTED)},
        {JOINT: LONG, SIZED: LONG, ROUTED: LONG} if LONG in known else {},
    ]
    for others in pairs:
        if others := {one: other for one, other in others.items() if {one, other} <= known}:
            yield others


def _row(point: tuple[str, int], one: str, other: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    nothing = (None, None)
    row = {"base": point[0], "rank": point[1], "one": one, "other": other, "seeds": summary["seeds"]}
    row |= {"slots": summary["slots_counted"], **{name: summary[name] for name in ("gain", "tie", "loss")}}
    for name, key in (("gains", "positive_rate"), ("losses", "negative_rate"), ("mean", "mean_difference")):
        low, high = summary.get(f"{key}_interval", nothing)
        row |= {name: summary[key], f"{name}_low": low, f"{name}_high": high}
    return row


def costs(trained: pd.DataFrame, store: Store) -> pd.DataFrame:
    """One row per family and point: trainable parameters of one adapter, optimizer steps per seed, training seconds."""
    rows = []
    for (base, rank, family), part in trained.groupby(["base", "rank", "family"], sort=False):
        cells = part["cells"].sum()
        if cells:
            cost = cost_table(store.ledger, cells)
            seeds = cost["seed"].nunique()
            rows.append([
                base, rank, family, int(cost["trainable_parameters"].iloc[0]), int(cost["steps"].sum() / seeds),
                float(cost["seconds"].sum() / seeds),
            ])  # fmt: skip
    return pd.DataFrame(rows, columns=["base", "rank", "family", "parameters", "optimizer steps", "seconds"])
