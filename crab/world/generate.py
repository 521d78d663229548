"""Build the generated AV-UIE v2: scenes rendered to real files, and records beside them.

Each scene belongs to one slot and split (:func:`crab.world.staging.scene_id`), so the scenes of train, test and the
base's training are disjoint. For the same seed and counts the tree is the same to the byte on one machine, with any
number of workers.
"""

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from crab import tasks
from crab.core.files import atomic_folder, write_json
from crab.core.workers import end_with_parent
from crab.data import media, records
from crab.world import render, vocabulary
from crab.world.scene import SECONDS
from crab.world.views import VIEWS, view

VOCABULARY = "vocabulary.json"  # in the tree's root, for a tokenizer; the same for every seed and count
SUMMARY = "build.json"  # in the tree's root, written last; it also marks a tree that a build may replace
_CHUNK = 20  # even, because the two records of a pair share files and must be made by one worker

Job = tuple[str, str, int, int]  # slot, split, first index, end
Part = tuple[list[dict], list[int]]  # the records of a job, and the sizes of their files


def build(
    root: str | os.PathLike,
    seed: int = 0,
    train: int = 240,
    test: int = 100,
    caption: int = 300,
    workers: int = 2,
    slots: Sequence[str] | None = None,
    progress: bool = True,
) -> dict:
    """Build the whole tree in a temporary folder and rename it to `root` when it is complete.

    Args:
        root: the data root. An earlier build there is replaced. Another folder with content is refused, because it may
            be real data.
        train, test: records of each slot; of the captioning slot `caption` in place of `train`.
        workers: processes; 1 builds in this process.
        slots: names of the slots to build; by default all that have a view.

    Returns:
        The summary in ``<root>/build.json``: ``seed``, ``slots`` (slot -> split -> records, scenes, files, bytes), and
        in total ``records``, ``files`` and ``bytes``; also ``seconds``, which are not in the file.
    """
    slots = _slots(slots)
    for name, value in {"train": train, "test": test, "caption": caption, "workers": workers, "seed": seed}.items():
        least = 0 if name == "seed" else 1
        if type(value) is not int or value < least:
            hint = "; to read the real AV-UIE v2 instead, set source to tree" if value == 0 else ""
            raise ValueError(f"build: {name} is {value!r}; give a whole number of at least {least}{hint}")
    root = Path(root)
    refuse_foreign(root)
    began = time.perf_counter()
    jobs = _jobs(slots, train, test, caption)
    # Spawned, not forked: the caller may be a notebook with its own threads.
    pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), end_with_parent) if workers > 1 else None
    with atomic_folder(root) as folder, pool or nullcontext():
        parts = (pool.map if pool else map)(partial(_make, folder, seed), jobs)
        parts = tqdm(parts, "build", len(jobs), unit="batch", disable=not progress)
        summary = _finish(folder, seed, zip(jobs, parts, strict=True))
    return {**summary, "seconds": round(time.perf_counter() - began, 2)}


def _slots(names: Sequence[str] | None) -> list[str]:
    if isinstance(names, str):
        raise ValueError(f"build: slots is the text {names!r}; give a list of names")
    chosen = {tasks.get_slot(name).name for name in (VIEWS if names is None else names)}
    if not chosen or not chosen <= VIEWS.keys():
        problem = f"{sorted(chosen - VIEWS.keys())} without a view" if chosen else "empty"
        raise ValueError(f"build: slots is {problem}; choose among {', '.join(VIEWS)}")
    return [name for name in VIEWS if name in chosen]


def refuse_foreign(root: Path) -> None:
    """ValueError if `root` holds data that no build wrote."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root}: is a file; give a folder for the data root")
    if root.is_dir() and any(root.iterdir()) and not any((root / name).is_file() for name in (SUMMARY, records.ROOT)):
        fix = "give another folder, or delete this one if you do not need it"
        raise ValueError(f"{root}: has files that were not built here (no {SUMMARY}); {fix}")


def _jobs(slots: Sequence[str], train: int, test: int, caption: int) -> list[Job]:
    jobs = []
    for name in slots:
        slot = tasks.get_slot(name)
        counts = {"train": caption if slot.kind == "captioning" else train, "test": test if slot.test else 0}
        for split, count in counts.items():
            jobs += [(name, split, start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    return jobs


#: Kind of file -> what writes it.
_WRITERS = {
    "video": lambda path, scene: media.write_video(path, render.frames(scene), render.FPS),
    "audio": lambda path, scene: media.write_audio(path, render.waveform(scene)),
    "image": lambda path, scene, second: media.write_image(path, render.frame(scene, second)),
    "sound": lambda path, scene, second: media.write_audio(path, np.split(render.waveform(scene), SECONDS)[second]),
    "mask": lambda path, things, second: media.write_mask(path, render.union(things, second)),
}


def _make(folder: Path, seed: int, job: Job) -> Part:
    slot, split, start, end = job
    folder = folder / tasks.FOLDER / tasks.get_slot(slot).media_slot
    views = [view(slot, split, index, seed) for index in range(start, end)]
    files = {folder / name: what for one in views for name, what in one.files.items()}
    for path, (kind, *what) in files.items():
        _WRITERS[kind](path, *what)
    return [one.record for one in views], [path.stat().st_size for path in files]


def _finish(folder: Path, seed: int, parts: Iterable[tuple[Job, Part]]) -> dict:
    table: dict[str, dict[str, dict]] = {}
    for (slot, split), group in groupby(parts, key=lambda pair: pair[0][:2]):
        new_records, sizes = (sum(column, []) for column in zip(*(part for _, part in group), strict=True))
        vocabulary.check(slot, new_records)
        records.write(folder, slot, split, new_records)
        scenes = {number for record in new_records for number in np.atleast_1d(record["scene"]).tolist()}
        row = {"records": len(new_records), "scenes": len(scenes), "files": len(sizes), "bytes": sum(sizes)}
        table.setdefault(slot, {})[split] = row
    write_json(folder / VOCABULARY, vocabulary.vocabulary())
    rows = [row for splits in table.values() for row in splits.values()]
    summary = {"seed": seed, "slots": table, **{n: sum(row[n] for row in rows) for n in ("records", "files", "bytes")}}
    write_json(folder / SUMMARY, summary)
    return summary
