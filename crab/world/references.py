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
from crab.world.staging import cast, makers, others, pick


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
    make = makers(rng, [name, same, name if another else third])
    target = make[0](colour=colour if there else twin)
    loud = rng.random() < 0.5
    beside = make[1](colour=colour, sounding=times if loud else None)
    seen = [target, beside, make[2](**({"colour": second_twin} if another else {}))]
    unseen = [] if loud else [_off_screen(rng, off, times)]
    end = chains.see([target]) if there else chains.say("see no", thing=f"{colour} {name}")
    return Reference(f"the {colour} {name}", [*seen, *unseen], target, f"{chains.see(seen)} {end}")


def _place(rng, name, colour, there, times) -> Reference:
    """As "the bell at top left": if it is not there, it is elsewhere."""
    other, third, off, *_ = others(rng, name)
    another = rng.random() < 0.5
    make = makers(rng, [name, other, name if another else third])
    target, beside = make[0](colour=colour), make[1]()
    seen = [target, beside, make[2](**({"colour": pick(rng, COLOURS, colour)} if another else {}))]
    at_place = target if there else beside
    things = [*seen, _off_screen(rng, off, times)]
    return Reference(
        f"the {name} at {at_place.quadrant}", things, target, f"{chains.see(seen)} {chains.see([at_place])}"
    )


def _sounding(rng, name, colour, there, times) -> Reference:
    """As "the thing that sounds": if it is not there, the sound is off screen."""
    *make, off = cast(rng, name)
    make = make[: 2 + int(rng.integers(2))]
    target = make[0](colour=colour, sounding=times if there else None)
    seen = [target, *(m() for m in make[1:])]
    unseen = [] if there else [_off_screen(rng, off.name, times)]
    end = chains.sounds(target) if there else chains.say("see no", thing=off.name)
    chain = chains.heard_and_seen([target] if there else unseen, seen, end)
    return Reference("the thing that sounds", [*seen, *unseen], target, chain)


def _looks_and_sound(rng, name, colour, there, times) -> Reference:
    """As "the red bell that sounds": if it is not there, the red bell is silent and another thing sounds."""
    make = makers(rng, [name, *others(rng, name)[: 1 + int(rng.integers(2))]])
    target = make[0](colour=colour, sounding=times if there else None)
    seen = [target, make[1](sounding=None if there else times), *(m() for m in make[2:])]
    end = chains.sounds(target) if there else chains.silent(target)
    chain = chains.heard_and_seen([target if there else seen[1]], seen, end)
    return Reference(f"the {colour} {name} that sounds", seen, target, chain)


def _silent(rng, name, colour, there, times) -> Reference:
    """As "the silent thing": if it is not there, all things sound."""
    make = makers(rng, [name, *others(rng, name)[: 1 + int(rng.integers(2))]])
    target = make[0](colour=colour, sounding=None if there else times)
    seen = [target, *(m(sounding=times) for m in make[1:])]
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
