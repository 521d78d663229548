"""All variants that were tried: their lead over plain LoRA of their size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crab.study.figures.signed_map import signed_map
from crab.study.figures.style import VERDICTS, nothing, save, subplots

COLOURS = {"routed": "#4c72b0", "unrouted heads": "#8172b3", "own adapters": "#937860", "instruction first": "#dd8452", "plain": "#9a9a9a"}
NOTHING = "Nothing was tried in this profile"


def variant_bars(rows: pd.DataFrame, baseline: str, against_baseline: Mapping, against_rival: Mapping, path: str | Path) -> Figure:
    """Left: difference to the baseline. Middle: difference to the rival of equal size. Right: slots that gain and lose on it.

    Lines are 95 % intervals over samples (and seeds) of the mean over the slots above chance.

    Args:
        rows, against_baseline, against_rival: of `crab.study.ablation.Ablation`; may be empty.
    """
    names = list(rows["variant"])
    if not names:
        return nothing(NOTHING, path)
    figure, axes = subplots(1, 3, figsize=(14, 1.6 + 0.36 * max(3, len(names))), sharey=True, width_ratios=(1, 1, 0.7))
    for panel, values in zip(axes, (against_baseline, against_rival, {}), strict=False):
        for place, row in enumerate(rows.itertuples()):
            summary = values.get(row.variant)
            if summary is None or summary["mean_difference"] is None:
                continue
            low, high = summary["mean_difference_interval"]
            mean = summary["mean_difference"]
            reach = np.clip([[mean - low], [high - mean]], 0, None)
            panel.errorbar(mean, place, xerr=reach, fmt="o", color=COLOURS[row.kind], elinewidth=1.5)
    for place, name in enumerate(names):
        summary = against_rival.get(name)
        if summary is not None:
            axes[2].barh(place, summary["gain"], color=VERDICTS["gain"])
            axes[2].barh(place, -summary["loss"], color=VERDICTS["loss"])
    for panel in axes:
        panel.axvline(0, color="black", linewidth=1)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=panel is axes[2]))
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set(title=f"Less {baseline}", xlabel="difference in score")
    axes[1].set(title="Less plain joint LoRA of its size", xlabel="difference in score")
    axes[2].set(title="... slot by slot", xlabel="slots that lose (left), gain (right)")
    for kind, colour in COLOURS.items():
        if kind in set(rows["kind"]):
            axes[0].scatter([], [], color=colour, label=kind)
    figure.legend(loc="outside lower center", ncols=len(COLOURS), frameon=False)
    return save(figure, path)


def slot_map(slots: pd.DataFrame, rivals: Mapping[str, str], path: str | Path) -> Figure:
    """Difference of each variant (a row) to its rival on each slot (a column); on grey where the slot is at chance.

    Args:
        slots: of `crab.study.ablation.Ablation`. rivals: by variant, see `crab.study.ablation.rivals_of`; may be empty.
    """
    if not rivals:
        return nothing(NOTHING, path)
    columns = list(dict.fromkeys(slots["slot"]))
    figure, axes = subplots(figsize=(3.5 + 0.8 * max(6, len(columns)), 1.4 + 0.36 * max(3, len(rivals))))
    values = np.full((len(rivals), len(columns)), np.nan)
    clear, grey = np.zeros_like(values, bool), np.zeros_like(values, bool)
    for i, (name, rival) in enumerate(rivals.items()):
        for row in slots[slots["comparison"] == f"{name} vs {rival}"].itertuples():
            at = i, columns.index(row.slot)
            values[at], grey[at] = row.difference, row.at_chance
            clear[at] = not row.at_chance and (row.low > 0 or row.high < 0)
    reach = max(0.05, float(np.nanmax(np.abs(values), where=~grey, initial=0)))
    image = signed_map(axes, values, clear, list(rivals), columns, reach, grey)
    axes.tick_params(axis="x", rotation=45)
    axes.set(title="Each variant less plain joint LoRA of its size, slot by slot")
    figure.colorbar(image, ax=axes, label="difference in score")
    return save(figure, path)
