"""Held-out score against learning rate."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from crab.study.figures.style import save, subplots


def sweep_lines(points: pd.DataFrame, path: str | Path, chance: float | None = None) -> Figure:
    """Mean held-out score by learning rate, a line a setting, with 95 % intervals; a star marks the chosen rate.

    Args:
        points: of `crab.study.sweep.Sweep`; may be empty where nothing was swept.
        chance: mean over the slots of the best constant answer's score, drawn as a dashed line.
    """
    figure, axes = subplots(figsize=(7.5, 4.5))
    settings = list(dict.fromkeys(points["setting"]))
    for k, (setting, colour) in enumerate(zip(settings, sns.color_palette("deep", len(settings)), strict=True)):
        part = points[points["setting"] == setting].sort_values("rate")
        x = part["rate"] * (1 + 0.02 * (k - (len(settings) - 1) / 2))  # side by side, so that no interval hides another
        spread = [part["score"] - part["low"], part["high"] - part["score"]]
        axes.errorbar(x, part["score"], spread, color=colour, marker="o", markersize=4, elinewidth=1, label=setting)
        best = part["chosen"].astype(bool)
        axes.scatter(x[best], part["score"][best], marker="*", s=220, color=colour, edgecolor="black", linewidth=0.8, zorder=3)
    if chance is not None and settings:
        axes.axhline(chance, color="black", linestyle="--", linewidth=1, label="chance")
    if settings:
        rates = sorted(set(points["rate"]))
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    else:
        axes.text(0.5, 0.5, "rates were given: nothing was swept", transform=axes.transAxes, ha="center")
    axes.set(title="Learning rates on held-out training samples", xlabel="learning rate", ylabel="mean score over slots (0 to 1)")
    return save(figure, path)
