"""Descriptions of one thing, each staged with the thing in the scene, or without it.

Both scenes look alike: they hold equally many things, and of the same classes if the description names one. So only the
description decides. The chain says what is perceived, and last what of it is meant. Where two things share a class
neither of them sounds, because a sound shows the class only.
"""

from collections.abc import Callable

import numpy as np

from crab import tasks
from crab.tasks.segmentation import points_inside
from crab.world import chains, render
from crab.world.scene import CLASSES, COLOURS, LATTICE, SECONDS, Interval, Thing
from crab.world.staging import Stage, View, cast, makers, off_screen, others, pick, skewed

Described = tuple[str, list[Thing], Thing, str]  # the words, the things of the scene, the thing they are for, the chain


def unseen_colour(name: str) -> str:
    """The colour in which no training description means a thing of this class."""
    return COLOURS[CLASSES.index(name) % len(COLOURS)]


def _looks(rng, name, colour, there, times) -> Described:
    """As "the red bell": beside something red and, in half the scenes, another bell."""
    same, third, off, *_ = others(rng, name)
    twin, second_twin = (str(c) for c in rng.permutation([c for c in COLOURS if c != colour])[:2])
    another = rng.random() < 0.5
    make = makers(rng, [name, same, name if another else third])
    target = make[0](colour=colour if there else twin)
    loud = rng.random() < 0.5
    beside = make[1](colour=colour, sounding=times if loud else None)
    seen = [target, beside, make[2](**({"colour": second_twin} if another else {}))]
    unseen = [] if loud else [off_screen(rng, off, times)]
    end = chains.see([target]) if there else chains.say("see no", thing=f"{colour} {name}")
    return f"the {colour} {name}", [*seen, *unseen], target, f"{chains.see(seen)} {end}"


def _place(rng, name, colour, there, times) -> Described:
    """As "the bell at top left": if it is not there, it is elsewhere."""
    other, third, off, *_ = others(rng, name)
    another = rng.random() < 0.5
    make = makers(rng, [name, other, name if another else third])
    target, beside = make[0](colour=colour), make[1]()
    seen = [target, beside, make[2](**({"colour": pick(rng, COLOURS, colour)} if another else {}))]
    at_place = target if there else beside
    chain = f"{chains.see(seen)} {chains.see([at_place])}"
    return f"the {name} at {at_place.quadrant}", [*seen, off_screen(rng, off, times)], target, chain


def _sounding(rng, name, colour, there, times) -> Described:
    """As "the thing that sounds": if it is not there, the sound is off screen."""
    *make, off = cast(rng, name)
    make = make[: 2 + int(rng.integers(2))]
    target = make[0](colour=colour, sounding=times if there else None)
    seen = [target, *(m() for m in make[1:])]
    unseen = [] if there else [off_screen(rng, off.name, times)]
    end = chains.sounds(target) if there else chains.say("see no", thing=off.name)
    chain = chains.heard_and_seen([target] if there else unseen, seen, end)
    return "the thing that sounds", [*seen, *unseen], target, chain


def _looks_and_sound(rng, name, colour, there, times) -> Described:
    """As "the red bell that sounds": if it is not there, the red bell is silent and another thing sounds."""
    make = makers(rng, [name, *others(rng, name)[: 1 + int(rng.integers(2))]])
    target = make[0](colour=colour, sounding=times if there else None)
    seen = [target, make[1](sounding=None if there else times), *(m() for m in make[2:])]
    end = chains.sounds(target) if there else chains.silent(target)
    chain = chains.heard_and_seen([target if there else seen[1]], seen, end)
    return f"the {colour} {name} that sounds", seen, target, chain


def _silent(rng, name, colour, there, times) -> Described:
    """As "the silent thing": if it is not there, all things sound."""
    make = makers(rng, [name, *others(rng, name)[: 1 + int(rng.integers(2))]])
    target = make[0](colour=colour, sounding=None if there else times)
    seen = [target, *(m(sounding=times) for m in make[1:])]
    heard = seen[1:] if there else seen
    ends = [chains.silent(target)] if there else [chains.sounds(t) for t in chains.by_place(heard)]
    return "the silent thing", seen, target, chains.heard_and_seen(heard, seen, *ends)


#: Kind of description -> what stages it: (rng, class, colour, whether the thing is there, when things sound).
KINDS: dict[str, Callable[[np.random.Generator, str, str, bool, Interval], Described]] = {
    "looks": _looks,
    "place": _place,
    "sound": _sounding,
    "looks and sound": _looks_and_sound,
    "silence": _silent,
}


def ref_avs(stage: Stage) -> View:
    """Ref-AVS: a description of one thing by its looks, place, sound or silence, and its box, points and mask.

    In a quarter of the training records and in the test split ``test_n`` the thing is not there. Each class has one
    colour that no training description uses; it is kept for the test split ``test_u``.
    """
    rng, name = stage.rng(), stage.wanted(CLASSES, "class")
    train = stage.split == "train"
    part = "train" if train else stage.wanted(skewed(test_s=4, test_u=3, test_n=3), "split")
    there = stage.wanted((True, True, True, False), "there") if train else part != "test_n"
    kinds = ("looks", "looks and sound") if part == "test_u" else tuple(KINDS)
    kept = unseen_colour(name)
    colour = kept if part == "test_u" else pick(rng, COLOURS, kept)
    second = int(rng.integers(SECONDS))
    kind = stage.wanted(kinds, f"kind in {part}")
    words, things, target, chain = KINDS[kind](rng, name, colour, there, (second, second + 1))
    scene = stage.scene(rng, things)
    truth = (target.box(second), points_inside(render.mask(target, second), 3, LATTICE)) if there else tasks.NULL
    stem = stage.stems[0]
    fields = {"vid": stem, "uid": f"{stem}_0", "fid": 0}
    fields |= {"idx": 0, "description": words} if train else {"object": words, "split": part}
    view = stage.still(f"media/{stem}", scene, second, chain, truth, fields)
    if there:
        path = tasks.mask_path("ref_avs", view.record).removeprefix(f"{tasks.FOLDER}/ref_avs/")
        view.files[path] = ("mask", (target,), second)
    return view


VIEWS = {"ref_avs": ref_avs}
