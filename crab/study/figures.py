"""What all figures share: the look, the colours of runs and verdicts, and how a figure is saved.

The figures themselves are drawn in the notebooks.
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import Image
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from crab.core.files import atomic_file

#: Pixels per inch. Figures are shown at half their pixels, so that they are sharp on screens of double resolution.
DPI = 220
#: Colour of what happens to a slot under joint training.
VERDICTS = {"gain": "#2b8a4b", "tie": "#9a9a9a", "loss": "#c0392b", "at chance": "#dcdcdc"}
#: Name for readers and colour by family of runs. The same on every page, and told apart by colour-blind readers.
FAMILIES = {
    "single-lora-bare": ("single-task LoRA", "#767676"),
    "single-lora-explicit": ("single-task LoRA + reasoning", "#404040"),
    "joint-lora-bare": ("joint LoRA", "#e69f00"),
    "joint-lora-explicit": ("joint LoRA + reasoning", "#b87800"),
    "joint-lora_matched-bare": ("joint LoRA, I-LoRA's size", "#56b4e9"),
    "joint-lora_matched-explicit": ("joint LoRA, I-LoRA's size + reasoning", "#0072b2"),
    "joint-ilora-bare": ("I-LoRA", "#5fc9a3"),
    "joint-ilora-explicit": ("I-LoRA + reasoning", "#00805c"),
}
#: Colour by display name.
COLOURS = dict(FAMILIES.values())


def display_name(family: str) -> str:
    """Name of a family of runs for readers, e.g. ``I-LoRA + reasoning``; an unknown family keeps its own name."""
    return FAMILIES.get(family, (family, ""))[0]


def subplots(*args, **kwargs):
    """`plt.subplots` in the study's style. Labels never overlap."""
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.9)
    return plt.subplots(*args, layout="constrained", **kwargs)


def save(figure: Figure, path: str | Path) -> Image:
    """Write a PNG and return it for display. Equal figures are equal files: there are no dates or versions in them.

    256 colours are enough for what is drawn here, and take a third of the bytes.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI)
    plt.close(figure)
    colours = PIL.Image.open(drawn).convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
    with atomic_file(path) as temporary:
        colours.save(temporary, "PNG", optimize=True, dpi=(DPI, DPI))
    return image(path)


def image(path: str | Path) -> Image:
    """A figure for display: one that `save` wrote at half its pixels, any other as it is."""
    with PIL.Image.open(path) as figure:
        sharp = round(figure.info.get("dpi", (0, 0))[0]) == DPI
    return Image(filename=str(path), retina=sharp)


def nothing(text: str, path: str | Path) -> Image:
    """An empty figure that says why there is nothing to draw."""
    figure, axes = subplots(figsize=(8, 0.8))
    axes.axis("off")
    axes.set_title(text)
    return save(figure, path)


def signed_map(axes, values: pd.DataFrame, clear: pd.DataFrame, reach: float) -> None:
    """Draw a heat map of differences: brown below zero, green above, a frame where ``clear`` is true.

    NaN stays grey. ``reach`` is the difference at which colours are full.
    """
    axes.set_facecolor(VERDICTS["at chance"])
    sns.heatmap(values, cmap="BrBG", vmin=-reach, vmax=reach, annot=True, fmt="+.3f", cbar=False, ax=axes)
    for row, column in zip(*clear.to_numpy().nonzero(), strict=True):
        axes.add_patch(Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, fill=False, edgecolor="black", linewidth=1.5))
    axes.tick_params(axis="y", rotation=0)
