"""Encoded samples on disk.

``<root>/<slot>/<split>.safetensors`` holds N samples laid end to end:
    ids        int32 [tokens]           the prompt's tokens, media placeholders expanded
    positions  int32 [3, tokens]        time, height and width positions
    features   float16 [media, hidden]  outputs of the frozen encoders, one row per placeholder, in order
    lengths    int32 [N, 2]             tokens and media rows of each sample
``<split>.json`` beside it holds ids, instructions and both targets. It is written last and marks the pair as whole.
``manifest.json`` in ``<root>`` says for each ``slot/split`` how many samples there are, and what they follow from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crab.data.files import atomic_file, read_json, write_json
from crab.models.batches import Sample

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class SlotData:
    """One slot and split, encoded.

    Attributes:
        slot, split: e.g. ``ave`` and ``train``.
        samples: dicts of input_ids [L], position_ids [3, L] and features [media, hidden], as `omni.collate` takes.
        ids, instructions: one per sample.
        targets: by form (``bare``, ``explicit``), the answers to learn. Empty lists for a test split.
    """

    slot: str
    split: str
    samples: list[Sample]
    ids: list[str]
    instructions: list[str]
    targets: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.ids)

    def answered(self, form: str) -> list[tuple[Sample, str]]:
        """Pairs of sample and answer, for training. Raises ValueError on an unknown form."""
        if form not in self.targets:
            raise ValueError(f"{self.slot}: no {form!r} targets; known: {', '.join(self.targets)}")
        return list(zip(self.samples, self.targets[form], strict=True))

    def part(self, begin: int | None, end: int | None) -> SlotData:
        """The samples of ``[begin:end]``."""
        keep = slice(begin, end)
        targets = {form: texts[keep] for form, texts in self.targets.items()}
        return replace(
            self, samples=self.samples[keep], ids=self.ids[keep], instructions=self.instructions[keep], targets=targets
        )


def write_slot(root: str | Path, data: SlotData) -> None:
    """Store one slot and split."""
    folder, samples = Path(root) / data.slot, data.samples
    (folder / f"{data.split}.json").unlink(missing_ok=True)
    tensors = {
        "ids": torch.cat([s["input_ids"] for s in samples]).to(torch.int32),
        "positions": torch.cat([s["position_ids"] for s in samples], 1).to(torch.int32),
        "features": torch.cat([s["features"] for s in samples]).to(torch.float16),
        "lengths": torch.tensor([[len(s["input_ids"]), len(s["features"])] for s in samples], dtype=torch.int32),
    }
    with atomic_file(folder / f"{data.split}.safetensors") as path:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    texts = {"ids": data.ids, "instructions": data.instructions, "targets": data.targets}
    write_json(folder / f"{data.split}.json", texts)


def read_slot(root: str | Path, slot: str, split: str) -> SlotData:
    """Read what `write_slot` stored.

    Raises:
        ValueError: a file is missing or damaged, or the two files do not belong together.
    """
    folder = Path(root) / slot
    path = folder / f"{split}.safetensors"
    texts = read_json(folder / f"{split}.json")
    try:
        tensors = load_file(path)
        tokens, rows = tensors["lengths"].T.tolist()
        if len(tokens) != len(texts["ids"]):
            raise KeyError(f"{len(tokens)} samples for {len(texts['ids'])} ids")
        samples = [
            {"input_ids": ids, "position_ids": positions, "features": features}
            for ids, positions, features in zip(
                tensors["ids"].long().split(tokens),
                tensors["positions"].long().split(tokens, 1),
                tensors["features"].split(rows),
                strict=True,
            )
        ]
        return SlotData(slot, split, samples, texts["ids"], texts["instructions"], texts["targets"])
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}); run the encode stage again") from None


def read_manifest(root: str | Path) -> dict[str, dict]:
    """By ``slot/split``, in the order of the encode stage: ``samples`` (how many) and ``digest``."""
    return read_json(Path(root) / MANIFEST)


def encoded_slots(root: str | Path) -> list[str]:
    """The slots that the encode stage has encoded, in its order."""
    return list(dict.fromkeys(key.partition("/")[0] for key in read_manifest(root)))


def benchmarks(root: str | Path, slots: Sequence[str] | None = None) -> list[str]:
    """The encoded slots (or those of ``slots``) that have a test split. The others are only trained on.

    Raises:
        ValueError: one of ``slots`` is not encoded.
    """
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
    """One row per slot and split: samples, and mean tokens of a prompt, of its media, and words of an answer."""
    rows = []
    for key in read_manifest(root):
        slot, _, split = key.partition("/")
        data = read_slot(root, slot, split)
        words = {
            f"{form} words": np.mean([len(t.split()) for t in texts]) for form, texts in data.targets.items() if texts
        }
        rows.append({
            "slot": slot,
            "split": split,
            "samples": len(data),
            "prompt tokens": np.mean([len(s["input_ids"]) for s in data.samples]),
            "of media": np.mean([len(s["features"]) for s in data.samples]),
            **words,
        })  # fmt: skip
    return rows
