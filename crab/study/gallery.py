"""What a built data root holds: sizes, label frequencies, lengths of answers and one sample of each slot."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from crab import tasks
from crab.data import records
from crab.data.findings import Report
from crab.data.media import RATE, MediaError, read_mask
from crab.data.words import split
from crab.study.figures.style import save, subplots
from crab.tasks.referring import NULL

_MOST = 20  # labels shown of a slot
_SHOWN = 4  # frames shown of a sample
_MARK, _TIME = "#e8006f", "#3b7dd8"
_KIND = {"audio": "heard", "visual": "seen"}


def sizes(report: Report) -> pd.DataFrame:
    """One row a slot and split of what a walk (`crab.data.validate`) found.

    Returns:
        slot, the data set and family it stands for, split; records of the published split (a column only where some are
        known), in the list, kept and left out; media files, their MiB, and the median length of clips (or sounds) in seconds.
    """
    rows = [
        {"slot": c.slot, "stands for": tasks.get_slot(c.slot).dataset, "family": tasks.get_slot(c.slot).family, "split": c.split,
         "published": c.published, "listed": c.listed, "kept": c.kept, "left out": sum(c.left_out.values()), "files": c.files,
         "MiB": c.bytes / 2**20, "seconds": float(np.median(c.seconds)) if c.seconds else None}
        for c in report.counts
    ]  # fmt: skip
    table = pd.DataFrame(rows).astype({"published": "Int64", "listed": "Int64"})  # whole numbers, of which some are not known
    return table if table["published"].notna().any() else table.drop(columns="published")


def problems(report: Report) -> pd.DataFrame:
    """One row a problem, slot and split: how often it was found, how many records that left out, and the first case in words.

    What a converter left out of an original data set has a row for each reason.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for finding in report.findings:
        row = rows.setdefault((finding.kind, finding.slot, finding.split), {
            "problem": finding.kind, "slot": finding.slot, "split": finding.split, "found": 0, "left out": 0,
            "first": f"{finding.record or 'the list'}: {finding.file}", "in words": finding.words,
        })  # fmt: skip
        row["found"] += 1
        row["left out"] += finding.left_out and finding.problem == "not converted"
    for count in report.counts:
        for problem, number in count.left_out.items():
            rows[problem, count.slot, count.split]["left out"] = number
    return pd.DataFrame(list(rows.values()), columns=["problem", "slot", "split", "found", "left out", "first", "in words"])


def _present(root: str | Path) -> list[tasks.Slot]:
    found = [slot for slot in tasks.SLOTS.values() if (Path(root) / tasks.json_path(slot, "train")).is_file()]
    if not found:
        raise ValueError(f"{root}: no slot has a train.json under {tasks.FOLDER}; run the build stage (dvc repro build)")
    return found


def _labels(slot: tasks.Slot, record: Mapping) -> Iterator[tuple[str, str]]:
    """(label, how it shows) of a record: one, or one an event or source where it may have several.

    What is referred to and the words of choices are too many to count: "there" or "not there", and the type of question.
    """
    if slot.module == "video_parsing":
        yield from ((event.event, _KIND[event.modality]) for event in tasks.truth(slot, record))
    elif slot.module == "temporal":
        yield tasks.truth(slot, record).event, ""
    elif slot.module == "dense":
        yield from ((event.event, "") for event in tasks.truth(slot, record))
    elif slot.module in ("spatial", "segmentation"):
        yield from ((name, "") for name in record["a_obj"].split(","))
    elif slot.module == "referring":
        yield "not there" if tasks.truth(slot, record) == NULL else "there", ""
    elif slot.module == "choice":
        yield f"{record['question_relation']}, {record['question_type']}", ""
    elif slot.module != "captioning":
        yield str(tasks.parse(slot, record[slot.answer_field])), ""


def label_table(root: str | Path) -> pd.DataFrame:
    """How often each label occurs in the train records: slot, label, kind ("heard", "seen" or ""), count."""
    rows = [
        (slot.name, label, kind)
        for slot in _present(root)
        for record in records.read(root, slot.name, "train")
        for label, kind in _labels(slot, record)
    ]
    table = pd.DataFrame(rows, columns=["slot", "label", "kind"])
    return table.groupby(["slot", "label", "kind"], sort=False).size().rename("count").reset_index()


def card(root: str | Path) -> pd.DataFrame:
    """The character of each slot's train records, a row a slot.

    Returns:
        slot; records; labels, how many different there are, the commonest and its share of all, the share of the
        rarest (as `label_table` counts them, heard and seen together); mean words of the instruction; and mean and
        most words of the bare and of the explicit answer, marks, numbers and tags counted as words.
    """
    table, rows = label_table(root), []
    for slot in _present(root):
        found = records.read(root, slot.name, "train")
        counts = table[table["slot"] == slot.name].groupby("label", sort=False)["count"].sum()
        row: dict[str, Any] = {"slot": slot.name, "records": len(found), "labels": len(counts)}
        if len(counts):
            shares = counts / counts.sum()
            row |= {"commonest": shares.idxmax(), "its share": shares.max(), "rarest share": shares.min()}
        row["asked words"] = np.mean([len(split(tasks.instruction(slot, r))) for r in found])
        for form in tasks.FORMS:
            lengths = [len(split(tasks.target(slot, r, form))) for r in found]
            row |= {f"{form} words": np.mean(lengths), f"most {form}": max(lengths)}
        rows.append(row)
    return pd.DataFrame(rows)


def label_counts(root: str | Path, path: str | Path) -> Figure:
    """A panel a slot, a bar a label: how often it occurs in the train records, the commonest first."""
    table = label_table(root)
    slots = list(dict.fromkeys(table["slot"]))
    shown = {}
    for name in slots:
        totals = table[table["slot"] == name].groupby("label")["count"].sum()
        # commonest first, ties by name
        shown[name] = sorted(totals.index, key=lambda label: (-totals[label], label))[:_MOST]
    columns = min(3, len(slots))
    rows = [slots[i : i + columns] for i in range(0, len(slots), columns)]
    heights = [max(len(shown[name]) for name in row) + 3 for row in rows]
    figure, grid = subplots(len(rows), columns, figsize=(4.2 * columns, 0.24 * sum(heights) + 0.6), squeeze=False, height_ratios=heights)
    for axes in grid.flat[len(slots) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, slots):
        part = table[table["slot"] == name]
        kinds = sorted(part["kind"].unique())
        sns.barplot(
            part, x="count", y="label", order=shown[name], hue="kind", hue_order=kinds, ax=axes, errorbar=None,
            palette=[_TIME, "#e6a23c"][: len(kinds)], legend=len(kinds) > 1,
        )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(title=f"{name}: {tasks.get_slot(name).family}", xlabel="events" if len(kinds) > 1 else "records", ylabel="")
        if len(kinds) > 1:
            axes.set_xlim(0, 1.5 * axes.get_xlim()[1])  # room beside the bars
            sns.move_legend(axes, "center right", title=None, fontsize="small")
    figure.suptitle("Labels of the train records")
    return save(figure, path)


def samples(root: str | Path, path: str | Path) -> Figure:
    """A train record of each slot: four of its frames, its sound, what is asked and the explicit answer.

    It is the first that decodes, or the first in which what is referred to is there.

    Drawn from the answer: the box and the points, and around them the outline of the true mask; on the sound, the seconds
    it names (for video parsing, heard events are shaded, seen ones a bar above).
    """
    slots = _present(root)
    figure, grid = subplots(len(slots), _SHOWN + 1, figsize=(14, 3.1 * len(slots)), squeeze=False, width_ratios=[1] * _SHOWN + [2])
    # room for the words below and the name above each row
    edge = 0.8 / (3.1 * len(slots))
    figure.get_layout_engine().set(h_pad=0.02, hspace=0.33, rect=(0, edge, 1, 1 - 1.5 * edge))
    for slot, row in zip(slots, grid, strict=True):
        record, loaded, passed = _shown(slot, records.read(root, slot.name, "train"))
        _pictures(row[:_SHOWN], slot, record, [(item.kind, m) for item, m in loaded if item.kind != "audio"])
        _sounds(row[_SHOWN], slot, record, [(item, wave) for item, wave in loaded if item.kind == "audio"])
        row[0].text(
            0, 1.16, f"{slot.name}   ({slot.family}; {slot.dataset}){passed}", transform=row[0].transAxes, weight="bold", fontsize=12
        ).set_in_layout(False)
        words = {"asked": tasks.instruction(slot, record), "answer": tasks.target(slot, record, "explicit")}
        lines = [textwrap.fill(f"{k}: {v}", 140, subsequent_indent=" " * 8) for k, v in words.items()]
        row[0].text(0, -0.07, "\n".join(lines), transform=row[0].transAxes, va="top", fontsize=10).set_in_layout(False)
    figure.suptitle("One train record of each slot")
    return save(figure, path)


def _shown(slot: tasks.Slot, found: list[dict[str, Any]]) -> tuple[dict[str, Any], list[tuple[Any, Any]], str]:
    """The record to show, its media decoded, and words for those before it on which the decoder fails.

    They passed the walk, which looks at a clip's middle only when asked to.
    """
    there = [r for r in found if slot.module == "referring" and tasks.truth(slot, r) != NULL]
    failed: list[MediaError] = []
    for record in there or found:
        try:
            loaded = list(zip(record["media"], records.load(record, slot.frames), strict=True))
        except MediaError as error:
            failed.append(error)
        else:
            return record, loaded, f"   {len(failed)} before it do not decode: {failed[0].path.name}" if failed else ""
    raise failed[0]


def _pictures(row: np.ndarray, slot: tasks.Slot, record: Mapping, media: list[tuple[str, Any]]) -> None:
    """Frames in the axes of a row, shared by the record's videos; a lone image first plain, then with its answer."""
    panels: list[tuple[str, np.ndarray]] = []
    for number, (kind, medium) in enumerate(media, 1):
        if kind == "image":
            panels += [("frame", medium), ("answer drawn", medium)]
            continue
        pictures, times = medium
        which = f"video {number}, " if len(media) > 1 else ""
        chosen = np.linspace(0, len(pictures) - 1, _SHOWN // len(media)).round().astype(int)
        panels += [(f"{which}{times[i]:.1f} s", pictures[i]) for i in chosen]
    for axes in row:
        axes.axis("off")
    for axes, (title, picture) in zip(row, panels, strict=False):
        axes.imshow(picture)
        axes.set_title(title, fontsize=10, pad=3)
    if slot.module in ("spatial", "segmentation", "referring") and tasks.truth(slot, record) != NULL:
        if "mask" in record and Path(record["mask"]).is_file():  # published train records may come without
            row[1].contour(read_mask(record["mask"]), levels=[0.5], colors="white", linewidths=1.2)
        _draw_place(row[1], tasks.truth(slot, record))


def _draw_place(axes: Axes, place) -> None:
    box, points = place if isinstance(place[0], tuple) else (place, ())
    x1, y1, x2, y2 = box
    # a pixel's centre is at whole coordinates, a box's edge between pixels
    axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=_MARK, linewidth=2.5))
    for x, y in points:
        axes.plot(x, y, "o", color="white", markeredgecolor=_MARK, markersize=6, markeredgewidth=1.5)


def _sounds(axes: Axes, slot: tasks.Slot, record: Mapping, found: list[tuple[Any, np.ndarray]]) -> None:
    """Each sound as its range of values over time, one above the other, drawn to one scale."""
    ends, loudest = [], max(float(np.abs(wave).max()) for _, wave in found) or 1.0
    for number, (item, wave) in enumerate(found):
        start = item.second or 0
        bins = np.array_split(wave / loudest * 0.6, min(600, len(wave)))
        times = start + np.linspace(0, len(wave) / RATE, len(bins))
        middle = -2.2 * number
        axes.fill_between(times, [middle + b.min() for b in bins], [middle + b.max() for b in bins], color="0.35", linewidth=0.4)
        ends += [start, start + len(wave) / RATE]
    _draw_times(axes, slot, record)
    axes.set(xlim=(min(ends), max(ends)), ylim=(-2.2 * len(found) + 1.1, 1.1))
    axes.set_xticks(np.linspace(min(ends), max(ends), 6))
    axes.set_yticks([-2.2 * n for n in range(len(found))], [f"sound {n + 1}" if len(found) > 1 else "" for n in range(len(found))])
    axes.set_xlabel("seconds", fontsize=10, labelpad=1)
    axes.tick_params(labelsize=9, pad=1)
    axes.grid(axis="y", visible=False)
    axes.set_title("sound", fontsize=10, pad=3)


def _draw_times(axes: Axes, slot: tasks.Slot, record: Mapping) -> None:
    """The seconds that an answer names: shaded what is heard (or both), a bar at the top for what is seen."""
    if slot.module in ("temporal", "dense"):
        truth = tasks.truth(slot, record)
        events = [truth] if slot.module == "temporal" else list(truth)
        for line, event in enumerate(events):
            axes.axvspan(event.start, event.end, color=_TIME, alpha=0.25 / len(events), linewidth=0)
            words = event.event if len(events) > 1 else f"{event.event}, seen and heard"
            axes.text(event.start + 0.1, -0.98 + 0.2 * line, words, fontsize=9, color=_TIME, weight="bold")
    if slot.module == "video_parsing":
        lines = {"audio": 0, "visual": 0}  # one line of words an event
        for event in tasks.truth(slot, record):
            below = 0.2 * lines[event.modality]
            lines[event.modality] += 1
            heard = event.modality == "audio"
            colour, height = (_TIME, -1.04 + below) if heard else (_MARK, 0.86 - below)
            if heard:
                axes.axvspan(event.start, event.end, color=_TIME, alpha=0.2, linewidth=0)
            else:
                axes.plot([event.start, event.end], [height + 0.16] * 2, color=_MARK, linewidth=2, solid_capstyle="butt")
            axes.text(event.start + 0.1, height, f"{event.event} {_KIND[event.modality]}", fontsize=8, color=colour, weight="bold")
