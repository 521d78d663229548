"""The learning rate of each setting of a method, chosen on samples held out of its training samples.

Every method goes through the same: the same rates, seeds, held-out samples and passes. Where the best rate is at an
edge of the grid, one more beyond it is tried, a limited number of times, and the report says where that was not enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from crab import tasks
from crab.data.files import write_json
from crab.study.grid import Cell, is_rate, run_grid
from crab.study.resample import bootstrap_means, interval
from crab.study.runs import FORMS, SETTINGS, Run

FACTOR = 2.0  # between an edge of the grid and the rate tried beyond it
POINT_COLUMNS = ["setting", "rate", "score", "low", "high", "behind", "behind_low", "behind_high", "chosen"]


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        method: that was swept.
        rates: the learning rate of each of its rows (``joint-explicit``), as the train stage reads them.
        points: a row a setting and rate (`POINT_COLUMNS`): mean over slots of the primary metric on the held-out samples
            and its 95 % bootstrap interval; and how far it is behind the chosen rate's, on the same samples, with the
            interval of that. Empty where nothing was swept.
        extended: how often the grid of each swept setting was extended.
        borrowed: rows that were not swept, and the setting whose rate they take.
    """

    method: str
    rates: dict[str, float]
    points: pd.DataFrame
    extended: dict[str, int]
    borrowed: dict[str, str]

    def inside(self, setting: str) -> bool:
        """Whether lower and higher rates than the chosen one were tried, and did no better."""
        part = self.points[self.points["setting"] == setting]
        return bool(part["rate"].min() < part.loc[part["chosen"], "rate"].item() < part["rate"].max())


def swept_settings(rows: Sequence[str], forms: Sequence[str]) -> dict[str, str]:
    """For each row of a method's runs, the setting whose rate it takes: itself, or its bare form where its own is not swept.

    Raises:
        ValueError: on a row or form that is none.
    """
    if unknown := [form for form in forms if form not in FORMS]:
        raise ValueError(f"sweep.forms: {unknown[0]!r} is unknown; use {' and '.join(FORMS)}")
    found = {}
    for row in rows:
        setting, _, form = row.partition("-")
        if setting not in SETTINGS or form not in FORMS:
            raise ValueError(f"methods.*.runs: {row!r} is unknown; write one of {', '.join(SETTINGS)}, -, and one of {', '.join(FORMS)}")
        found[row] = row if form in forms else f"{setting}-bare"
    return found


def check_rates(rates: Sequence[float], extend: int) -> list[float]:
    """The rates in ascending order. Raises ValueError when they are no grid, or cannot be extended so often."""
    if not rates or not all(map(is_rate, rates)) or len(set(rates)) != len(rates):
        raise ValueError(f"sweep.rates: {list(rates)}; give different numbers above 0, or a single one to take it as it is")
    if isinstance(extend, bool) or not isinstance(extend, int) or extend < 0:
        raise ValueError(f"sweep.extend: {extend!r}; give a whole number of at least 0")
    return sorted(float(r) for r in rates)


def given_rates(given: Mapping[str, Mapping[str, float]], method: str, rows: Sequence[str]) -> dict[str, float]:
    """The known rates of a method's rows. Raises ValueError on one that is missing, of no row, or no rate."""
    found = given.get(method) or {}
    for row in rows:
        if row not in found:
            raise ValueError(f"sweep.given: no rate of {method} for {row}; add it, or set given to null to sweep all")
    if spare := [row for row in found if row not in rows]:
        raise ValueError(f"sweep.given: {method} has no row {spare[0]!r}; its rows are {', '.join(rows)} (methods.{method}.runs)")
    for row in rows:
        rate = found[row]
        if not is_rate(rate):
            raise ValueError(f"sweep.given: {method}, {row}: {rate!r}; give a number above 0")
    return {row: float(found[row]) for row in rows}


def rate_beyond(scores: Mapping[float, float]) -> float | None:
    """The rate to try next, beyond the edge at which the best one is; None where it is inside.

    Args:
        scores: validation score by rate.
    """
    best = best_rate(scores)
    if best == max(scores):
        return float(f"{best * FACTOR:.6g}")
    return float(f"{best / FACTOR:.6g}") if best == min(scores) else None


def best_rate(scores: Mapping[float, float]) -> float:
    """The rate with the highest score; of equal ones the lowest."""
    return min(scores, key=lambda rate: (-scores[rate], rate))


def cells_of(
    method: str, setting: str, rate: float, options: Mapping[str, Any], slots: Sequence[str], seeds: Sequence[int], passes: int,
    held_out: int,
) -> list[Cell]:  # fmt: skip
    """The cells of one setting and rate: a joint run a seed, or a single run a benchmark and seed."""
    kind, _, form = setting.partition("-")
    alone = [slot for slot in slots if tasks.get_slot(slot).test] if kind == "single" else [None]
    return [
        Cell(f"{run.name}@{rate:g}", run, {**options, "learning_rate": rate}, passes, tuple(slots), held_out)
        for seed in seeds
        for run in (Run(kind, method, form, slot, seed) for slot in alone)
    ]


def slot_draws(samples: pd.DataFrame, resamples: int) -> tuple[float, np.ndarray]:
    """Mean over slots of the mean score, and its bootstrap draws [resamples] over each slot's samples, and over seeds.

    A slot draws the same samples whatever was trained, so that draws of two rates are paired; seeds are drawn together for all slots.

    Args:
        samples: columns slot, seed, id and score.
    """
    means, draws = [], []
    for slot, part in samples.groupby("slot", sort=False):
        grid = part.pivot(index="seed", columns="id", values="score").to_numpy()
        means.append(grid.mean())
        draws.append(bootstrap_means(grid, resamples, 0, slot))
    return float(np.mean(means)), np.mean(draws, 0)


def sweep(
    method: str,
    settings: Mapping[str, Any],
    *,
    rates: Sequence[float],
    extend: int,
    forms: Sequence[str],
    seeds: Sequence[int],
    slots: Sequence[str],
    passes: int,
    held_out: int,
    given: Mapping[str, Mapping[str, float]] | None = None,
    resamples: int = 2000,
    run=run_grid,
    **where: Any,
) -> Sweep:
    """Choose the learning rate of each setting of a method.

    Args:
        settings: the method's section; its ``runs`` say which settings there are.
        rates: tried for every setting; a single one is taken as it is, and nothing is trained.
        extend: how often a rate beyond the edge may be added for a setting whose best rate is at the edge.
        forms: forms of answer that are swept; a row of another form takes the rate of its bare one.
        seeds, slots, passes: of the runs. held_out: samples of each slot they are not trained but scored on.
        given: by method and row, rates that are known, from another profile's sweep; they are taken, and nothing is trained.
        run: what trains and scores cells, called as `crab.study.grid.run_grid` with ``where`` (its further arguments).

    Raises:
        ValueError: on parameters that make no sweep, naming them.
    """
    rates, source = check_rates(rates, extend), swept_settings(settings["runs"], forms)
    swept, borrowed = list(dict.fromkeys(source.values())), {row: other for row, other in source.items() if row != other}
    if "learning_rate" in settings:
        raise ValueError(f"methods.{method}.learning_rate: rates are chosen here; for a fixed one, give it alone in sweep.rates")
    if given is not None or len(rates) == 1:
        known = dict.fromkeys(source, rates[0]) if given is None else given_rates(given, method, list(source))
        return Sweep(method, known, pd.DataFrame(columns=POINT_COLUMNS), {}, {})
    if isinstance(held_out, bool) or not isinstance(held_out, int) or held_out < 1:
        raise ValueError(f"sweep.held_out: {held_out!r}; at least 1 sample of each slot must be held out to choose by")
    if not seeds:
        raise ValueError("sweep.seeds: none given; at least 1 is needed")
    options = {name: value for name, value in settings.items() if name != "runs"}

    found: dict[str, dict[float, tuple]] = {setting: {} for setting in swept}
    waiting = {setting: list(rates) for setting in swept}
    extended = dict.fromkeys(swept, 0)
    while waiting:
        batch = {
            (setting, rate): cells_of(method, setting, rate, options, slots, seeds, passes, held_out)
            for setting, tries in waiting.items()
            for rate in tries
        }
        samples, _ = run([cell for cells in batch.values() for cell in cells], label=f"sweep {method}", **where)
        for (setting, rate), cells in batch.items():
            found[setting][rate] = slot_draws(samples[samples["cell"].isin([cell.name for cell in cells])], resamples)
        waiting = {}
        for setting in swept:
            beyond = rate_beyond({rate: score for rate, (score, _) in found[setting].items()})
            if beyond is not None and extended[setting] < extend:
                waiting[setting] = [beyond]
                extended[setting] += 1

    rows, best = [], {}
    for setting, points in found.items():
        best[setting] = best_rate({rate: score for rate, (score, _) in points.items()})
        top, top_draws = points[best[setting]]
        for rate, (score, draws) in sorted(points.items()):
            row = [setting, rate, score, *interval(draws), top - score, *interval(top_draws - draws), rate == best[setting]]
            rows.append(row)
    points = pd.DataFrame(rows, columns=POINT_COLUMNS)
    return Sweep(method, {row: best[other] for row, other in source.items()}, points, extended, borrowed)


def write(result: Sweep, path: str | Path) -> None:
    """Write ``metrics.json``: ``rates``, which the train stage reads, and what they were chosen by."""
    settings = {
        setting: {
            "rate": float(part[part["chosen"]]["rate"].iloc[0]),
            "inside": result.inside(setting),
            "tries": len(part),
            "extended": result.extended[setting],
            "scores": {
                f"{p.rate:g}": {name: round(float(getattr(p, name)), 4) for name in ("score", "low", "high")} for p in part.itertuples()
            },
        }
        for setting, part in result.points.groupby("setting", sort=False)
    }
    write_json(path, {"method": result.method, "rates": result.rates, "settings": settings, "borrowed": result.borrowed})


def headline(result: Sweep) -> str:
    """What was chosen, in words: a Markdown list with a line a row of the method's runs."""
    lines = [f"Learning rates of `{result.method}`:", ""]
    for row, rate in result.rates.items():
        if result.points.empty:
            lines.append(f"- `{row}`: {rate:g}, as given in params.yaml; nothing was swept here.")
        elif row in result.borrowed:
            lines.append(f"- `{row}`: {rate:g}, that of `{result.borrowed[row]}`; this form was not swept itself.")
        else:
            lines.append(f"- `{row}`: {rate:g}, {_standing(result, row)}")
    return "\n".join(lines)


def _standing(result: Sweep, setting: str) -> str:
    """How sure the choice is."""
    part = result.points[result.points["setting"] == setting]
    best = part[part["chosen"]].iloc[0]
    close = part[~part["chosen"] & (part["behind_low"] <= 0)]["rate"]
    said = f"score {best['score']:.3f} [{best['low']:.3f}, {best['high']:.3f}], the best of {len(part)} tried"
    times = result.extended[setting]
    said += f", {times} of them beyond the given ones" if times else ""
    if result.inside(setting):
        said += ", inside the grid"
    else:
        edge = "lowest" if best["rate"] == part["rate"].min() else "highest"
        said += f"; **it is the {edge} tried, so a better one may lie beyond** (sweep.rates, sweep.extend)"
    return said + (f"; not clearly better than {', '.join(f'{rate:g}' for rate in close)}." if len(close) else "; clearly the best.")


def sweep_table(result: Sweep) -> pd.DataFrame:
    """Scores by setting and rate as text, ready to show."""
    rows = [
        {
            "setting": p.setting,
            "learning rate": f"{p.rate:g}",
            "held-out score": f"{p.score:.3f} [{p.low:.3f}, {p.high:.3f}]",
            "behind the best": "chosen" if p.chosen else f"{p.behind:.3f} [{p.behind_low:+.3f}, {p.behind_high:+.3f}]",
        }
        for p in result.points.itertuples()
    ]
    return pd.DataFrame(rows, columns=["setting", "learning rate", "held-out score", "behind the best"])
