"""The labels of records, and the parts of a picture of a sample: its frames, its sound, and its truth drawn on both."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from crab import tasks
from crab.data import records
from crab.data.media import RATE, MediaError, read_mask

SHOWN = 4  # frames per sample
#: Kinds of task whose answers are seconds, and those whose answers are places in a picture.
TIMED, PLACED = ("temporal", "dense", "video_parsing"), ("spatial", "segmentation", "referring")
MARK, TIME = "#e8006f", "#3b7dd8"
SENSES = {"audio": "heard", "visual": "seen"}


def labels(slot: tasks.Slot, record: Mapping) -> Iterator[tuple[str, str]]:
    """(label, "heard", "seen" or "") of a record; several if it has several events or sources.

    Descriptions and choices are too many to count. They give "there" or "not there", and the type of the question.
    """
    if slot.kind in TIMED:
        yield from ((event.event, SENSES.get(getattr(event, "modality", ""), "")) for event in _events(slot, record))
    elif slot.kind in ("spatial", "segmentation"):
        yield from ((name, "") for name in record["a_obj"].split(","))
    elif slot.kind == "referring":
        yield "not there" if tasks.truth(slot, record) == tasks.NULL else "there", ""
    elif slot.kind == "choice":
        yield f"{record['question_relation']}, {record['question_type']}", ""
    elif slot.kind != "captioning":
        yield str(tasks.parse(slot, record[slot.answer_field])), ""


def _events(slot: tasks.Slot, record: Mapping) -> Sequence[Any]:
    return [tasks.truth(slot, record)] if slot.kind == "temporal" else tasks.truth(slot, record)


def sample(slot: tasks.Slot, rows: Sequence[Mapping]) -> tuple[Mapping, list[tuple[tasks.MediaItem, Any]], list[Path]]:
    """The first record that decodes (and refers to something there), its media, and the files before it that do not."""
    there = [row for row in rows if slot.kind == "referring" and tasks.truth(slot, row) != tasks.NULL]
    failed: list[MediaError] = []
    for record in there or rows:
        try:
            media = records.load(record, slot.frames)
            return record, list(zip(record["media"], media, strict=True)), [error.path for error in failed]
        except MediaError as error:
            failed.append(error)
    raise failed[0]


def draw_pictures(row: Sequence[Axes], slot: tasks.Slot, record: Mapping, media: Sequence[tuple[Any, Any]]) -> None:
    """Frames in the axes of a row, shared by the videos; a single image first plain, then with the truth drawn."""
    shown = [(item.kind, data) for item, data in media if item.kind != "audio"]
    panels = [(title, data) for kind, data in shown if kind == "image" for title in ("frame", "answer drawn")]
    for number, (frames, seconds) in enumerate((data for kind, data in shown if kind == "video"), 1):
        prefix = f"video {number}, " if len(shown) > 1 else ""
        chosen = np.linspace(0, len(frames) - 1, SHOWN // len(shown)).round().astype(int)
        panels += [(f"{prefix}{seconds[i]:.1f} s", frames[i]) for i in chosen]
    for axes in row:
        axes.axis("off")
    for axes, (title, picture) in zip(row, panels, strict=False):
        axes.imshow(picture)
        axes.set_title(title, fontsize=10, pad=3)
    if slot.kind in PLACED and tasks.truth(slot, record) != tasks.NULL:
        draw_place(row[1], slot, record)


def draw_place(axes: Axes, slot: tasks.Slot, record: Mapping) -> None:
    """The outline of the true mask, the box and the points."""
    if "mask" in record and Path(record["mask"]).is_file():  # published training records may have none
        axes.contour(read_mask(record["mask"]), levels=[0.5], colors="white", linewidths=1.2)
    truth = tasks.truth(slot, record)
    (x1, y1, x2, y2), points = truth if isinstance(truth[0], tuple) else (truth, ())
    # the centre of a pixel is at whole coordinates, the edge of a box between pixels
    axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=MARK, linewidth=2.5))
    for x, y in points:
        axes.plot(x, y, "o", color="white", markeredgecolor=MARK, markersize=6, markeredgewidth=1.5)


def draw_sounds(axes: Axes, slot: tasks.Slot, record: Mapping, media: Sequence[tuple[Any, Any]]) -> None:
    """Each sound as its range of values over time, one above the other on one scale, with the seconds of the truth."""
    sounds = [(item.second or 0, wave) for item, wave in media if item.kind == "audio"]
    loudest = max(float(np.abs(wave).max()) for _, wave in sounds) or 1.0
    for number, (start, wave) in enumerate(sounds):
        bins = np.array_split(wave / loudest * 0.6, min(600, len(wave)))
        times, middle = start + np.linspace(0, len(wave) / RATE, len(bins)), -2.2 * number
        low, high = ([middle + value(part) for part in bins] for value in (np.min, np.max))
        axes.fill_between(times, low, high, color="0.35", linewidth=0.4)
    if slot.kind in TIMED:
        draw_seconds(axes, slot, record)
    first, last = min(start for start, _ in sounds), max(start + len(wave) / RATE for start, wave in sounds)
    axes.set(xlim=(first, last), ylim=(-2.2 * len(sounds) + 1.1, 1.1), xticks=np.linspace(first, last, 6))
    names = [f"sound {number + 1}" if len(sounds) > 1 else "" for number in range(len(sounds))]
    axes.set_yticks([-2.2 * number for number in range(len(sounds))], names)
    axes.set_xlabel("seconds", fontsize=10, labelpad=1)
    axes.tick_params(labelsize=9, pad=1)
    axes.grid(axis="y", visible=False)
    axes.set_title("sound", fontsize=10, pad=3)


def draw_seconds(axes: Axes, slot: tasks.Slot, record: Mapping) -> None:
    """The events of the truth: heard ones (or heard and seen ones) are shaded, seen ones get a bar at the top."""
    events, parsing = _events(slot, record), slot.kind == "video_parsing"
    lines = {"audio": 0, "visual": 0}  # one line of words per event
    for event in events:
        sense = event.modality if parsing else "audio"
        text = f"{event.event} {SENSES[sense]}" if parsing else event.event + ", seen and heard" * (len(events) == 1)
        if sense == "audio":
            height, colour, alpha = (-1.04, TIME, 0.2) if parsing else (-0.98, TIME, 0.25 / len(events))
            height += 0.2 * lines[sense]
            axes.axvspan(event.start, event.end, color=colour, alpha=alpha, linewidth=0)
        else:
            height, colour = 0.86 - 0.2 * lines[sense], MARK
            axes.plot([event.start, event.end], [height + 0.16] * 2, color=colour, lw=2, solid_capstyle="butt")
        lines[sense] += 1
        axes.text(event.start + 0.1, height, text, fontsize=8 if parsing else 9, color=colour, weight="bold")
