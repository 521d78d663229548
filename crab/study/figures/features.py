"""Maps of hidden states."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

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
        for slot, x, y in part.groupby("slot", sort=False)[["x", "y"]].median().itertuples():
            rim = [withStroke(linewidth=3, foreground="white")]
            axes.annotate(slot, (x, y), ha="center", va="center", fontsize="small", path_effects=rim)
        axes.set(title=name, xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    handles, labels = grid[0][0].get_legend_handles_labels()
    grid[0][0].get_legend().remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, markerscale=1.5)
    figure.suptitle("Hidden state before the answer")
    return save(figure, path)
