"""Routing of I-LoRA."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from crab.study.figures.style import save, subplots


def routing_heatmaps(table: pd.DataFrame, path: str | Path) -> Figure:
    """Mean routing weight, slot by head, a panel a layer; all tokens of a slot weigh alike.

    Args:
        table: of `crab.study.routing`.
    """
    weighted = table.assign(total=table["weight"] * table["tokens"])
    sums = weighted.groupby(["layer", "slot", "head"], sort=False)[["total", "tokens"]].sum()
    mean = (sums["total"] / sums["tokens"]).rename("weight").reset_index()
    layers = sorted(mean["layer"].unique())
    slots = list(dict.fromkeys(mean["slot"]))
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure, grid = subplots(rows, columns, figsize=(2 + 2.6 * columns, (1.2 + 0.34 * len(slots)) * rows), sharey=True, squeeze=False)
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    for axes, layer in zip(grid.flat, layers):
        part = mean[mean["layer"] == layer].pivot(index="slot", columns="head", values="weight").reindex(slots)
        sns.heatmap(
            part, ax=axes, cmap="vlag", center=1 / part.shape[1], vmin=mean["weight"].min(), vmax=mean["weight"].max(),
            annot=True, fmt=".2f", annot_kws={"size": 8}, cbar=axes is grid.flat[len(layers) - 1], cbar_kws={"label": "mean weight"},
        )  # fmt: skip
        axes.set(title=f"layer {layer}", xlabel="head", ylabel="")
    figure.suptitle("Mean routing weight (white: every head alike)")
    return save(figure, path)


def entropy_lines(table: pd.DataFrame, path: str | Path) -> Figure:
    """Mean entropy of a token's routing by layer, a line a segment, with the range over slots."""
    one = table[table["head"] == 0]
    figure, axes = subplots(figsize=(7, 4))
    sns.lineplot(one, x="layer", y="entropy", hue="segment", marker="o", errorbar=("pi", 100), ax=axes)
    axes.set_xticks(sorted(one["layer"].unique()))
    axes.set(title="How undecided the routers are", xlabel="layer", ylabel="entropy (share of its maximum)", ylim=(None, 1.02))
    sns.move_legend(axes, "upper left", bbox_to_anchor=(1, 1), title="tokens of the")
    return save(figure, path)
