"""The generated world: ten-second scenes of things that are seen and heard, sampled from a seed.

A scene is the single source of truth. Everything rendered (:mod:`crab.world.render`) and every
record and reasoning chain (:mod:`crab.world.views`) is derived from it and can be checked
against it. Units: whole seconds for time, pixels of a 224 x 224 image for space; every box edge is
a multiple of 8 pixels, so that a coordinate is one token of a small vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np

SECONDS = 10
SIZE = 224
LATTICE = 8

CLASSES = ("bell", "drum", "horn", "siren", "whistle", "clock", "flute", "engine")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
MOTIONS = ("still", "swaying", "bouncing", "pulsing", "flashing")
EMOTIONS = ("anger", "disgust", "fear", "happy", "neutral", "sad", "surprise")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
FACE = "face"
PANS = (-16, -8, 8, 16)  # pixels a second

Interval = tuple[int, int]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Thing:
    """One object or face.

    Attributes:
        name: a class of :data:`CLASSES`, or :data:`FACE`.
        colour: one of :data:`COLOURS`.
        motion: one of :data:`MOTIONS`; its phase flips every second.
        centre: (x, y) in pixels, on the 8-pixel lattice.
        half: (half width, half height) in pixels, on the lattice.
        visible: seconds [start, end) during which it is seen; None when it stays off screen.
        sounding: seconds [start, end) during which it is heard; None when silent.
        gain: loudness of its sound, 0 to 1.
        shift: where in its one-second sound loop it starts, in audio samples.
        emotion: one of :data:`EMOTIONS` that a face shows, else None.
        voice: the emotion of a face's voice where it is not the one shown, else None.
    """

    name: str
    colour: str
    motion: str
    centre: tuple[int, int]
    half: tuple[int, int]
    visible: Interval | None
    sounding: Interval | None
    gain: float = 0.5
    shift: int = 0
    emotion: str | None = None
    voice: str | None = None

    @property
    def heard_emotion(self) -> str | None:
        """The emotion in a face's voice."""
        return self.voice or self.emotion

    @property
    def quadrant(self) -> str:
        """The position word of the centre."""
        x, y = self.centre
        return QUADRANTS[2 * (y >= SIZE // 2) + (x >= SIZE // 2)]

    def seen_at(self, second: int) -> bool:
        return self.visible is not None and self.visible[0] <= second < self.visible[1]

    def heard_at(self, second: int) -> bool:
        return self.sounding is not None and self.sounding[0] <= second < self.sounding[1]

    def box(self, second: int) -> Box:
        """(x1, y1, x2, y2) in pixels at a second; right and bottom edges are exclusive."""
        (x, y), (w, h) = self.centre, self.half
        sign = LATTICE if second % 2 else -LATTICE
        if self.motion == "swaying":
            x += sign
        elif self.motion == "bouncing":
            y += sign
        elif self.motion == "pulsing" and second % 2:
            w, h = w - LATTICE, h - LATTICE
        return x - w, y - h, x + w, y + h


@dataclass(frozen=True)
class Scene:
    """Ten seconds of up to four things in different quadrants over a plain patterned background.

    Attributes:
        pan: pixels by which the background moves each second, as before a panning camera; things stay.
    """

    id: int
    background: int
    things: tuple[Thing, ...]
    pan: int = 0

    @property
    def visible(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if t.visible)

    @property
    def sounding(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if t.sounding)

    def to_dict(self) -> dict:
        return asdict(self)


def sample_interval(rng: np.random.Generator, shortest: int = 2, longest: int = SECONDS) -> Interval:
    """A uniformly long interval [start, end) of whole seconds inside the clip."""
    length = int(rng.integers(shortest, longest + 1))
    start = int(rng.integers(0, SECONDS - length + 1))
    return start, start + length


def sample_thing(
    rng: np.random.Generator,
    name: str | None = None,
    quadrant: int | None = None,
    visible: Interval | None = (0, SECONDS),
    sounding: Interval | None = None,
    **fixed,
) -> Thing:
    """Sample one thing; what is given is kept, the rest is drawn.

    Args:
        quadrant: index into :data:`QUADRANTS`; the thing never leaves it.
        fixed: any further :class:`Thing` field to hold (colour, motion, emotion, ...).
    """
    name = name or str(rng.choice(CLASSES))
    quadrant = int(rng.integers(4)) if quadrant is None else quadrant
    face = name == FACE
    half = (40, 40) if face else tuple(int(v) for v in rng.choice([24, 32], size=2))
    # 48 keeps the widest thing at the end of its motion (40 px) inside its quadrant of 112 px.
    inside = rng.integers(-1, 2, size=2) * LATTICE + SIZE // 4
    centre = (
        int(inside[0]) + (quadrant % 2) * SIZE // 2,
        int(inside[1]) + (quadrant // 2) * SIZE // 2,
    )
    drawn = dict(
        colour=str(rng.choice(COLOURS)),
        motion="still" if face else str(rng.choice(MOTIONS)),
        centre=centre,
        half=half,
        gain=float(rng.choice([0.35, 0.5, 0.7])),
        shift=int(rng.integers(0, 16)) * 1000,
        emotion=str(rng.choice(EMOTIONS)) if face else None,
    )
    return Thing(name=name, visible=visible, sounding=sounding, **{**drawn, **fixed})


def sample_scene(scene_id: int, seed: int = 0, faces: float = 0.25) -> Scene:
    """A scene with no task in mind: what the base model is trained on.

    One to three visible things of different classes, each silent or sounding for an interval, and
    at times a sound from off screen; with probability ``faces`` one of the things is a face, whose
    voice, one time in five, has another emotion than it shows. One scene in five pans.

    Args:
        scene_id: the scene's number; the same (id, seed) always gives the same scene.
    """
    rng = scene_rng(scene_id, seed)
    names = [str(n) for n in rng.permutation(CLASSES)]
    if rng.random() < faces:
        names.insert(0, FACE)
    quadrants = [int(q) for q in rng.permutation(4)]
    n_visible = int(rng.integers(1, 4))
    things = []
    for i in range(n_visible):
        whole = rng.random() < 0.5
        visible = (0, SECONDS) if whole else sample_interval(rng)
        sounding = sample_interval(rng) if rng.random() < 0.55 else None
        thing = sample_thing(rng, names[i], quadrants[i], visible, sounding)
        if thing.name == FACE and rng.random() < 0.2:
            thing = replace(thing, voice=str(rng.choice([e for e in EMOTIONS if e != thing.emotion])))
        things.append(thing)
    if rng.random() < 0.2 or not any(t.sounding for t in things):
        things.append(sample_thing(rng, names[n_visible], quadrants[3], None, sample_interval(rng)))
    pan = int(rng.choice(PANS)) if rng.random() < 0.2 else 0
    return Scene(scene_id, int(rng.integers(0, 8)), tuple(things), pan)


def scene_rng(scene_id: int, seed: int) -> np.random.Generator:
    """The random stream of one scene; scenes are independent of each other and of build order."""
    return np.random.default_rng([seed, scene_id])
