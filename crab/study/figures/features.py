"""Maps of hidden states."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from crab.study.figures.style import save, subplots


def feature_maps(table: pd.DataFrame, path: str | Path) -> Figure:
    """UMAP of the hidden states, a panel a model: colour by task family, marker by slot.

    Args:
        table: of `crab.study.features`.
    """
    models = list(dict.fromkeys(table["model"]))
    figure, grid = subplots(1, len(models), figsize=(2.2 + 3.8 * len(models), 4.2), squeeze=False)
    order = {"hue_order": list(dict.fromkeys(table["family"])), "style_order": list(dict.fromkeys(table["slot"]))}
    for axes, name in zip(grid[0], models, strict=True):
        last = name == models[-1]
        sns.scatterplot(
            table[table["model"] == name], x="x", y="y", hue="family", style="slot", s=26, linewidth=0, alpha=0.85,
            palette="colorblind", ax=axes, legend="full" if last else False, **order,
        )  # fmt: skip
        axes.set(title=name, xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    sns.move_legend(grid[0][-1], "center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.suptitle("Hidden state before the answer")
    return save(figure, path)
