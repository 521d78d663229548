"""What the base can do, and how it got there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crab.study.figures.style import nothing, save, subplots


COLUMNS = ["accuracy", "majority", "picker", "n"]
NOTHING = "Nothing was trained here: the base is a published checkpoint"


def gate_table(gates: Mapping[str, Mapping[str, float]], least: Mapping[str, float]) -> pd.DataFrame:
    """One row a skill: accuracy, the gate, the majority answer, the random-object picker, and n."""
    table = pd.DataFrame.from_dict(gates, orient="index", columns=None if gates else COLUMNS).rename_axis("skill").reset_index()
    table.insert(2, "gate", table["skill"].map(least))
    return table


def gate_bars(gates: Mapping[str, Mapping[str, float]], least: Mapping[str, float], path: str | Path) -> Figure:
    """Accuracy a skill as a bar, with its gate and the two baselines as marks."""
    if not gates:
        return nothing(NOTHING, path)
    table = gate_table(gates, least)
    figure, axes = subplots(figsize=(9, 0.3 * len(table) + 1.5))
    sns.barplot(table, x="accuracy", y="skill", color="#9ecae1", ax=axes, label="base")
    for column, marker, colour in (("majority", "o", "#555555"), ("picker", "D", "#e6550d"), ("gate", "|", "#31a354")):
        known = table.dropna(subset=column)
        axes.scatter(known[column].astype(float), known["skill"], marker=marker, color=colour, s=60 if marker == "|" else 28,
                     linewidths=3 if marker == "|" else 1, zorder=3, label={"majority": "majority answer", "picker": "random object", "gate": "gate"}[column])  # fmt: skip
    axes.set(title="What the base can do: held-out scenes, exact match", xlabel="accuracy", ylabel="", xlim=(0, 1.02))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return save(figure, path)


def skill_curves(history: Sequence[Mapping], path: str | Path) -> Figure:
    """Accuracy on held-out scenes against training step, one line a skill and one panel a stage that teaches it."""
    if not history:
        return nothing(NOTHING, path)
    table = pd.DataFrame(history).melt(["step", "stage", "loss"], var_name="skill", value_name="accuracy").dropna(subset="accuracy")
    table["stage"] = table.groupby("skill")["stage"].transform("first")
    stages = list(table["stage"].unique())
    height = -(-len(stages) // 2)
    figure, panels = subplots(height, 2, figsize=(11, 2.6 * height + 0.4), sharex=True, sharey=True, squeeze=False)
    for axes, stage in zip(panels.flat, stages, strict=False):
        part = table[table["stage"] == stage]
        sns.lineplot(part, x="step", y="accuracy", hue="skill", style="skill", palette="colorblind", ax=axes)
        axes.axvline(part["step"].min(), color="0.6", linewidth=1, linestyle=":", zorder=0)
        axes.set(title=stage, xlabel="optimizer step", ylabel="accuracy", ylim=(0, 1.02))
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        sns.move_legend(axes, "upper left", bbox_to_anchor=(1, 1), title=None, fontsize="x-small")
    for axes in panels.flat[len(stages):]:
        axes.axis("off")
    figure.suptitle("The staged curriculum: exact match on held-out scenes, by the stage that teaches a skill")
    return save(figure, path)


def encoder_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path) -> Figure:
    """Dense losses of the two encoders, smoothed over 20 steps."""
    if not curves:
        return nothing(NOTHING, path)
    figure, panels = subplots(1, len(curves), figsize=(10, 4))
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        table = pd.DataFrame(curve).rolling(20, min_periods=1).mean()
        sns.lineplot(table, dashes=False, ax=axes)
        axes.set(title=f"{name} encoder", xlabel="optimizer step", ylabel="loss (nats)", yscale="log")
        axes.legend(fontsize="small")
    return save(figure, path)
