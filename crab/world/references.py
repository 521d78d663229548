"""Referring expressions of Ref-AVS's kind: each knows how to stage a scene in which what it describes is there, or is not.

The two scenes of a description look alike (as many things, of the same classes where it names one), so that only what
it says decides.  A chain tells what is perceived, and last what of it the description means.  Where two things share a
class neither of them sounds: a sound tells the class, not the thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from crab.world import chains
from crab.world.staging import cast, others
from crab.world.scene import CLASSES, COLOURS, Interval, Thing, sample_thing


class Reference(NamedTuple):
    """Words for one thing, the things of the scene, the one meant (None where it is not there) and the chain."""

    words: str
    things: list[Thing]
    target: Thing | None
    chain: str


def unseen_colour(name: str) -> str:
    """The colour in which no training description means a thing of this class."""
    return COLOURS[CLASSES.index(name) % len(COLOURS)]


def _colour(rng: np.random.Generator, *taken: str) -> str:
    return str(rng.choice([c for c in COLOURS if c not in taken]))


def _noise(rng: np.random.Generator, name: str, when: Interval) -> Thing:
    """A sound from off screen."""
    return sample_thing(rng, name, visible=None, sounding=when)


def _looks(rng, name, colour, there, when) -> Reference:
    """"the red bell", beside something red and, at times, another bell."""
    same, third, off, *_ = others(rng, name)
    twin, second_twin = (str(c) for c in rng.permutation([c for c in COLOURS if c != colour])[:2])
    more = rng.random() < 0.5  # bells than there must be
    makers = cast(rng, [name, same, name if more else third])
    target = makers[0](colour=colour if there else twin)
    loud = rng.random() < 0.5
    things = [target, makers[1](colour=colour, sounding=when if loud else None),
              makers[2](**({"colour": second_twin} if more else {}))]
    words = f"{colour} {name}"
    chain = f"{chains.see(things)} {chains.see([target]) if there else chains.no_sight(words)}"
    return Reference(f"the {words}", [*things, *([] if loud else [_noise(rng, off, when)])], target if there else None, chain)


def _place(rng, name, colour, there, when) -> Reference:
    """"the bell at top left": if not there, then elsewhere."""
    other, third, off, *_ = others(rng, name)
    more = rng.random() < 0.5
    makers = cast(rng, [name, other, name if more else third])
    target, beside = makers[0](colour=colour), makers[1]()
    things = [target, beside, makers[2](**({"colour": _colour(rng, colour)} if more else {}))]
    found = target if there else beside
    chain = f"{chains.see(things)} {chains.see([found])}"
    return Reference(f"the {name} at {found.quadrant}", [*things, _noise(rng, off, when)], target if there else None, chain)


def _sounding(rng, name, colour, there, when) -> Reference:
    """"the thing that sounds": if not there, then off screen."""
    other, third, off, *_ = others(rng, name)
    makers = cast(rng, [name, other, third])[:2 + int(rng.integers(2))]
    target = makers[0](colour=colour, sounding=when if there else None)
    seen = [target, *(make() for make in makers[1:])]
    source = target if there else _noise(rng, off, when)
    end = chains.sounds(target) if there else chains.no_sight(off)
    chain = f"{chains.hear([source], times=False)} {chains.see(seen)} {end}"
    return Reference("the thing that sounds", seen if there else [*seen, source], target if there else None, chain)


def _looks_and_sound(rng, name, colour, there, when) -> Reference:
    """"the red bell that sounds": if not there, then silent, and another thing sounds."""
    makers = cast(rng, [name, *others(rng, name)[:1 + int(rng.integers(2))]])
    target = makers[0](colour=colour, sounding=when if there else None)
    seen = [target, makers[1](sounding=None if there else when), *(make() for make in makers[2:])]
    source = seen[0 if there else 1]
    end = chains.sounds(target) if there else chains.silent(target)
    chain = f"{chains.hear([source], times=False)} {chains.see(seen)} {end}"
    return Reference(f"the {colour} {name} that sounds", seen, target if there else None, chain)


def _silent(rng, name, colour, there, when) -> Reference:
    """"the silent thing": if not there, then all things sound."""
    makers = cast(rng, [name, *others(rng, name)[:1 + int(rng.integers(2))]])
    target = makers[0](colour=colour, sounding=None if there else when)
    rest = [make(sounding=when) for make in makers[1:]]
    heard = rest if there else [target, *rest]
    end = chains.silent(target) if there else " ".join(chains.sounds(t) for t in chains.by_place(heard))
    chain = f"{chains.hear(heard, times=False)} {chains.see([target, *rest])} {end}"
    return Reference("the silent thing", [target, *rest], target if there else None, chain)


#: Kind of description -> what stages it: (rng, class, colour, whether it is there, the seconds in which things sound).
REFERENCES: dict[str, Callable[[np.random.Generator, str, str, bool, Interval], Reference]] = {
    "looks": _looks,
    "place": _place,
    "sound": _sounding,
    "looks and sound": _looks_and_sound,
    "silence": _silent,
}
