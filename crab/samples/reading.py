"""Encoded samples, given out one by one, so that no process holds a whole split in memory.

``<root>/<slot>/<split>/`` holds shards (`crab.samples.shards`). ``manifest.json`` in ``<root>`` says for each
``slot/split`` how many samples there are, how many were skipped, and what they follow from.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from crab import tasks
from crab.core.files import read_json
from crab.data.media import MediaError
from crab.models.batches import Sample
from crab.models.checkpoint import base_digest, resolve
from crab.samples.inputs import processor_of, prompt_of
from crab.samples.shards import Shards, about
from crab.samples.slots import SlotData

MANIFEST = "manifest.json"


def _decoded(
    slot: str, shards: Shards, base: str, version: str, compatibility: str, on_problem: str, index: int
) -> Sample:
    """A sample whose media are decoded when it is asked for."""
    for other in range(len(shards)):
        text = dict(shards[(index + other) % len(shards)]["text"])
        record, around = text.pop("record"), text.pop("around", {})
        record["media"] = [tasks.MediaItem(*item) for item in record["media"]]
        try:
            words = tasks.Prompt(text["instruction"], **around)
            return {"prompt": prompt_of(processor_of(base, version), slot, record, words, compatibility), "text": text}
        except (MediaError, ValueError) as error:
            if on_problem == "error":
                raise
            warnings.warn(f"{text['id']} is replaced by the next sample: {error}", stacklevel=2)
    raise ValueError(f"{slot}: no sample can be read; run the encode stage with encode.cache: true to see why")


def read_slot(
    root: str | Path, slot: str, split: str, base: str | Path | None = None, on_problem: str = "error"
) -> SlotData:
    """The samples of one slot and split.

    Args:
        base: needed where features are not cached: its processor makes the prompts.
        on_problem: where they are not cached, ``skip`` replaces a sample whose media break off inside by the next one,
            with a warning.

    Raises:
        ValueError: a file is missing or damaged, or follows from another base.
    """
    shards = Shards(Path(root) / slot / split)
    for path in shards.paths if base is not None else ():
        if about(path).get("base") not in (None, base_digest(base)):
            raise ValueError(f"{path}: encoded by another base than {base}; run the encode stage again")
    read: Callable[[int], Sample] = shards.__getitem__
    if not shards.cached:
        if base is None:
            raise ValueError(f"{root}: features of {slot}/{split} are not cached; give the base that makes them")
        compatibility = about(shards.paths[0])["compatibility"]
        read = partial(_decoded, slot, shards, str(resolve(base) or base), base_digest(base), compatibility, on_problem)
    return SlotData(slot, split, [text["id"] for text in shards.texts()], read, shards.lengths[:, 3].tolist())


def read_manifest(root: str | Path) -> dict[str, dict]:
    """By ``slot/split``, in the order of the encode stage: ``samples`` (how many), ``skipped`` and ``digest``."""
    return read_json(Path(root) / MANIFEST)


def encoded_slots(root: str | Path) -> list[str]:
    """The slots that the encode stage has encoded, in its order."""
    return list(dict.fromkeys(key.partition("/")[0] for key in read_manifest(root)))


def benchmarks(root: str | Path, slots: Sequence[str] | None = None) -> list[str]:
    """The encoded slots (or those of ``slots``) that have a test split. ValueError if one of these is not encoded."""
    manifest = read_manifest(root)
    slots = encoded_slots(root) if slots is None else slots
    for slot in slots:
        if f"{slot}/train" not in manifest:
            raise ValueError(f"{root}: slot {slot!r} is not encoded; add it to encode.slots and run the encode stage")
    return [slot for slot in slots if f"{slot}/test" in manifest]


def spread(total: int, count: int) -> list[int]:
    """Up to ``count`` indices, evenly spread over ``range(total)``; the same each time."""
    if total < 1 or count < 1:
        raise ValueError(f"spread: {count} samples wanted of {total}; at least 1 of 1 is needed")
    return sorted(set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()))


def shape_table(root: str | Path) -> list[Mapping]:
    """One row per slot and split: samples, mean tokens of a prompt and of its media, and mean words of an answer."""
    rows = []
    for key in read_manifest(root):
        slot, _, split = key.partition("/")
        shards = Shards(Path(root) / slot / split)
        words: dict[str, list[int]] = {form: [] for form in tasks.FORMS}
        for text in shards.texts():
            for form in words.keys() & text.keys():
                words[form].append(len(text[form].split()))
        media, _, _, tokens = shards.lengths.mean(0)
        rows.append({
            "slot": slot,
            "split": split,
            "samples": len(shards),
            "prompt tokens": tokens,
            "of media": media,
            **{f"{form} words": np.mean(counts) for form, counts in words.items() if counts},
        })  # fmt: skip
    return rows
