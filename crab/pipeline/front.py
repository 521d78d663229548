"""The front page of a report: the finding, the leading figure, four cards, and a line about each page."""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from crab.core.files import atomic_file, read_json
from crab.pipeline.stages import TEMPLATES

#: Pixels of a card's picture: twice its width on the page.
WIDTH = 560


@dataclass(frozen=True)
class Entry:
    """What the front page says about a notebook: its texts as Markdown, and what its last execution took.

    Attributes:
        leading: path of the figure that the front page shows, from the report's folder; of the cell tagged ``leading``.
            The first notebook that has one is taken.
    """

    stage: str
    title: str
    question: str
    answer: str
    leading: str | None
    seconds: float
    peak_gib: float


@dataclass(frozen=True)
class Card:
    """A card: a number with its unit and a sentence, a picture and the page that says more.

    Attributes:
        picture: path of a figure from the report's folder. part: left, top, right and bottom of the part of it that is
            shown, as shares of its width and height.
    """

    name: str
    stage: str
    number: str
    text: str
    picture: str
    alt: str
    part: tuple[float, float, float, float] = (0, 0, 1, 1)


def _drawn(figure: Path) -> bool:
    """Whether a figure is there and is more than the line of text that `crab.study.figures.nothing` gives."""
    if not figure.is_file():
        return False
    with PIL.Image.open(figure) as whole:
        return whole.width < 10 * whole.height


def _data(reports: Path, models: Path) -> Card:
    records = read_json(reports / "build" / "metrics.json")["records"]
    text = "samples in the layout of AV-UIE v2. Each one, and each media file, is checked."
    alt = "Frames of one clip, in which things of two colours come and go"
    figure = "build/figures/samples.png"
    with PIL.Image.open(reports / figure) as whole:
        inches = 14 * whole.height / whole.width  # the second row lies equally far from the top, however many there are
    return Card("Data", "build", f"{records:,}", text, figure, alt, (0.023, 3.68 / inches, 0.464, 5.44 / inches))


def _model(reports: Path, models: Path) -> Card:
    pointer = models / reports.name / "base.json"
    base = pointer.parent / read_json(pointer)["folder"]
    number = f"{read_json(base / 'training.json')['parameters'] / 1e6:.1f} M"
    if read_json(base / "config.json")["model_type"] == "crab_bridge":
        text = "parameters: a frozen language model that sees and hears through projectors."
        return Card("Model", "base", number, text, "base/figures/encoders.png", "How near projectors come to words")
    text = "parameters of the frozen base, a Qwen2.5-Omni trained from random weights."
    if not _drawn(reports / "base/figures/stages.png"):  # the base was there already
        alt = "Accuracy of the base on its first skills, beside simple baselines"
        return Card("Model", "base", number, text, "base/figures/gates.png", alt, (0, 0.05, 0.8, 0.354))
    alt = "Accuracy of the base on nine skills of space and time, growing over its training"
    return Card("Model", "base", number, text, "base/figures/stages.png", alt, (0.537, 0.344, 1, 0.637))


def _study(reports: Path, models: Path) -> Card:
    cells = read_json(reports / "train" / "cells.json")
    seeds, slots = len({cell["seed"] for cell in cells}), len({slot for cell in cells for slot in cell["slots"]})
    text = f"adapters: single-task and joint ones, {slots} slots, {seeds} seed{'s' * (seeds > 1)}."
    alt = "Scores of each method by slot"
    return Card("Study", "evaluate", str(len(cells)), text, "evaluate/figures/scores.png", alt)


def _method(reports: Path, models: Path) -> Card:
    row = read_json(reports / "transfer" / "metrics.json")["against_rival"]["joint-ilora-bare"]
    low, high = row["mean_difference_interval"]
    text = f"({low:+.3f} to {high:+.3f}) mean score of I-LoRA minus plain LoRA of its size, with its 95% interval."
    alt = "Routing weight of each head, by slot and layer"
    return Card("Method", "routing", f"{row['mean_difference']:+.3f}", text, "routing/figures/heads.png", alt)


def _cards(reports: Path, models: Path) -> list[Card]:
    """The cards whose stages have run. ValueError on a damaged file."""
    cards = []
    for make in (_data, _model, _study, _method):
        with suppress(FileNotFoundError, KeyError, TypeError):  # a profile need not have all stages and methods
            cards.append(make(reports, models))
    return [card for card in cards if _drawn(reports / card.picture)]


def _thumbnail(card: Card, reports: Path) -> tuple[str, int, int]:
    """Write a card's picture, small; returns its path from the report's folder, its width and its height."""
    with PIL.Image.open(reports / card.picture) as whole:
        part = [round(share * side) for share, side in zip(card.part, 2 * whole.size, strict=True)]
        picture = whole.convert("RGB").crop(part)
    picture.thumbnail((WIDTH, WIDTH), PIL.Image.Resampling.LANCZOS)
    path = reports / "pages" / f"card-{card.name.lower()}.png"
    with atomic_file(path) as temporary:
        picture.quantize(128).save(temporary, format="PNG", optimize=True)
    return path.relative_to(reports).as_posix(), *picture.size


def sentences(text: str) -> str:
    """The first two sentences of a text in Markdown, those of its first item if it is a list."""
    lines = [line for line in text.splitlines() if line.strip() and not line.rstrip().endswith(":")]
    first = lines[0].removeprefix("- ") if lines else ""
    return " ".join(re.split(r"(?<=[.!?])\s+(?=[A-Z*`])", first)[:2])


def page(entries: Sequence[Entry], reports: Path, models: Path, everywhere: tuple[str, Entry] | None = None) -> str:
    """The front page as HTML; writes the cards' pictures beside the pages.

    Args:
        entries: in the order of the page; the first one gives the finding.
        reports: the folder of the profile's report. models: that of the models of all profiles.
        everywhere: the front page of another report, and its entry whose figure this page shows, too.
    """
    from jinja2 import Environment, FileSystemLoader
    from nbconvert.filters import markdown2html

    environment = Environment(loader=FileSystemLoader(TEMPLATES / "page"), autoescape=True, trim_blocks=True)
    environment.filters["markdown"] = lambda text: environment.filters["safe"](markdown2html(text))
    environment.filters["sentences"] = sentences
    words = {
        "title": "The Crab+ study on a laptop",
        "profile": reports.name,
        "entries": entries,
        "leading": next((entry for entry in entries if entry.leading), None),
        "everywhere": everywhere,
        "cards": [(card, *_thumbnail(card, reports)) for card in _cards(reports, models)],
        "words": (TEMPLATES / "words.md").read_text(encoding="utf-8"),
    }
    return environment.get_template("front.html.j2").render(**words)
