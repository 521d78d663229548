"""Scenes of ten seconds with things that are seen and heard, drawn from a seed.

Units: whole seconds for time, pixels of a 224 x 224 image for space. Every box edge is a multiple of 8 pixels, so that
a coordinate is one token of a small vocabulary.
"""

from dataclasses import dataclass, replace

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
PANS = (-16, -8, 8, 16)  # pixels per second

Interval = tuple[int, int]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Thing:
    """One object or face. Intervals are seconds [start, end)."""

    name: str  # a class, or FACE
    colour: str
    motion: str  # its phase flips every second
    centre: tuple[int, int]  # (x, y) in pixels, on the lattice
    half: tuple[int, int]  # (half width, half height) in pixels, on the lattice
    visible: Interval | None  # None if it stays off screen
    sounding: Interval | None  # None if it is silent
    gain: float = 0.5  # loudness of its sound, 0 to 1
    shift: int = 0  # where its one-second sound loop starts, in audio samples
    emotion: str | None = None  # what a face shows
    voice: str | None = None  # the emotion of a face's voice, if it differs from the one shown

    @property
    def heard_emotion(self) -> str | None:
        return self.voice or self.emotion

    @property
    def quadrant(self) -> str:
        """The quadrant of the centre, in words."""
        x, y = self.centre
        return QUADRANTS[2 * (y >= SIZE // 2) + (x >= SIZE // 2)]

    def seen_at(self, second: int) -> bool:
        return self.visible is not None and self.visible[0] <= second < self.visible[1]

    def heard_at(self, second: int) -> bool:
        return self.sounding is not None and self.sounding[0] <= second < self.sounding[1]

    def box(self, second: int) -> Box:
        """(x1, y1, x2, y2) in pixels at a second. Right and bottom edges are exclusive."""
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
    """Up to four things in different quadrants before a patterned background."""

    id: int
    background: int
    things: tuple[Thing, ...]
    pan: int = 0  # pixels by which the background moves each second; the things stay

    @property
    def visible(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if t.visible)

    @property
    def sounding(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if t.sounding)


def sample_interval(rng: np.random.Generator, shortest: int = 2, longest: int = SECONDS) -> Interval:
    """An interval [start, end) of whole seconds in the clip, of uniformly random length."""
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
    """Draw one thing.

    Args:
        quadrant: index into :data:`QUADRANTS`. The thing never leaves it.
        fixed: other fields of :class:`Thing` that are not drawn (colour, motion, emotion, ...).
    """
    name = name or str(rng.choice(CLASSES))
    quadrant = int(rng.integers(4)) if quadrant is None else quadrant
    face = name == FACE
    half = (40, 40) if face else tuple(int(v) for v in rng.choice([24, 32], size=2))
    # A quadrant is 112 pixels wide. The widest thing reaches 40 pixels from a centre that lies 48 to 64 pixels in.
    x, y = (int(v) for v in rng.integers(-1, 2, size=2) * LATTICE + SIZE // 4)
    drawn = dict(
        colour=str(rng.choice(COLOURS)),
        motion="still" if face else str(rng.choice(MOTIONS)),
        centre=(x + quadrant % 2 * SIZE // 2, y + quadrant // 2 * SIZE // 2),
        half=half,
        gain=float(rng.choice([0.35, 0.5, 0.7])),
        shift=int(rng.integers(0, 16)) * 1000,
        emotion=str(rng.choice(EMOTIONS)) if face else None,
    )
    return Thing(name=name, visible=visible, sounding=sounding, **{**drawn, **fixed})


def sample_scene(scene_id: int, seed: int = 0, faces: float = 0.25) -> Scene:
    """A scene that is staged for no task. The base model is trained on such scenes.

    It has one to three visible things of different classes, each silent or sounding for an interval, and sometimes a
    sound from off screen. With probability `faces` one thing is a face; one voice in five has another emotion than its
    face. One scene in five pans. The same `scene_id` and `seed` always give the same scene.
    """
    rng = np.random.default_rng([seed, scene_id])
    names = [str(n) for n in rng.permutation(CLASSES)]
    if rng.random() < faces:
        names.insert(0, FACE)
    quadrants = [int(q) for q in rng.permutation(4)]
    count = int(rng.integers(1, 4))
    things = []
    for name, quadrant in zip(names[:count], quadrants, strict=False):
        visible = (0, SECONDS) if rng.random() < 0.5 else sample_interval(rng)
        sounding = sample_interval(rng) if rng.random() < 0.55 else None
        thing = sample_thing(rng, name, quadrant, visible, sounding)
        if thing.name == FACE and rng.random() < 0.2:
            thing = replace(thing, voice=str(rng.choice([e for e in EMOTIONS if e != thing.emotion])))
        things.append(thing)
    if rng.random() < 0.2 or not any(t.sounding for t in things):
        things.append(sample_thing(rng, names[count], quadrants[3], None, sample_interval(rng)))
    pan = int(rng.choice(PANS)) if rng.random() < 0.2 else 0
    return Scene(scene_id, int(rng.integers(0, 8)), tuple(things), pan)
