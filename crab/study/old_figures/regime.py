"""Heat maps: where joint LoRA loses, and where routing helps."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from crab.study.figures.signed_map import signed_map
from crab.study.figures.style import nothing, save, subplots
from crab.study.regime import LOSS, Regime, versus_own, versus_rival


def heat_maps(result: Regime, path: str | Path) -> Figure:
    """A row a map, a panel for each measure it has; green above zero, red below, one scale for all.

    A frame marks a point whose 95 % interval leaves out zero. Grey: no slot is above chance there.

    Args:
        result: of `crab.study.regime.regime`; may hold no map.
    """
    measures = [LOSS, *(m for name in result.routed for m in (versus_own(name), versus_rival(name)))]
    if not result.maps:
        return nothing("Nothing was tried in this profile", path)
    known = result.points.groupby("map")["measure"].agg(set)
    of_map = {each.name: [m for m in measures if m in known.get(each.name, ())] for each in result.maps}
    size = len(result.maps), max(1, *map(len, of_map.values()))
    figure, grid = subplots(*size, figsize=(1 + 2.7 * size[1], 0.9 + 2.7 * size[0]), squeeze=False)
    means = pd.to_numeric(result.points["mean"])
    reach = max(0.05, float(means.abs().max())) if means.notna().any() else 0.05
    for line, each in zip(grid, result.maps, strict=True):
        down, across = each.axes
        rows, columns = (list(dict.fromkeys(getattr(p, axis) for p in each.points)) for axis in each.axes)
        for axes in line[len(of_map[each.name]) :]:
            axes.set_axis_off()
        for axes, measure in zip(line, of_map[each.name], strict=False):
            part = result.points[(result.points["map"] == each.name) & (result.points["measure"] == measure)]
            values, clear = np.full((len(rows), len(columns)), np.nan), np.zeros((len(rows), len(columns)), bool)
            for point in part.itertuples():
                place = rows.index(getattr(point, down)), columns.index(getattr(point, across))
                values[place] = np.nan if pd.isna(point.mean) else point.mean
                clear[place] = not pd.isna(point.mean) and (point.low > 0 or point.high < 0)
            image = signed_map(axes, values, clear, rows, columns, reach)
            axes.set(title=fill(f"{each.name}: {measure}", 34), xlabel=across, ylabel=down)
            axes.title.set_fontsize("small")
    figure.colorbar(image, ax=grid.ravel().tolist(), label="mean difference in score", shrink=0.8)
    return save(figure, path)
