"""How all figures look, and how they are saved."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

from crab.data.files import atomic_file

VERDICTS = {"gain": "#2b8a4b", "tie": "#9a9a9a", "loss": "#c0392b", "at chance": "#dcdcdc"}


def subplots(*args, **kwargs):
    """`plt.subplots` in the study's style, without overlapping labels."""
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.9)
    return plt.subplots(*args, layout="constrained", **kwargs)


def nothing(words: str, path: str | Path) -> Figure:
    """A figure that says why there is none."""
    figure, axes = subplots(figsize=(8, 0.8))
    axes.axis("off")
    axes.set_title(words)
    return save(figure, path)


def save(figure: Figure, path: str | Path) -> Figure:
    """Write a png aside and rename it; without dates or versions, so that equal figures are equal files."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return figure
