"""What heads and routing are worth, and how slots' gradients agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from crab.study.conflict import ALL, POINTS, RELIABLE
from crab.study.figures.style import save, subplots
from crab.study.mechanism import HEAD, OFF, OTHER, OWN, RESCALED, UNIFORM, named

COST = "log-likelihood lost (nats a token)"


def mechanism_bars(summary: Mapping, conflict: pd.DataFrame, path: str | Path) -> Figure:
    """Left: mean cost over slots of each change of the routing. Right: mean cosine between slots' gradients by part.

    Lines are 95 % intervals. Points of gradients that cannot be told from noise are hollow.

    Args:
        summary: of `crab.study.mechanism.causes`. conflict: summary of `crab.study.conflict.conflicts`.
    """
    figure, (left, right) = subplots(1, 2, figsize=(13, 5), width_ratios=(1, 1.2))
    cost = {name: values for name, values in summary["cost"].items() if name != OFF}
    means = [values["mean"] for values in cost.values()]
    reach = np.clip([[v["mean"] - v["low"] for v in cost.values()], [v["high"] - v["mean"] for v in cost.values()]], 0, None)
    colours = ["#4c72b0" if name.startswith("head ") else "#dd8452" for name in cost]
    left.barh(list(cost), means, color=colours, xerr=reach, ecolor="0.25")
    left.axvline(0, color="black", linewidth=1)
    left.invert_yaxis()
    left.set(title=f"What a change costs (no adapter at all: {summary['cost'][OFF]['mean']:.2f})", xlabel=COST)

    conflict = conflict.assign(name=conflict["method"] + ", " + conflict["part"])
    names = [name for name in dict.fromkeys(conflict["name"])]
    for place, (point, colour) in enumerate(zip(POINTS, sns.color_palette("deep", len(POINTS)), strict=True)):
        part = conflict[conflict["point"] == point]
        y = part["name"].map(names.index) + 0.22 * (place - 1)
        reach = np.clip([part["cosine"] - part["cosine_low"], part["cosine_high"] - part["cosine"]], 0, None)
        right.errorbar(part["cosine"], y, xerr=reach, fmt="none", ecolor=colour, elinewidth=1.5)
        filled = part["reliability"] >= RELIABLE
        for kept, face, label in ((filled, colour, point), (~filled, "white", f"{point} (noise)")):
            if kept.any():
                right.scatter(part["cosine"][kept], y[kept], s=34, label=label, zorder=3, facecolor=face, edgecolor=colour)
    right.axvline(0, color="black", linewidth=1)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(title="Do slots pull the same way?", xlabel="mean cosine between slots' gradients (below 0: conflict)")
    right.legend(title="of training", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))  # beside the points, which lie anywhere
    figure.suptitle("What I-LoRA's routing is worth, and how slots' gradients agree")
    return save(figure, path)


def conflict_maps(pairs: pd.DataFrame, point: str, path: str | Path, part: str = ALL) -> Figure:
    """Cosines between slots' gradients, a panel a method; the diagonal says how reliable a slot's own gradient is.

    Args:
        pairs: table of `crab.study.conflict.conflicts`. point: one of its points. part: of the adapter.
    """
    pairs = pairs[(pairs["point"] == point) & (pairs["part"] == part)]
    methods, slots = list(dict.fromkeys(pairs["method"])), list(dict.fromkeys(pairs["one"]))
    figure, grid = subplots(1, len(methods), figsize=(1.5 + (1 + 0.25 * len(slots)) * len(methods), 1.8 + 0.25 * len(slots)), squeeze=False)
    for axes, method in zip(grid[0], methods, strict=True):
        found = pairs[pairs["method"] == method].pivot(index="one", columns="other", values="cosine").reindex(index=slots, columns=slots)
        found = found.where(found.notna(), found.T)
        sns.heatmap(found, ax=axes, cmap="vlag_r", center=0, vmin=-1, vmax=1, square=True, linewidths=0.3, cbar=method == methods[-1],
                    cbar_kws={"label": "cosine", "shrink": 0.7})  # fmt: skip
        axes.set(title=method, xlabel="gradient of", ylabel="")
    figure.suptitle(f"Gradients of slots against each other, {point} (red: conflict; diagonal: reliability)")
    return save(figure, path)


def head_costs(effects: pd.DataFrame, path: str | Path) -> Figure:
    """Cost of each change to each slot, a row a slot: heads off, in both ways, uniform routing, the slot's own mean, and no adapter.

    Without the adapter nearly all is lost that there is to lose; colours are of the other changes.

    Args:
        effects: of `crab.study.mechanism.causes`.
    """
    part = effects[effects["change"].isin([HEAD, RESCALED, UNIFORM, OWN, OFF])]
    panels = {"cost": COST, "exact": "exact answers lost (share)"}
    figure, grid = subplots(1, 2, figsize=(15, 1.9 + 0.34 * part["slot"].nunique()), sharey=True)
    names = pd.Series(map(named, part["change"], part["of"]), index=part.index)
    order = [name for name in dict.fromkeys(names) if name != OFF] + [OFF]
    for axes, (column, label) in zip(grid, panels.items(), strict=True):
        found = part.assign(name=names).pivot(index="slot", columns="name", values=column)
        found = found.reindex(index=list(dict.fromkeys(part["slot"])), columns=order)
        most = found.drop(columns=OFF).max().max()
        sns.heatmap(found, ax=axes, cmap="vlag", center=0, vmax=most, annot=True, fmt=".2f", annot_kws={"size": 8}, cbar=False)
        axes.set(title=label, xlabel="", ylabel="")
        axes.set_xticks(axes.get_xticks(), axes.get_xticklabels(), rotation=35, ha="right")
    grid[0].set_ylabel("slot")
    figure.suptitle("Which slots fall when a head is switched off")
    return save(figure, path)


def swap_map(effects: pd.DataFrame, path: str | Path) -> Figure:
    """Cost to each slot (row) of being routed as another one (column) is on average, rather than as itself.

    Args:
        effects: of `crab.study.mechanism.causes`.
    """
    part = effects[effects["change"] == OTHER]
    slots = list(dict.fromkeys(effects["slot"]))
    found = part.pivot(index="slot", columns="of", values="cost").reindex(index=slots, columns=slots)
    figure, axes = subplots(figsize=(3 + 0.52 * len(slots), 1.8 + 0.38 * len(slots)))
    sns.heatmap(found, ax=axes, cmap="vlag", center=0, annot=True, fmt=".1f", annot_kws={"size": 8},
                cbar_kws={"label": COST})  # fmt: skip
    axes.set(title="Mean routing of another slot in place of its own", xlabel="routed as", ylabel="slot")
    return save(figure, path)


def head_likeness(heads: pd.DataFrame, path: str | Path) -> Figure:
    """Cosine of heads' updates and overlap of the spaces they write to, a dot a pair and module.

    Args:
        heads: of `crab.study.mechanism.head_similarity`.
    """
    table = heads.assign(kind=heads["module"].str.rpartition(".")[2], layer=heads["module"].str.extract(r"layers\.(\d+)\.")[0])
    figure, (left, right) = subplots(1, 2, figsize=(12, 4))
    for axes, column in ((left, "cosine"), (right, "overlap")):
        sns.stripplot(table, x="kind", y=column, hue="layer", ax=axes, size=5, jitter=False, dodge=True, legend=axes is right)
        axes.axhline(0, color="black", linewidth=1)
        axes.tick_params(axis="x", rotation=25)
    kinds = list(dict.fromkeys(table["kind"]))
    chance = table.groupby("kind")["overlap_by_chance"].mean().reindex(kinds)
    right.hlines(chance, np.arange(len(kinds)) - 0.4, np.arange(len(kinds)) + 0.4, color="black", linewidth=2)
    left.set(title="Do heads write the same?", xlabel="", ylabel="cosine of updates")
    right.set(title="Do they write to the same space? (black: random spaces)", xlabel="", ylabel="overlap (0 to 1)", ylim=(-0.02, 1.02))
    sns.move_legend(right, "upper left", bbox_to_anchor=(1, 1), title="layer")
    figure.suptitle("How alike two heads of a module are")
    return save(figure, path)
