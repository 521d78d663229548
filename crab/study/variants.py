"""Variants of the method, each against plain LoRA of its size and against single-task LoRA.

A *variant* is a set of options of the adapter, given in params.yaml. Its *rival* is made for it: joint plain LoRA of
the smallest rank that has at least as many parameters, with the same form of answer and passes. All variants get the
same tries for their learning rate, and all stay in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from crab.study.cells import Cell, cells_of
from crab.study.compare import judge
from crab.study.footprint import read_base
from crab.study.ledger import cost_table, sample_scores
from crab.study.rates import Grid, Rates, choose_rates
from crab.study.store import Store
from crab.tasks import BENCHMARKS

#: Fields of a variant that are no options of its adapter.
_FIELDS = ("method", "passes", "seeds", "setting", "form", "order")


@dataclass(frozen=True)
class Variant:
    """One row of the table. ValueError, naming the variant and the field, on what cannot be.

    Args:
        name: unique.
        method: ``lora`` or ``ilora``.
        options: of its PEFT config, and ``router_rate``; ``lora_alpha`` is 2 r unless given.
        passes: over the training samples of every slot. seeds: how many, counted from 0.
        setting: ``joint``, or ``single``: one adapter per slot, which knows the task (the ceiling of routing).
        form: of the answers. order: ``media`` first, as the base has learned it, or ``instruction`` first.
    """

    name: str
    method: str
    options: Mapping[str, Any]
    passes: int
    seeds: int
    setting: str = "joint"
    form: str = "bare"
    order: str = "media"

    def __post_init__(self) -> None:
        if isinstance(self.seeds, bool) or not isinstance(self.seeds, int) or self.seeds < 1:
            raise ValueError(f"experiments.variants: {self.name}: seeds is {self.seeds!r}; give at least 1")
        self.cells(BENCHMARKS[:1], 1.0, [0], 0, None)  # a wrong field is named before anything is trained

    @property
    def kind(self) -> str:
        """``single-task``, ``instruction first``, ``plain``, ``unrouted heads`` or ``routed``."""
        if self.setting == "single":
            return "single-task"
        if self.order == "instruction":
            return "instruction first"
        if self.method == "lora":
            return "plain"
        return "unrouted heads" if self.options.get("router") == "uniform" else "routed"

    def cells(
        self, slots: Sequence[str], rate: float, seeds: Sequence[int] | None, held_out: int, passes: int | None
    ) -> list[Cell]:
        """Its cells at a learning rate; by default with its own seeds and passes."""
        seeds = range(self.seeds) if seeds is None else seeds
        return cells_of(
            self.name, self.setting, self.method, self.options, rate, slots, passes or self.passes, seeds,
            form=self.form, order=self.order, held_out=held_out,
        )  # fmt: skip


def expand(variants: Mapping[str, Mapping[str, Any]], passes: int, seeds: int) -> list[Variant]:
    """Variants as params.yaml gives them. An option with a list stands for one variant per member; lists are crossed.

    ``passes`` and ``seeds`` are for variants that do not say. ValueError on one that cannot be, or two of one name.
    """
    rows = []
    for name, section in variants.items():
        lists = {option: values for option, values in section.items() if isinstance(values, list)}
        for values in product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            options = {"method": None, "passes": passes, "seeds": seeds, **section, **chosen}
            fields = {key: options.pop(key) for key in _FIELDS if key in options}
            if isinstance(options.get("r"), int):
                options.setdefault("lora_alpha", 2 * options["r"])
            label = " ".join([name, *(f"{option}={value}" for option, value in chosen.items())])
            rows.append(Variant(label, options=options, **fields))
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"experiments.variants: two are called {twice[0]!r}; rename one")
    return rows


def adapter_parameters(base: str | Path, method: str, options: Mapping[str, Any]) -> int:
    """Trainable parameters of an adapter on a base, counted without loading a weight."""
    return read_base(base).adapter(method, options).parameters


def plain(rank: int) -> dict[str, int]:
    """Options of plain LoRA of a rank."""
    return {"r": rank, "lora_alpha": 2 * rank}


def plain_rank(base: str | Path, method: str, options: Mapping[str, Any]) -> int:
    """Rank of the smallest plain LoRA with at least as many parameters: in doubt, the rival is the larger one."""
    return -(-adapter_parameters(base, method, options) // adapter_parameters(base, "lora", plain(1)))


def with_rivals(variants: Sequence[Variant], base: str | Path) -> tuple[list[Variant], dict[str, str]]:
    """The variants, each followed by its rival unless that is among them; and the rival of each by name.

    Plain joint LoRA has none: the others are compared with it.
    """
    known = {
        (row.options["r"], row.form, row.passes): row
        for row in variants
        if row.kind == "plain" and dict(row.options) == plain(row.options["r"])
    }
    several = len({row.passes for row in variants}) > 1
    rows: dict[str, Variant] = {}
    rivals: dict[str, str] = {}
    for row in variants:
        rows.setdefault(row.name, row)
        if row.kind == "plain":
            continue
        rank = plain_rank(base, row.method, row.options)
        key = (rank, row.form, row.passes)
        if key not in known:
            more = [row.form] * (row.form != "bare") + [f"passes={row.passes}"] * several
            name = " ".join([f"plain LoRA r={rank}", *more])
            known[key] = Variant(name, "lora", plain(rank), row.passes, row.seeds, form=row.form)
        rival = known[key]
        if rival.name not in rows or rows[rival.name].seeds < row.seeds:
            known[key] = rival = replace(rival, seeds=max(rival.seeds, row.seeds))
            rows[rival.name] = rival
        rivals[row.name] = rival.name
    return list(rows.values()), rivals


def train_families(store: Store, families: Mapping[str, Callable], rates: Rates, label: str) -> dict[str, list[Cell]]:
    """Keyed cells of each family at its chosen rate, on all training samples, finished."""
    cells = [cell for family, of in families.items() for cell in of(rates.chosen[family], None, 0, None)]
    groups: dict[str, list[Cell]] = {family: [] for family in families}
    for cell in store.run(cells, label):
        groups[cell.family].append(cell)
    return groups


def family_costs(store: Store, groups: Mapping[str, Sequence[Cell]], rates: Rates) -> pd.DataFrame:
    """One row per family: parameters of one adapter, adapters per seed, the rate and where it lies, and seconds."""
    rows = []
    for family, cells in groups.items():
        cost = cost_table(store.ledger, cells)
        rows.append({
            "family": family,
            "parameters": int(cost["trainable_parameters"].iloc[0]),
            "adapters": len({(cell.slots, cell.convention) for cell in cells}),
            "rate": rates.chosen[family],
            "inside": rates.inside(family),
            "passes": cells[0].passes,
            "seeds": len({cell.seed for cell in cells}),
            "seconds": float(cost["seconds"].sum()),
        })  # fmt: skip
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Outcome:
    """Of the variants.

    Attributes:
        rows: one row per variant and rival: kind, the columns of `family_costs`, rival.
        slots: one row per comparison and slot (`crab.study.compare.COLUMNS`).
        against_baseline, against_rival: summaries by variant (`crab.study.compare.summarise`).
        points: held-out scores of all rates tried (`crab.study.rates.COLUMNS`).
    """

    rows: pd.DataFrame
    slots: pd.DataFrame
    against_baseline: dict[str, dict]
    against_rival: dict[str, dict]
    points: pd.DataFrame


def run_variants(
    variants: Sequence[Variant], baseline: str, slots: Sequence[str], grid: Grid, store: Store, margin: float,
    resamples: int,
) -> Outcome:  # fmt: skip
    """Train and score all variants and rivals, each at its own learning rate, and compare them.

    ValueError, before anything is trained, on variants that cannot be.

    Args:
        baseline: the variant that all are compared with. It also tells which slots can be learned.
        slots: of the joint cells, with or without a test split.
    """
    if variants and baseline not in [row.name for row in variants]:
        raise ValueError(
            f"experiments.baseline: {baseline!r} is no variant; use one of {', '.join(row.name for row in variants)}"
        )
    rows, rivals = with_rivals(variants, store.base)
    families = {row.name: partial(row.cells, slots) for row in rows}
    rates = choose_rates(families, grid, store, resamples, "rates of variants")
    groups = train_families(store, families, rates, "variants")
    if not groups:
        return Outcome(pd.DataFrame(), pd.DataFrame(), {}, {}, rates.points)
    samples = sample_scores(store.ledger, [cell for cells in groups.values() for cell in cells])
    chance = {slot: entry["chance"] for slot, entry in store.references(slots).items()}
    others = dict.fromkeys((row.name for row in rows if row.name != baseline), baseline)
    beside, against_baseline = judge(samples, chance, others, baseline, margin, resamples)
    versus, against_rival = judge(samples, chance, rivals, baseline, margin, resamples)
    table = family_costs(store, groups, rates).rename(columns={"family": "variant"})
    table.insert(1, "kind", [row.kind for row in rows])
    table["rival"] = table["variant"].map(rivals)
    return Outcome(table, pd.concat([beside, versus], ignore_index=True), against_baseline, against_rival, rates.points)
