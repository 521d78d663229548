"""Descriptions of one thing, as in Ref-AVS. Each kind knows how to stage a scene with the thing, or without it.

Both scenes look alike: they hold equally many things, and of the same classes if the description names one. So only the
description decides. The chain says what is perceived, and last what of it is meant. Where two things share a class
neither of them sounds, because a sound shows the class only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from crab.world import chains
from crab.world.scene import CLASSES, COLOURS, Interval, Thing, sample_thing
from crab.world.staging import cast, others, pick


class Reference(NamedTuple):
    """A description, the things of the scene, the thing meant (None if it is not there) and the chain."""

    words: str
    things: list[Thing]
    target: Thing | None
    chain: str


def unseen_colour(name: str) -> str:
    """The colour in which no training description means a thing of this class."""
    return COLOURS[CLASSES.index(name) % len(COLOURS)]


def _off_screen(rng: np.random.Generator, name: str, times: Interval) -> Thing:
    """A sound from off screen."""
    return sample_thing(rng, name, visible=None, sounding=times)


def _looks(rng, name, colour, there, times) -> Reference:
    """As "the red bell": beside something red and, in half the scenes, another bell."""
    same, third, off, *_ = others(rng, name)
    twin, second_twin = (str(c) for c in rng.permutation([c for c in COLOURS if c != colour])[:2])
    another = rng.random() < 0.5
    makers = cast(rng, [name, same, name if another else third])
    target = makers[0](colour=colour if there else twin)
    loud = rng.random() < 0.5
    seen = [
        target,
        makers[1](colour=colour, sounding=times if loud else None),
        makers[2](**({"colour": second_twin} if another else {})),
    ]
    unseen = [] if loud else [_off_screen(rng, off, times)]
    words = f"{colour} {name}"
    chain = f"{chains.see(seen)} {chains.see([target]) if there else chains.no_sight(words)}"
    return Reference(f"the {words}", [*seen, *unseen], target, chain)


def _place(rng, name, colour, there, times) -> Reference:
    """As "the bell at top left": if it is not there, it is elsewhere."""
    other, third, off, *_ = others(rng, name)
    another = rng.random() < 0.5
    makers = cast(rng, [name, other, name if another else third])
    target, beside = makers[0](colour=colour), makers[1]()
    seen = [target, beside, makers[2](**({"colour": pick(rng, COLOURS, colour)} if another else {}))]
    at_place = target if there else beside
    chain = f"{chains.see(seen)} {chains.see([at_place])}"
    return Reference(f"the {name} at {at_place.quadrant}", [*seen, _off_screen(rng, off, times)], target, chain)


def _sounding(rng, name, colour, there, times) -> Reference:
    """As "the thing that sounds": if it is not there, the sound is off screen."""
    other, third, off, *_ = others(rng, name)
    makers = cast(rng, [name, other, third])[: 2 + int(rng.integers(2))]
    target = makers[0](colour=colour, sounding=times if there else None)
    seen = [target, *(make() for make in makers[1:])]
    unseen = [] if there else [_off_screen(rng, off, times)]
    source = target if there else unseen[0]
    chain = chains.heard_and_seen([source], seen, chains.sounds(target) if there else chains.no_sight(off))
    return Reference("the thing that sounds", [*seen, *unseen], target, chain)


def _looks_and_sound(rng, name, colour, there, times) -> Reference:
    """As "the red bell that sounds": if it is not there, the red bell is silent and another thing sounds."""
    makers = cast(rng, [name, *others(rng, name)[: 1 + int(rng.integers(2))]])
    target = makers[0](colour=colour, sounding=times if there else None)
    seen = [target, makers[1](sounding=None if there else times), *(make() for make in makers[2:])]
    source = seen[0 if there else 1]
    chain = chains.heard_and_seen([source], seen, chains.sounds(target) if there else chains.silent(target))
    return Reference(f"the {colour} {name} that sounds", seen, target, chain)


def _silent(rng, name, colour, there, times) -> Reference:
    """As "the silent thing": if it is not there, all things sound."""
    makers = cast(rng, [name, *others(rng, name)[: 1 + int(rng.integers(2))]])
    target = makers[0](colour=colour, sounding=None if there else times)
    seen = [target, *(make(sounding=times) for make in makers[1:])]
    heard = seen[1:] if there else seen
    ends = [chains.silent(target)] if there else [chains.sounds(t) for t in chains.by_place(heard)]
    return Reference("the silent thing", seen, target, chains.heard_and_seen(heard, seen, *ends))


_STAGES: dict[str, Callable[[np.random.Generator, str, str, bool, Interval], Reference]] = {
    "looks": _looks,
    "place": _place,
    "sound": _sounding,
    "looks and sound": _looks_and_sound,
    "silence": _silent,
}
#: The kinds of description.
REFERENCES = tuple(_STAGES)


def refer(kind: str, rng: np.random.Generator, name: str, colour: str, there: bool, times: Interval) -> Reference:
    """A description of the thing of this class and colour, and a scene in which it is there or not.

    Args:
        kind: one of :data:`REFERENCES`.
        times: when things sound.
    """
    reference = _STAGES[kind](rng, name, colour, there, times)
    return reference if there else reference._replace(target=None)
