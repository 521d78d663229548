"""Scenes made for a wanted answer: labels in balance, things in different quadrants, and the record about them."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from crab import tasks
from crab.world.scene import CLASSES, SECONDS, Interval, Scene, Thing, sample_interval, sample_thing

# Scenes with an id below this are for the training of the base model only. Above it each slot and split has a block of
# this many ids. So every id has one owner, and a build with more samples keeps the scenes of a smaller one.
BASE_IDS = 2**20


def scene_id(slot: str, split: str, number: int) -> int:
    """The id of a slot's `number`-th scene in a split. It is below 2**53, so any JSON reader keeps it exact."""
    if not 0 <= number < BASE_IDS:
        raise ValueError(f"{slot}/{split}: no room for scene {number}; build at most {BASE_IDS} records per split")
    return (zlib.crc32(f"{slot}/{split}".encode()) + 1) * BASE_IDS + number


@dataclass(frozen=True)
class View:
    """One record, its scenes, and its files.

    `files` maps a path below the media slot's folder to what is rendered there: ("video", scene), ("audio", scene),
    ("image", scene, second), ("sound", scene, second) for one second of sound, or ("mask", things, second).
    """

    record: dict
    scenes: tuple[Scene, ...]
    files: dict[str, tuple]


@dataclass(frozen=True)
class Stage:
    """What one record is made from."""

    slot: str
    split: str
    index: int  # the record's place in its file
    seed: int
    scenes: tuple[int, ...]  # numbers, within the split, of the scenes that it may use

    @property
    def stems(self) -> tuple[str, ...]:
        """A file stem for each scene."""
        return tuple(f"{self.split}_{number:05d}" for number in self.scenes)

    def scene_id(self, which: int = 0) -> int:
        return scene_id(self.slot, self.split, self.scenes[which])

    def rng(self, which: int = 0) -> np.random.Generator:
        """The random stream of one of its scenes. It depends on the seed and the scene only."""
        return np.random.default_rng([self.seed, self.scene_id(which)])

    def wanted(self, choices: Sequence, what: str):
        """The choice for this record. Each comes once in every len(choices) records, in shuffled order.

        A choice that is listed twice comes twice, see :func:`skewed`. `what` names the shuffle.
        """
        turn, place = divmod(self.index, len(choices))
        key = [self.seed, turn, *f"{self.slot}/{self.split}/{what}".encode()]
        return choices[int(np.random.default_rng(key).permutation(len(choices))[place])]

    def every(self, count: int) -> Self:
        """The same stage for choices that change only every `count` records."""
        return replace(self, index=self.index // count)

    def scene(self, rng: np.random.Generator, things: Sequence[Thing], which: int = 0) -> Scene:
        """The scene of these things, in a random order, so that the order does not show their roles."""
        order = [int(i) for i in rng.permutation(len(things))]
        return Scene(self.scene_id(which), int(rng.integers(8)), tuple(things[i] for i in order))

    def answer(self, chain: str, truth: Any) -> dict[str, str]:
        """The record's answer field: a chain, then the tagged answer."""
        text = tasks.answer(self.slot, truth)
        return {tasks.get_slot(self.slot).answer_field: f"{chain} {text}" if chain else text}

    def clip(self, scene: Scene, chain: str, truth: Any, path: str = "", form: str = "mp4", **fields) -> View:
        """A record about one video and its sound: files at `path`, by default the stem, plus `form` or mp3.

        `fields` are other fields of the record, before the answer.
        """
        path = path or self.stems[0]
        record = {"video_path": f"{path}.{form}", "audio_path": f"{path}.mp3", **fields, **self.answer(chain, truth)}
        record["scene"] = scene.id
        files = {f"video/{path}.{form}": ("video", scene), f"audio/{path}.mp3": ("audio", scene)}
        return View(record, (scene,), files)

    def still(self, folder: str, scene: Scene, second: int, chain: str, truth: Any, fields: dict, **last) -> View:
        """A record about one frame and the second of sound around it. The clip is that one second, so it is frame 0.

        `fields` and `last` are other fields of the record, before and after the answer.
        """
        picture, sound = f"{folder}/frames/0.jpg", f"{folder}/audio.wav"
        path = "image_path" if self.split == "train" else "visual_path"  # AV-UIE has two names for this field
        record = {path: picture, "audio_path": sound, **fields, **self.answer(chain, truth), **last}
        record |= {"frame_idx": 0, "scene": scene.id, "second": second}
        return View(record, (scene,), {picture: ("image", scene, second), sound: ("sound", scene, second)})


def skewed(**shares: int) -> tuple[str, ...]:
    """Labels for :meth:`Stage.wanted`, each as often as its share."""
    return tuple(label for label, share in shares.items() for _ in range(share))


def pick(rng: np.random.Generator, choices: Sequence[str], *taken: str) -> str:
    """One of the choices that are not taken."""
    return str(rng.choice([c for c in choices if c not in taken]))


def others(rng: np.random.Generator, *taken: str) -> list[str]:
    """The classes that are not taken, shuffled."""
    return [str(name) for name in rng.permutation([c for c in CLASSES if c not in taken])]


@dataclass(frozen=True)
class Maker:
    """Makes a thing of one class in one quadrant: by default on screen throughout, and silent.

    It takes the fields to fix (`motion`, ...) and draws the others.
    """

    rng: np.random.Generator
    name: str
    quadrant: int

    def __call__(self, **fixed) -> Thing:
        return sample_thing(self.rng, self.name, self.quadrant, **fixed)

    def sounds(self, shortest: int = 3, **fixed) -> Thing:
        return self(sounding=sample_interval(self.rng, shortest), **fixed)

    def sounds_anywhere(self, sounding: Interval | None = None, shortest: int = 3, **fixed) -> Thing:
        """It sounds at these times, or for some seconds, on or off screen."""
        sounding = sounding or sample_interval(self.rng, shortest)
        return self(sounding=sounding, **({} if self.rng.random() < 0.5 else {"visible": None}), **fixed)


def makers(rng: np.random.Generator, names: Sequence[str]) -> list[Maker]:
    """Makers of up to four things, each in its own quadrant."""
    return [Maker(rng, name, int(place)) for name, place in zip(names, rng.permutation(4), strict=False)]


def cast(rng: np.random.Generator, *names: str) -> list[Maker]:
    """Makers of four things: of these classes, then of others."""
    return makers(rng, [*names, *others(rng, *names)])


def off_screen(rng: np.random.Generator, name: str, times: Interval) -> Thing:
    """A thing of this class that is heard at these times and never seen."""
    return sample_thing(rng, name, visible=None, sounding=times)


def around(rng: np.random.Generator, core: Interval) -> tuple[Interval, Interval]:
    """Two intervals whose overlap is exactly `core`. Each side is set by one of them; the other may reach further."""
    starts, ends = [core[0]] * 2, [core[1]] * 2
    starts[int(rng.integers(2))] = int(rng.integers(0, core[0] + 1))
    ends[int(rng.integers(2))] = int(rng.integers(core[1], SECONDS + 1))
    return (starts[0], ends[0]), (starts[1], ends[1])


def apart(rng: np.random.Generator) -> tuple[Interval, Interval]:
    """Two intervals of at least two seconds. The first begins at least two seconds before the second."""
    late = int(rng.integers(2, SECONDS - 1))
    early = int(rng.integers(0, late - 1))
    return tuple((start, int(rng.integers(start + 2, SECONDS + 1))) for start in (early, late))
