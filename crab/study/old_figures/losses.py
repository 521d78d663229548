"""Training loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from crab.study.figures.style import save, subplots
from crab.study.runs import Run


def loss_curves(records: Sequence[Mapping], path: str | Path) -> Figure:
    """Loss per answer token against passes over the data: a line a run, the mean of its seeds; joint runs are black, with their range.

    Args:
        records: runs' records (``run.json``), with keys run, loss, steps and passes.
    """
    rows = [
        {"run": run.name, "joint": run.slot is None, "passes": step / r["steps"] * r["passes"], "loss": loss}
        for r in records
        for run in [replace(Run.parse(r["run"]), seed=0)]
        for step, loss in r["loss"]
    ]
    figure, axes = subplots(figsize=(8, 4.5))
    table = pd.DataFrame(rows, columns=["run", "joint", "passes", "loss"])
    joint, single = table[table["joint"].astype(bool)], table[~table["joint"].astype(bool)]
    if not single.empty:
        sns.lineplot(single, x="passes", y="loss", hue="run", palette="tab20", errorbar=None, linewidth=1.2, ax=axes)
    if not joint.empty:
        black = dict.fromkeys(joint["run"], "black")
        sns.lineplot(joint, x="passes", y="loss", hue="run", style="run", palette=black, errorbar=("pi", 100), linewidth=2.5, ax=axes)
    axes.set(
        title="Training loss", xlabel="passes over the samples", ylabel="cross-entropy per answer token (nats)", yscale="log"
    )
    sns.move_legend(axes, "upper left", bbox_to_anchor=(1, 1), title=None, fontsize="small")
    return save(figure, path)
