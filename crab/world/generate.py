"""Build the generated AV-UIE v2 tree: scenes rendered to real files, records beside them.

Scenes belong to one slot and split only (:func:`crab.world.staging.scene_id`), so train, test and base-training
scenes are disjoint by construction.  The tree is the same, byte for byte, for a seed and counts on one machine,
however many workers build it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from crab import tasks
from crab.data import media, records
from crab.world import render, vocabulary
from crab.data.files import atomic_folder
from crab.world.views import VIEWS, view
from crab.world.views.view import View
from crab.data.workers import end_with_parent
from crab.world.scene import SECONDS, Scene

VOCABULARY = "vocabulary.json"  # in the tree's root, for a tokenizer; the same for every seed and count
SUMMARY = "build.json"  # written last, in the tree's root; also marks a tree that a build may replace
_CHUNK = 20  # even: the two records of a pair share media and must fall to one worker

Job = tuple[str, str, int, int]  # slot, split, first index, end


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
    """Build the whole tree at `root`, atomic_file at first and renamed when it is complete.

    Args:
        root: the data root, which will hold ``AVUIE_2`` and ``vocabulary.json`` (`crab.world.vocabulary`).  An earlier
            build there is replaced; any other non-empty folder is refused, since it may be real data.
        seed: every scene follows from it.
        train: records to train on, of every slot but the captioning one.
        test: records of every benchmark slot.
        caption: records of the captioning slot.
        workers: processes; 1 builds in this one.
        slots: names of the slots to build; all that have a view by default.

    Returns:
        The summary: ``seed``, ``slots`` (slot -> split -> records, scenes, files, bytes), total ``records``,
        ``files`` and ``bytes`` as in ``<root>/build.json``, and ``seconds``, which only this call knows.
    """
    slots = _slots(slots)
    for name, value in {"train": train, "test": test, "caption": caption, "workers": workers, "seed": seed}.items():
        least = 0 if name == "seed" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            real = " (profile full is for the real AV-UIE v2, which is not generated: source tree)" if value == 0 else ""
            raise ValueError(f"build: {name} is {value!r}; give a whole number of at least {least}{real}")
    root = Path(root)
    refuse_foreign(root)
    began = time.perf_counter()
    with atomic_folder(root) as aside:
        made = _run(aside, seed, _jobs(slots, train, test, caption), workers, progress)
        summary = _finish(aside, seed, made)
    return {**summary, "seconds": round(time.perf_counter() - began, 2)}


def _slots(names: Sequence[str] | None) -> list[str]:
    if isinstance(names, str):
        raise ValueError(f"build: slots is the text {names!r}; give a list of names")
    chosen = [tasks.get_slot(name).name for name in (VIEWS if names is None else names)]
    unmade = [name for name in chosen if name not in VIEWS]
    if unmade or not chosen:
        raise ValueError(f"build: slots {unmade or 'is empty'}; choose among {', '.join(VIEWS)}")
    return list(dict.fromkeys(chosen))


def refuse_foreign(root: Path) -> None:
    """ValueError if data lie at `root` that no build put there."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root}: is a file; give a folder for the data root")
    if root.is_dir() and any(root.iterdir()) and not any((root / name).is_file() for name in (SUMMARY, records.ROOT)):
        raise ValueError(f"{root}: is not empty and was not built here (no {SUMMARY}); give another folder, or "
                         "remove it yourself if nothing in it is needed")


def _jobs(slots: Sequence[str], train: int, test: int, caption: int) -> list[Job]:
    jobs = []
    for slot in slots:
        entry = tasks.get_slot(slot)
        counts = {"train": caption if entry.module == "captioning" else train, **({"test": test} if entry.test else {})}
        jobs += [(slot, split, start, min(start + _CHUNK, count))
                 for split, count in counts.items() for start in range(0, count, _CHUNK)]
    return jobs


def _run(root: Path, seed: int, jobs: Sequence[Job], workers: int, progress: bool) -> dict[Job, dict]:
    bar = tqdm(total=sum(end - start for _, _, start, end in jobs), unit="record", disable=not progress, desc="build")
    make, made = partial(_make, root, seed), {}
    with ExitStack() as stack:
        stack.enter_context(bar)
        if workers > 1:
            # Spawned, not forked: the caller may be a notebook with threads of its own.
            pool = stack.enter_context(ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), end_with_parent))
        # a job that fails cancels those that wait
        for job, found in zip(jobs, (pool.map if workers > 1 else map)(make, jobs), strict=True):
            made[job] = found
            bar.update(job[3] - job[2])
    return made


def _make(root: Path, seed: int, job: Job) -> dict:
    """The records of one job and the sizes of the files written for them."""
    slot, split, start, end = job
    folder = root / tasks.FOLDER / tasks.get_slot(slot).media_slot
    sizes: dict[str, int] = {}
    found, scenes = [], set()
    for index in range(start, end):
        one = view(slot, split, index, seed)
        found.append(one.record)
        scenes |= {scene.id for scene in one.scenes}
        _write(folder, one, sizes)
    return {"records": found, "scenes": sorted(scenes), "files": len(sizes), "bytes": sum(sizes.values())}


def _write(folder: Path, one: View, sizes: dict[str, int]) -> None:
    second = render.SAMPLE_RATE
    writers = (
        (one.video, lambda path, scene: media.write_video(path, _pictures(scene), render.FPS)),
        (one.audio, lambda path, scene: media.write_audio(path, render.waveform(scene))),
        (one.image, lambda path, moment: media.write_image(path, render.frame(*moment))),
        (one.second, lambda path, moment: media.write_audio(
            path, render.waveform(moment[0])[moment[1] * second:(moment[1] + 1) * second])),
        (one.mask, lambda path, at: media.write_mask(path, render.union(*at))),
    )
    for wanted, write in writers:
        for name, source in wanted.items():
            if name not in sizes:
                write(folder / name, source)
                sizes[name] = (folder / name).stat().st_size


def _pictures(scene: Scene) -> Iterator[np.ndarray]:
    """render.frames one by one: a second's picture is drawn once, and the clip never stands in memory as a whole."""
    for second in range(SECONDS):
        yield from repeat(render.frame(scene, second), render.FPS)


def _finish(root: Path, seed: int, made: dict[Job, dict]) -> dict:
    """Write the records in order, the vocabulary and the summary."""
    table: dict[str, dict[str, dict]] = {}
    lists: dict[tuple[str, str], list[dict]] = {}
    for job in sorted(made, key=lambda job: (list(VIEWS).index(job[0]), job[1] != "train", job[2])):
        slot, split = job[:2]
        part = made[job]
        row = table.setdefault(slot, {}).setdefault(split, {"records": 0, "scenes": 0, "files": 0, "bytes": 0})
        for name in row:
            row[name] += part[name] if isinstance(part[name], int) else len(part[name])
        lists.setdefault((slot, split), []).extend(part["records"])
    for (slot, split), found in lists.items():
        vocabulary.check(slot, found)
        records.write(root, slot, split, found)
    (root / VOCABULARY).write_text(json.dumps(vocabulary.vocabulary(), indent=1) + "\n")
    rows = [row for splits in table.values() for row in splits.values()]
    summary = {"seed": seed, "slots": table, **{n: sum(row[n] for row in rows) for n in ("records", "files", "bytes")}}
    (root / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return summary
