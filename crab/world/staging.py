"""Scenes staged for a wanted answer: who draws what from which random stream, and labels in balance."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from crab.world.scene import CLASSES, SECONDS, Interval, Scene, Thing, sample_thing

ALWAYS = (0, SECONDS)

# Ids below this belong to scenes that only the base model is trained on; above, each slot and split has a block of
# as many ids.  Every id therefore has one owner, and a build with more samples keeps the scenes of a smaller one.
BASE_IDS = 2**20


def scene_id(slot: str, split: str, number: int) -> int:
    """The id of a slot's `number`-th scene in a split; below 2**53, so that any JSON reader keeps it exact."""
    if not 0 <= number < BASE_IDS:
        raise ValueError(f"scene {number} of {slot}/{split}: a split has room for {BASE_IDS} scenes")
    return (zlib.crc32(f"{slot}/{split}".encode()) + 1) * BASE_IDS + number


@dataclass(frozen=True)
class Stage:
    """What one record is made from.

    Attributes:
        slot, split, index: whose record it is, and its place in the file.
        seed: the build's seed.
        scenes: numbers, within the split, of the scenes the record may use.
    """

    slot: str
    split: str
    index: int
    seed: int
    scenes: tuple[int, ...]

    @property
    def stems(self) -> tuple[str, ...]:
        """A file stem for each scene."""
        return tuple(f"{self.split}_{number:05d}" for number in self.scenes)

    def rng(self, which: int = 0) -> np.random.Generator:
        """The random stream of one of its scenes; it depends on nothing but seed and scene."""
        return np.random.default_rng([self.seed, scene_id(self.slot, self.split, self.scenes[which])])

    def wanted(self, choices: Sequence, what: str):
        """The choice this record shall have: each comes once in every len(choices) records, in shuffled order.

        A choice that stands there twice comes twice; see :func:`skewed`.
        """
        turn, place = divmod(self.index, len(choices))
        key = [self.seed, turn, *f"{self.slot}/{self.split}/{what}".encode()]
        return choices[int(np.random.default_rng(key).permutation(len(choices))[place])]

    def every(self, count: int) -> Stage:
        """The same stage for choices that change only every `count` records."""
        return replace(self, index=self.index // count)

    def scene(self, rng: np.random.Generator, things: Sequence[Thing], which: int = 0) -> Scene:
        """The scene of these things, in an order that says nothing about their roles."""
        order = [int(i) for i in rng.permutation(len(things))]
        number = scene_id(self.slot, self.split, self.scenes[which])
        return Scene(number, int(rng.integers(8)), tuple(things[i] for i in order))


def skewed(**shares: int) -> tuple[str, ...]:
    """Labels for :meth:`Stage.wanted`, each as often as its share: in every sum(shares) records exactly so often."""
    return tuple(label for label, share in shares.items() for _ in range(share))


def others(rng: np.random.Generator, *taken: str) -> list[str]:
    """The classes not taken, shuffled."""
    return [str(name) for name in rng.permutation([c for c in CLASSES if c not in taken])]


def cast(rng: np.random.Generator, names: Sequence[str]) -> list[Callable[..., Thing]]:
    """For each of up to four names a maker of that thing, each in a quadrant of its own.

    A maker takes the fields to hold (`visible`, `sounding`, `motion`, ...) and draws the rest.
    """
    places = [int(q) for q in rng.permutation(4)]
    return [
        lambda name=name, place=place, **held: sample_thing(rng, name, place, **{"visible": ALWAYS, **held})
        for name, place in zip(names, places, strict=False)
    ]


def around(rng: np.random.Generator, core: Interval) -> tuple[Interval, Interval]:
    """Two intervals whose overlap is exactly `core`: each side is set by one of the two, the other may reach on."""
    starts, ends = [core[0]] * 2, [core[1]] * 2
    starts[int(rng.integers(2))] = int(rng.integers(0, core[0] + 1))
    ends[int(rng.integers(2))] = int(rng.integers(core[1], SECONDS + 1))
    return (starts[0], ends[0]), (starts[1], ends[1])


def apart(rng: np.random.Generator) -> tuple[Interval, Interval]:
    """Two intervals of at least two seconds, the first beginning two or more seconds before the second."""
    late = int(rng.integers(2, SECONDS - 1))
    early = int(rng.integers(0, late - 1))
    return tuple((start, int(rng.integers(start + 2, SECONDS + 1))) for start in (early, late))
