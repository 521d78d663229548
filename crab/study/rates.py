"""The learning rate of each family, chosen on training samples that are held out.

All that are compared get the same tries: the same rates, seeds, held-out samples and passes. If the best rate lies at
an edge of the grid, one rate beyond it is tried, a limited number of times, and the table says if that was not enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from crab.study.cells import Cell, is_rate
from crab.study.compare import bootstrap_means, interval
from crab.study.ledger import sample_scores
from crab.study.store import Store

FACTOR = 2.0  # between an edge of the grid and the rate beyond it
COLUMNS = ["family", "rate", "score", "low", "high", "behind", "behind_low", "behind_high", "chosen"]


@dataclass(frozen=True)
class Grid:
    """How learning rates are chosen. ValueError, naming the parameter, on what cannot be.

    Args:
        tried: rates that every family starts with. A single one is taken as it is, and nothing is trained.
        extend: how often a rate beyond the edge may be added.
        seeds: of the cells that decide.
        passes: of these cells; None for as many as are trained afterwards.
        held_out: training samples of each slot that are scored and not trained on.
    """

    tried: Sequence[float]
    extend: int
    seeds: Sequence[int]
    held_out: int
    passes: int | None = None

    def __post_init__(self) -> None:
        if not self.tried or not all(map(is_rate, self.tried)) or len(set(self.tried)) != len(self.tried):
            raise ValueError(
                f"rates.tried: {list(self.tried)}; give different numbers above 0, or a single one to take it as it is"
            )
        if self.swept and (self.held_out < 1 or not self.seeds):
            raise ValueError(
                f"rates: held_out is {self.held_out!r} and seeds are {list(self.seeds)}; to choose among "
                "several rates, give at least 1 of each"
            )

    @property
    def swept(self) -> bool:
        return len(self.tried) > 1


@dataclass(frozen=True)
class Rates:
    """The chosen learning rate of each family, and the ``points``: one row per family and rate tried (`COLUMNS`).

    A point has the mean over slots of the primary metric on held-out samples with its 95% interval, and how far it is
    behind the chosen rate on the same samples. There are none if nothing was swept.
    """

    chosen: dict[str, float]
    points: pd.DataFrame

    def joined(self, other: Rates) -> Rates:
        """These rates and those of other families."""
        tables = [table for table in (self.points, other.points) if len(table)]
        points = pd.concat(tables, ignore_index=True) if tables else self.points
        return Rates(self.chosen | other.chosen, points)

    def inside(self, family: str) -> bool | None:
        """Whether lower and higher rates were tried and are no better. None if nothing was swept."""
        part = self.points[self.points["family"] == family]
        return bool(part["rate"].min() < self.chosen[family] < part["rate"].max()) if len(part) else None


def rate_beyond(tried: Mapping[float, tuple[float, np.ndarray]]) -> float | None:
    """The rate to try next, beyond the edge at which the best one lies; None if the best lies inside."""
    best = best_rate(tried)
    if best == max(tried):
        return float(f"{best * FACTOR:.6g}")
    return float(f"{best / FACTOR:.6g}") if best == min(tried) else None


def best_rate(tried: Mapping[float, tuple[float, np.ndarray]]) -> float:
    """The rate with the highest score; of equal ones the lowest. ``tried`` has the `mean_over_slots` of each."""
    return min(tried, key=lambda rate: (-tried[rate][0], rate))


def mean_over_slots(samples: pd.DataFrame, resamples: int) -> tuple[float, np.ndarray]:
    """Mean over slots of the mean score, and its bootstrap draws [resamples] over samples and seeds.

    A slot draws the same samples whatever was trained, so that draws of two rates are paired. ``samples`` has the
    columns slot, seed, id and score.
    """
    means, draws = [], []
    for slot, part in samples.groupby("slot", sort=False):
        scores = part.pivot(index="seed", columns="id", values="score").to_numpy()
        means.append(scores.mean())
        draws.append(bootstrap_means(scores, resamples, 0, slot))
    return float(np.mean(means)), np.mean(draws, 0)


def choose_rates(
    families: Mapping[str, Callable[..., list[Cell]]], grid: Grid, store: Store, resamples: int, label: str = "rates"
) -> Rates:
    """Choose the learning rate of each family: by name, a function ``(rate, seeds, held_out, passes) -> cells``."""
    if not grid.swept:
        chosen = dict.fromkeys(families, float(grid.tried[0]))
        return Rates(chosen, pd.DataFrame(columns=COLUMNS))
    results: dict[str, dict[float, tuple[float, np.ndarray]]] = {family: {} for family in families}
    waiting = {family: sorted(map(float, grid.tried)) for family in families}
    for _ in range(grid.extend + 1):
        if not waiting:
            break
        cells = {
            (family, rate): families[family](rate, grid.seeds, grid.held_out, grid.passes)
            for family, rates in waiting.items()
            for rate in rates
        }
        keyed = iter(store.run([cell for group in cells.values() for cell in group], label))
        for (family, rate), group in cells.items():
            scores = sample_scores(store.ledger, [next(keyed) for _ in group])
            results[family][rate] = mean_over_slots(scores, resamples)
        beyond = {family: rate_beyond(tried) for family, tried in results.items()}
        waiting = {family: [rate] for family, rate in beyond.items() if rate is not None}
    rows, chosen = [], {}
    for family, tried in results.items():
        chosen[family] = best_rate(tried)
        best, best_draws = tried[chosen[family]]
        for rate, (score, draws) in sorted(tried.items()):
            behind = [best - score, *interval(best_draws - draws)]
            rows.append([family, rate, score, *interval(draws), *behind, rate == chosen[family]])
    return Rates(chosen, pd.DataFrame(rows, columns=COLUMNS))


def rates_from_params(
    given: Mapping[str, Mapping[str, float]], families: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Rates by family that params.yaml gives (``train.given_rates``), for `crab.study.cells.families_of`.

    ValueError if a rate is missing, belongs to no family, or is no rate.
    """
    flat = {f"{run.partition('-')[0]}-{method}-{run.partition('-')[2]}": rate for method, rates in given.items()
            for run, rate in rates.items()}  # fmt: skip
    for family in families:
        if family not in flat:
            raise ValueError(
                f"train.given_rates: no rate of {family}; add it, or set given_rates to null to choose all"
            )
        if not is_rate(flat[family]):
            raise ValueError(f"train.given_rates: {family} has {flat[family]!r}; give a number above 0")
    if spare := [family for family in flat if family not in families]:
        raise ValueError(f"train.given_rates: {spare[0]} is not among the runs of train.methods; take it out")
    return {family: float(flat[family]) for family in families}
