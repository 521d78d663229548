"""Joint against single-task training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from crab.study.figures.style import VERDICTS, nothing, save, subplots
from crab.study.transfer import PAPER

SIDES = {"positive": ("gain", 1), "negative": ("loss", -1)}


def rate_bars(summary: Mapping[str, Mapping], path: str | Path) -> Figure:
    """Shares of slots that gain (to the right) and lose (to the left) by each joint run, the paper's on top.

    The full colour is the part that is clear by its own interval; the line on a bar is its exact 95 % interval over slots.

    Args:
        summary: by joint family, of `crab.study.transfer`.
    """
    names = ["paper: joint LoRA", "paper: Crab+", *summary]
    figure, axes = subplots(figsize=(8.5, 1.7 + 0.42 * len(names)))
    axes.barh(names[0], -PAPER["negative"], color="white", edgecolor=VERDICTS["loss"], hatch="//")
    axes.barh(names[1], PAPER["positive"], color="white", edgecolor=VERDICTS["gain"], hatch="//")
    for family, values in summary.items():
        if values["positive_rate"] is None:
            axes.barh(family, 0)
            axes.annotate("no slot above chance", (0, family), xytext=(4, 0), textcoords="offset points", va="center", fontsize="small")
            continue
        for side, (verdict, sign) in SIDES.items():
            share, (low, high) = values[f"{side}_rate"], values[f"{side}_rate_interval"]
            axes.barh(family, sign * share, color=VERDICTS[verdict], alpha=0.4)
            axes.barh(family, sign * values[f"clear_{verdict}"] / values["slots_counted"], color=VERDICTS[verdict])
            axes.plot([sign * low, sign * high], [family, family], color="0.25", linewidth=1)
    axes.axvline(0, color="black", linewidth=1)
    axes.invert_yaxis()
    ticks = np.linspace(-1, 1, 9)
    axes.set_xticks(ticks, [f"{abs(tick):.0%}" for tick in ticks])
    axes.set(title="Slots that lose (left) and gain (right) by joint training", xlabel="share of the slots above chance")
    axes.set_xlim(-1.02, 1.02)
    return save(figure, path)


def transfer_bars(table: pd.DataFrame, path: str | Path) -> Figure:
    """Difference joint - baseline of each slot, a panel a comparison and three in a row, with 95 % paired intervals.

    Args:
        table: of `crab.study.transfer`.
    """
    names = list(dict.fromkeys(table["comparison"]))
    slots = list(dict.fromkeys(table["slot"]))
    if not names:
        return nothing("nothing to compare with", path)
    across = min(3, len(names))
    down = -(-len(names) // across)
    figure, grid = subplots(
        down, across, figsize=(1.5 + 3.3 * across, 1.2 + (0.8 + 0.3 * len(slots)) * down), sharex=True, sharey=True, squeeze=False
    )
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for axes, name in zip(grid.flat, names, strict=False):
        part = table[table["comparison"] == name].set_index("slot").reindex(slots)
        verdicts = np.where(part["at_chance"].astype(bool), "at chance", part["verdict"])
        spread = np.clip([part["difference"] - part["low"], part["high"] - part["difference"]], 0, None)
        axes.barh(slots, part["difference"], color=[VERDICTS[v] for v in verdicts])
        axes.errorbar(part["difference"], slots, xerr=spread, fmt="none", ecolor="0.25", elinewidth=1)
        axes.axvline(0, color="black", linewidth=1)
        axes.set(title=name.replace(" vs ", "\nvs "), xlabel="difference in score")
        axes.tick_params(labelbottom=True)  # of the upper rows too
    grid[0][0].invert_yaxis()
    widest = max(0.05, table[["low", "high"]].abs().max().max())
    grid[0][0].set_xlim(-1.05 * widest, 1.05 * widest)  # zero in the middle, and noise is not blown up
    handles = [Patch(color=colour, label=verdict) for verdict, colour in VERDICTS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle("Difference on each slot")
    return save(figure, path)
