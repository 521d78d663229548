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
    """Loss per answer token against passes over the data: a line a run, the mean and range of its seeds.

    Args:
        records: runs' records (``run.json``), with keys run, loss, steps and passes.
    """
    rows = [
        {"run": replace(Run.parse(r["run"]), seed=0).name, "passes": step / r["steps"] * r["passes"], "loss": loss}
        for r in records
        for step, loss in r["loss"]
    ]
    figure, axes = subplots(figsize=(8, 4.5))
    table = pd.DataFrame(rows, columns=["run", "passes", "loss"])
    sns.lineplot(table, x="passes", y="loss", hue="run", errorbar=("pi", 100), ax=axes)
    axes.set(
        title="Training loss", xlabel="passes over the samples", ylabel="cross-entropy per answer token (nats)", yscale="log"
    )
    sns.move_legend(axes, "upper left", bbox_to_anchor=(1, 1), title=None, fontsize="small")
    return save(figure, path)
