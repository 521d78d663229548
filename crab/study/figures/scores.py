"""Scores beside chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from crab.study.figures.style import save, subplots


def score_bars(table: pd.DataFrame, path: str | Path) -> Figure:
    """Primary score of each slot by family of runs, with 95 % intervals; a black tick marks chance.

    Args:
        table: score table of `crab.study.score`.
    """
    first = table[table["primary"].astype(bool)]
    mean = first.groupby(["slot", "family"], sort=False)[["value", "low", "high", "chance"]].mean().reset_index()
    slots, families = list(dict.fromkeys(mean["slot"])), list(dict.fromkeys(mean["family"]))
    figure, axes = subplots(figsize=(max(6, 1.25 * len(slots)), 4.8))
    width = 0.8 / len(families)
    for k, (family, colour) in enumerate(zip(families, sns.color_palette("deep", len(families)), strict=True)):
        part = mean[mean["family"] == family].set_index("slot").reindex(slots)
        x = np.arange(len(slots)) + (k + 0.5) * width - 0.4
        spread = np.clip([part["value"] - part["low"], part["high"] - part["value"]], 0, None)
        axes.bar(x, part["value"], width, color=colour, label=family)
        axes.errorbar(x, part["value"], spread, fmt="none", ecolor="0.25", elinewidth=1)
    chance = mean.groupby("slot", sort=False)["chance"].first().reindex(slots)
    axes.hlines(chance, np.arange(len(slots)) - 0.42, np.arange(len(slots)) + 0.42, color="black", linewidth=2, label="chance")
    axes.set_xticks(range(len(slots)), slots)
    axes.set(title="Primary score on the test samples", xlabel="slot", ylabel="score (0 to 1)", ylim=(0, 1.02))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    return save(figure, path)
