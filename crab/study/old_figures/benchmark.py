"""What an adapted layer costs, in time and in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from crab.study.benchmark_layer import BASE, ILORA, LOOP, LORA, VARIANTS, WIDE
from crab.study.figures.style import save, subplots

_COLOURS = {BASE: "#9a9a9a", LORA: "#3b78b5", WIDE: "#8fbbe0", LOOP: "#c0392b", ILORA: "#2b8a4b"}
_AXES = {"heads": "heads N", "rank": "rank r", "tokens": "tokens"}


def _panels(costs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """A part of the table for each device and number format, with its name."""
    return [(f"{dtype} on {device}", part) for (device, dtype), part in costs.groupby(["device", "dtype"], sort=False)]


def shape_bars(costs: pd.DataFrame, path: str | Path) -> Figure:
    """Forward and backward of each variant as a multiple of the frozen base's, a group of bars a shape, logarithmic.

    Thin lines are quartiles over repetitions; a black tick is the roofline.

    Args:
        costs: of `crab.study.benchmark_layer.layer`.
    """
    costs = costs[(costs["sweep"] == "shape") & (costs["pass"] != "forward")]
    panels = _panels(costs)
    figure, grid = subplots(len(panels), 1, figsize=(9.5, 1 + 3.2 * len(panels)), squeeze=False)
    for axes, (name, part) in zip(grid[:, 0], panels, strict=True):
        bases = part[part["variant"] == BASE]
        x = np.arange(len(bases))
        for k, variant in enumerate(VARIANTS[1:]):
            rows, at = part[part["variant"] == variant], x + 0.2 * (k - 1.5)
            axes.bar(at, rows["over_base"] - 1, 0.18, bottom=1, color=_COLOURS[variant], label=variant)
            axes.vlines(at, rows["over_base_q1"], rows["over_base_q3"], color="0.3", linewidth=1)
            bound = rows["roofline_seconds"].to_numpy() / bases["roofline_seconds"].to_numpy()
            axes.hlines(bound, at - 0.09, at + 0.09, color="black", linewidth=2.5, zorder=3)
        axes.axhline(1, color=_COLOURS[BASE], linewidth=2)
        axes.set(title=name, ylabel="time / time of the base")
        _factors(axes)
        said = [f"{r.width_in} to {r.width_out}\n{r.tokens} tokens\nr {r.rank}, N {r.heads}" for r in bases.itertuples()]
        axes.set_xticks(x, said, fontsize="small")
        axes.grid(axis="x", visible=False)
    grid[0, 0].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    grid[-1, 0].set_xlabel("layer")
    figure.suptitle("Forward and backward of one layer, frozen base included")
    return save(figure, path)


def growth_lines(costs: pd.DataFrame, path: str | Path) -> Figure:
    """Forward and backward as a multiple of the base's, against heads, rank and tokens; a row of panels a number format.

    The band spans the quartiles over repetitions; dotted are the rooflines of I-LoRA and of LoRA of its rank.
    """
    costs = costs[costs["sweep"].isin(_AXES) & (costs["pass"] != "forward")]
    panels = _panels(costs)
    figure, grid = subplots(len(panels), len(_AXES), figsize=(11, 0.8 + 2.9 * len(panels)), squeeze=False, sharey="row")
    for row, (name, part) in zip(grid, panels, strict=True):
        for axes, (sweep, label) in zip(row, _AXES.items(), strict=True):
            rows = part[part["sweep"] == sweep].sort_values(sweep)
            base = rows.loc[rows["variant"] == BASE, "roofline_seconds"].to_numpy()
            for variant in VARIANTS:
                line = rows[rows["variant"] == variant]
                axes.plot(line[sweep], line["over_base"], "o-", color=_COLOURS[variant], markersize=4, label=variant)
                axes.fill_between(line[sweep], line["over_base_q1"], line["over_base_q3"], color=_COLOURS[variant], alpha=0.2, linewidth=0)
                if variant in (LORA, ILORA):
                    bound = line["roofline_seconds"].to_numpy() / base
                    axes.plot(line[sweep], bound, ":", color=_COLOURS[variant], label=f"{variant}, roofline")
            axes.set(xlabel=label, title=_fixed(rows, sweep))
            _factors(axes)
            _doubling(axes, rows[sweep])
        row[0].set_ylabel(f"{name}\ntime / time of the base")
    grid[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.suptitle("How the cost of forward and backward grows")
    return save(figure, path)


def memory_bars(costs: pd.DataFrame, path: str | Path) -> Figure:
    """Memory as a multiple of plain LoRA's: kept for backward, and at the peak; by shape, and against heads.

    The first number format alone is drawn; the multiples hardly differ between formats.
    """
    _, costs = _panels(costs[costs["pass"] == "forward"])[0]
    figure, grid = subplots(2, 2, figsize=(11, 7.5), sharex="col", sharey="row")
    _memory(grid[0], costs, "kept_bytes", VARIANTS[1:])  # the base keeps nothing
    _memory(grid[1], costs, "peak_bytes", VARIANTS)
    for axes, label in ((grid[0, 0], "kept from forward to backward"), (grid[1, 0], "peak of forward and backward")):
        axes.set_ylabel(f"{label}\nbytes / bytes of LoRA, rank r")
    grid[1, 0].set_xlabel("layer")
    grid[1, 1].set_xlabel("heads N")
    grid[1, 1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.suptitle("Memory of one layer, weights left out")
    return save(figure, path)


def _memory(row, costs: pd.DataFrame, column: str, names: Sequence[str]) -> None:
    """Two panels of one quantity of `costs`, as multiples of plain LoRA's: bars by shape, lines against heads."""
    plain = costs[costs["variant"] == LORA].set_index(["sweep", "width_in", "width_out", "rank", "tokens", "heads"])[column]
    key = list(costs[list(plain.index.names)].itertuples(index=False, name=None))
    costs = costs.assign(multiple=costs[column].to_numpy() / plain.loc[key].to_numpy())
    left, right = row
    shapes = costs[costs["sweep"] == "shape"]
    said = list(dict.fromkeys(f"{r.width_in}\nto {r.width_out}" for r in shapes.itertuples()))
    heads = costs[costs["sweep"] == "heads"]
    width = 0.8 / len(names)
    for k, variant in enumerate(names):
        rows, at = shapes[shapes["variant"] == variant], np.arange(len(said)) + width * (k - (len(names) - 1) / 2)
        left.bar(at, rows["multiple"], 0.9 * width, color=_COLOURS[variant], label=variant)
        rows = heads[heads["variant"] == variant].sort_values("heads")
        right.plot(rows["heads"], rows["multiple"], "o-", color=_COLOURS[variant], label=variant)
    left.set_xticks(range(len(said)), said, fontsize="small")
    left.grid(axis="x", visible=False)
    left.set(title=f"{int(shapes['heads'].iloc[0])} heads" if len(shapes) else "")
    right.set(title=_fixed(heads, "heads"))
    _doubling(right, heads["heads"])
    for axes in row:
        axes.axhline(1, color="0.3", linewidth=1)


def _fixed(rows: pd.DataFrame, sweep: str) -> str:
    """The sizes a sweep holds still, as a title."""
    if rows.empty:
        return ""
    first = rows.iloc[0]
    said = {"tokens": f"{first['tokens']} tokens", "rank": f"r {first['rank']}", "heads": f"N {first['heads']}"}
    return ", ".join([f"{first['width_in']} to {first['width_out']}", *(text for name, text in said.items() if name != sweep)])


def _factors(axes) -> None:
    """A logarithmic axis for multiples of the base's time, with plain numbers."""
    axes.set_yscale("log")
    top = axes.get_ylim()[1]
    axes.set_ylim(0.95, max(top, 1.5))
    axes.yaxis.set_major_locator(FixedLocator([1, 1.1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _doubling(axes, values: pd.Series) -> None:
    """A logarithmic axis with ticks at the sizes that were measured."""
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(values)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
