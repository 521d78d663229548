"""Joint against single-task training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from crab.study.figures.style import VERDICTS, save, subplots


def transfer_bars(table: pd.DataFrame, path: str | Path) -> Figure:
    """Difference joint - single of each slot, a panel a comparison, with 95 % paired intervals.

    Args:
        table: of `crab.study.transfer`.
    """
    names = list(dict.fromkeys(table["comparison"]))
    slots = list(dict.fromkeys(table["slot"]))
    figure, grid = subplots(
        1, len(names), figsize=(1.5 + 3.1 * len(names), 1.6 + 0.42 * len(slots)), sharex=True, sharey=True, squeeze=False
    )
    for axes, name in zip(grid[0], names, strict=True):
        part = table[table["comparison"] == name].set_index("slot").reindex(slots)
        verdicts = np.where(part["at_chance"].astype(bool), "at chance", part["verdict"])
        spread = np.clip([part["difference"] - part["low"], part["high"] - part["difference"]], 0, None)
        axes.barh(slots, part["difference"], color=[VERDICTS[v] for v in verdicts])
        axes.errorbar(part["difference"], slots, xerr=spread, fmt="none", ecolor="0.25", elinewidth=1)
        axes.axvline(0, color="black", linewidth=1)
        axes.set(title=name.replace(" vs ", "\nvs "), xlabel="difference in score")
    grid[0][0].invert_yaxis()
    widest = max(0.05, table[["low", "high"]].abs().max().max())
    grid[0][0].set_xlim(-1.05 * widest, 1.05 * widest)  # zero in the middle, and noise is not blown up
    handles = [Patch(color=colour, label=verdict) for verdict, colour in VERDICTS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle("Transfer: joint training against single-task training")
    return save(figure, path)
