"""The labels of records, and the parts of a picture of a sample: its frames, its sound, and its truth drawn on both."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from crab import tasks
from crab.data import records
from crab.data.media import RATE, MediaError, read_mask

SHOWN = 4  # frames per sample
MARK, TIME = "#e8006f", "#3b7dd8"
SENSES = {"audio": "heard", "visual": "seen"}


def labels(slot: tasks.Slot, record: Mapping) -> Iterator[tuple[str, str]]:
    """(label, "heard", "seen" or "") of a record; several if it has several events or sources.

    Descriptions and choices are too many to count. They give "there" or "not there", and the type of the question.
    """
    truth = tasks.truth(slot, record) if slot.kind != "captioning" else None
    if slot.kind == "video_parsing":
        yield from ((event.event, SENSES[event.modality]) for event in truth)
    elif slot.kind in ("temporal", "dense"):
        yield from ((event.event, "") for event in (truth if slot.kind == "dense" else [truth]))
    elif slot.kind in ("spatial", "segmentation"):
        yield from ((name, "") for name in record["a_obj"].split(","))
    elif slot.kind == "referring":
        yield "not there" if truth == tasks.NULL else "there", ""
    elif slot.kind == "choice":
        yield f"{record['question_relation']}, {record['question_type']}", ""
    elif slot.kind != "captioning":
        yield str(tasks.parse(slot, record[slot.answer_field])), ""


def label_table(rows: Mapping[str, Sequence[Mapping]]) -> pd.DataFrame:
    """How often each label occurs in records by slot: slot, label, kind ("heard", "seen" or ""), count."""
    found = [(slot, *label) for slot, part in rows.items() for row in part for label in labels(tasks.SLOTS[slot], row)]
    columns = ["slot", "label", "kind"]
    return pd.DataFrame(found, columns=columns).groupby(columns, sort=False).size().rename("count").reset_index()


def sample(slot: tasks.Slot, rows: Sequence[Mapping]) -> tuple[Mapping, list[tuple[tasks.MediaItem, Any]], list[Path]]:
    """The first record that decodes, its media, and the files before it that do not. The check only decodes their start.

    What a record refers to is there, if such a record exists.
    """
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
    panels: list[tuple[str, np.ndarray]] = []
    shown = [(item, data) for item, data in media if item.kind != "audio"]
    for number, (item, data) in enumerate(shown, 1):
        if item.kind == "image":
            panels += [("frame", data), ("answer drawn", data)]
            continue
        frames, seconds = data
        prefix = f"video {number}, " if len(shown) > 1 else ""
        chosen = np.linspace(0, len(frames) - 1, SHOWN // len(shown)).round().astype(int)
        panels += [(f"{prefix}{seconds[i]:.1f} s", frames[i]) for i in chosen]
    for axes in row:
        axes.axis("off")
    for axes, (title, picture) in zip(row, panels, strict=False):
        axes.imshow(picture)
        axes.set_title(title, fontsize=10, pad=3)
    if slot.kind not in ("spatial", "segmentation", "referring") or tasks.truth(slot, record) == tasks.NULL:
        return
    if "mask" in record and Path(record["mask"]).is_file():  # published training records may have none
        row[1].contour(read_mask(record["mask"]), levels=[0.5], colors="white", linewidths=1.2)
    truth = tasks.truth(slot, record)
    (x1, y1, x2, y2), points = truth if isinstance(truth[0], tuple) else (truth, ())
    # the centre of a pixel is at whole coordinates, the edge of a box between pixels
    edge = {"fill": False, "edgecolor": MARK, "linewidth": 2.5}
    row[1].add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, **edge))
    for x, y in points:
        row[1].plot(x, y, "o", color="white", markeredgecolor=MARK, markersize=6, markeredgewidth=1.5)


def draw_sounds(axes: Axes, slot: tasks.Slot, record: Mapping, media: Sequence[tuple[Any, Any]]) -> None:
    """Each sound as its range of values over time, one above the other on one scale, with the seconds of the truth."""
    sounds = [(item.second or 0, wave) for item, wave in media if item.kind == "audio"]
    loudest = max(float(np.abs(wave).max()) for _, wave in sounds) or 1.0
    for number, (start, wave) in enumerate(sounds):
        bins = np.array_split(wave / loudest * 0.6, min(600, len(wave)))
        times, middle = start + np.linspace(0, len(wave) / RATE, len(bins)), -2.2 * number
        low, high = ([middle + value(part) for part in bins] for value in (np.min, np.max))
        axes.fill_between(times, low, high, color="0.35", linewidth=0.4)
    draw_seconds(axes, slot, record)
    first, last = min(start for start, _ in sounds), max(start + len(wave) / RATE for start, wave in sounds)
    axes.set(xlim=(first, last), ylim=(-2.2 * len(sounds) + 1.1, 1.1), xticks=np.linspace(first, last, 6))
    names = [f"sound {number}" if len(sounds) > 1 else "" for number in range(1, len(sounds) + 1)]
    axes.set_yticks([-2.2 * number for number in range(len(sounds))], names)
    axes.set_xlabel("seconds", fontsize=10, labelpad=1)
    axes.tick_params(labelsize=9, pad=1)
    axes.grid(axis="y", visible=False)
    axes.set_title("sound", fontsize=10, pad=3)


def draw_seconds(axes: Axes, slot: tasks.Slot, record: Mapping) -> None:
    """The events of the truth: heard ones (or heard and seen ones) are shaded, seen ones get a bar at the top."""
    if slot.kind not in ("temporal", "dense", "video_parsing"):
        return
    truth = tasks.truth(slot, record)
    events = [truth] if slot.kind == "temporal" else truth
    lines = {"audio": 0, "visual": 0}  # one line of words per event
    for event in events:
        sense = getattr(event, "modality", "audio")
        line, heard, colour = 0.2 * lines[sense], sense == "audio", TIME if sense == "audio" else MARK
        lines[sense] += 1
        if slot.kind == "video_parsing":
            text, height, alpha, size = f"{event.event} {SENSES[sense]}", -1.04 + line if heard else 0.86 - line, 0.2, 8
        else:
            text, height, alpha, size = event.event, -0.98 + line, 0.25 / len(events), 9
            text += ", seen and heard" if len(events) == 1 else ""
        if heard:
            axes.axvspan(event.start, event.end, color=colour, alpha=alpha, linewidth=0)
        else:
            axes.plot([event.start, event.end], [height + 0.16] * 2, color=colour, lw=2, solid_capstyle="butt")
        axes.text(event.start + 0.1, height, text, fontsize=size, color=colour, weight="bold")
