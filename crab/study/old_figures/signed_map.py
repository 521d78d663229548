"""A heat map of differences: green above zero, red below, a frame where an interval leaves out zero."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

MISSING = "#dcdcdc"


def signed_map(
    axes, values: np.ndarray, clear: np.ndarray, rows: Sequence, columns: Sequence, reach: float, grey: np.ndarray | bool = False
) -> AxesImage:
    """Draw on ``axes``; returns what a colour bar needs.

    Args:
        values: float [rows, columns], NaN where there is none (grey). clear: bool [rows, columns], which get a frame.
        reach: the value at which colours are full, on both sides of zero. grey: bool [rows, columns], values written on grey.
    """
    axes.set_facecolor(MISSING)
    grey = np.broadcast_to(grey, values.shape)
    image = axes.imshow(np.where(grey, np.nan, values), cmap="RdYlGn", vmin=-reach, vmax=reach, aspect="auto")
    for i, j in zip(*np.nonzero(~np.isnan(values)), strict=True):
        ink = "0.4" if grey[i, j] else "white" if abs(values[i, j]) > 0.7 * reach else "black"  # the map's ends are dark
        axes.text(j, i, f"{values[i, j]:+.3f}", ha="center", va="center", fontsize="small", color=ink)
        if clear[i, j]:
            axes.add_patch(Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, fill=False, edgecolor="black", linewidth=1.5))
    axes.grid(False)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    return image
