"""Right answers and their reasons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from crab.study.faithfulness import LUCKY, RIGHT, SHARES, TRUE, WRONG
from crab.study.figures.style import VERDICTS, save, subplots

_COLOURS = {RIGHT: VERDICTS["gain"], LUCKY: "#e6a23c", WRONG: VERDICTS["at chance"]}


def faithfulness_bars(table: pd.DataFrame, path: str | Path) -> Figure:
    """A panel a family of runs, a bar a slot: the answers right by right reasons, by wrong ones, and wrong.

    Thin lines are 95 % intervals of the lower two edges; a diamond marks the share of statements that are true, a
    black tick the share true by chance.

    Args:
        table: of `crab.study.faithfulness`; where it is empty the figure says so.
    """
    families, slots = list(dict.fromkeys(table["family"])), list(dict.fromkeys(table["slot"]))
    figure, grid = subplots(
        max(1, len(families)), 1, figsize=(max(6, 2.5 + 0.75 * len(slots)), 1 + 3.6 * max(1, len(families))), sharex=True, squeeze=False
    )
    if not families:
        grid[0, 0].text(0.5, 0.5, "no explicit run on data with a known scene graph", ha="center", va="center")
    known = table.set_index(["family", "slot", "measure"])[["value", "low", "high", "chance"]]
    for axes, family in zip(grid[:, 0], families):
        wide = known.loc[family].unstack("measure").reindex(slots)
        x, bottom = np.arange(len(slots)), np.zeros(len(slots))
        for share in SHARES:
            value = wide["value"][share].fillna(0).to_numpy()
            axes.bar(x, value, 0.7, bottom, color=_COLOURS[share], label=share)
            bottom = bottom + value
        # what is not wrong is right, whatever the reasons
        for value, low, high, at in (
            (wide["value"][RIGHT], wide["low"][RIGHT], wide["high"][RIGHT], x - 0.2),
            (1 - wide["value"][WRONG], 1 - wide["high"][WRONG], 1 - wide["low"][WRONG], x),
        ):
            axes.errorbar(at, value, np.clip([value - low, high - value], 0, None), fmt="none", ecolor="0.25", elinewidth=1)
        axes.plot(x + 0.2, wide["value"][TRUE], "D", color="white", markeredgecolor="black", markersize=6, label=TRUE)
        axes.hlines(wide["chance"][TRUE], x + 0.05, x + 0.35, color="black", linewidth=2, label="true by chance")
        axes.set(title=family, ylabel="share of answers", ylim=(0, 1.02))
        axes.set_xticks(x, slots, rotation=30)
    if families:
        grid[0, 0].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    grid[-1, 0].set_xlabel("slot")
    figure.suptitle("Right by right reasons")
    return save(figure, path)
