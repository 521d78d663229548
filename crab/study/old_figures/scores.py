"""Scores beside chance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from crab.study.figures.style import save, subplots


def score_bars(metrics: Mapping[str, Mapping], path: str | Path) -> Figure:
    """Primary score of each slot by family of runs, with 95 % intervals; a black mark is chance.

    Args:
        metrics: of `crab.study.score.summary`.
    """
    found = {family: {slot: v for slot, v in values.items() if slot != "mean"} for family, values in metrics.items()}
    chance = {slot: v["chance"] for values in found.values() for slot, v in values.items()}
    slots = list(chance)
    figure, axes = subplots(figsize=(max(6, 0.85 * len(slots)), 5.4))
    width = 0.8 / max(1, len(found))
    for k, ((family, values), colour) in enumerate(zip(found.items(), sns.color_palette("deep", len(found)), strict=True)):
        score, low, high = np.array(
            [[values[slot][name] if slot in values else np.nan for slot in slots] for name in ("score", "low", "high")]
        )
        x = np.arange(len(slots)) + (k + 0.5) * width - 0.4
        axes.bar(x, score, width, color=colour, label=family)
        axes.errorbar(x, score, np.clip([score - low, high - score], 0, None), fmt="none", ecolor="0.25", elinewidth=1)
    ends = np.arange(len(slots)) - 0.42, np.arange(len(slots)) + 0.42
    axes.hlines(list(chance.values()), *ends, color="black", linewidth=2, label="chance")
    axes.set_xticks(range(len(slots)), slots)
    axes.set_xlim(-0.6, len(slots) - 0.4)
    axes.set(title="Primary score on the test samples", xlabel="slot", ylabel="score (0 to 1)", ylim=(0, 1.02))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return save(figure, path)
