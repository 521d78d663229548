"""Maps of hidden states."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from crab.study.figures.style import save, subplots


def feature_maps(table: pd.DataFrame, path: str | Path) -> Figure:
    """UMAP of the hidden states, a panel a model: colour by task family, each slot's name at the median of its dots.

    Args:
        table: of `crab.study.features`.
    """
    models, families = (list(dict.fromkeys(table[column])) for column in ("model", "family"))
    figure, grid = subplots(1, len(models), figsize=(5 * len(models), 5.6), squeeze=False)
    for axes, name in zip(grid[0], models, strict=True):
        part = table[table["model"] == name]
        sns.scatterplot(
            part, x="x", y="y", hue="family", hue_order=families, s=22, linewidth=0, alpha=0.6, palette="colorblind", ax=axes,
            legend=name == models[0],
        )  # fmt: skip
        axes.set(title=name, xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    handles, labels = grid[0][0].get_legend_handles_labels()
    grid[0][0].get_legend().remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, markerscale=1.5)
    figure.suptitle("Hidden state before the answer")
    figure.draw_without_rendering()  # only now it is known where on the figure a state lies
    for axes, name in zip(grid[0], models, strict=True):
        _name_slots(axes, table[table["model"] == name].groupby("slot", sort=False)[["x", "y"]].median())
    return save(figure, path)


def _name_slots(axes, medians: pd.DataFrame) -> None:
    """Write each slot's name at its median, or as far above it as it takes to cover no other name.

    Args:
        medians: x and y by slot.
    """
    placed: list[Bbox] = []
    for slot, x, y in medians.itertuples():
        rim = [withStroke(linewidth=3, foreground="white")]
        text = axes.annotate(slot, (x, y), (0, 0), textcoords="offset points", ha="center", va="center", fontsize="small", path_effects=rim)
        text.set_in_layout(False)  # the axes stay where they are
        while any(text.get_window_extent().overlaps(other) for other in placed):
            text.set_position((0, text.get_position()[1] + 1))
        placed.append(text.get_window_extent().padded(1))
