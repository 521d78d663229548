"""The samples of a slot as a sequence, of which nothing is in memory but their ids and lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from crab.models.batches import Sample


@dataclass(frozen=True)
class SlotData(Sequence):
    """One slot and split: samples that are read when they are asked for.

    Attributes:
        slot, split: e.g. ``ave`` and ``train``.
        ids: one per sample.
        read: gives the sample at an index. A sample is a dict of what `crab.models.batches.padded` takes
            (``input_ids`` [L], ``position_ids`` [3, L], ``features`` [media, hidden]), or ``prompt``, which the model
            encodes first; and ``text``: its id, its instruction and, in training, its answers by form (``bare``,
            ``explicit``).
        tokens: int [N], length of each prompt. Without cached features this is that of a prompt of its slot.
    """

    slot: str
    split: str
    ids: Sequence[str]
    read: Callable[[int], Sample]
    tokens: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index):
        """One sample, or for a slice a `SlotData` of these."""
        if not isinstance(index, slice):
            return self.read(range(len(self))[index])
        chosen = range(len(self))[index]
        return replace(self, ids=self.ids[index], tokens=self.tokens[index], read=partial(_at, self.read, chosen))

    def mapped(self, change: Callable[[Sample], Any]) -> SlotData:
        """The same samples, each changed as it is read."""
        return replace(self, read=partial(_changed, self.read, change))

    def answered(self, form: str) -> SlotData:
        """The same as pairs of sample and answer, for training. Raises ValueError on a form that the samples lack."""
        known = [name for name in self[0]["text"] if name not in ("id", "instruction")]
        if form not in known:
            raise ValueError(f"{self.slot}: no {form!r} targets; known: {', '.join(known)}")
        return self.mapped(partial(_paired, form))


def _at(read: Callable[[int], Sample], chosen: Sequence[int], index: int) -> Sample:
    return read(chosen[index])


def _changed(read: Callable[[int], Sample], change: Callable[[Sample], Any], index: int) -> Any:
    return change(read(index))


def _paired(form: str, sample: Sample) -> tuple[Sample, str]:
    return sample, sample["text"][form]
