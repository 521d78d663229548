"""Question templates of MUSIC-AVQA's kind: each knows its type, its answers, and how to stage one of them.

The types are MUSIC-AVQA's own (Li et al., "Learning to Answer Questions in Dynamic Audio-Visual Scenarios", CVPR
2022), all nine; a question of presence counts as Counting there, as it does here.  Each template is staged so that the other
modality alone does not give the answer away: what is asked for may be seen and silent, or heard off screen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from crab.world import chains
from crab.world.staging import apart, cast, others
from crab.world.scene import CLASSES, QUADRANTS, Thing, sample_interval, sample_thing

YES_NO = ("yes", "no")
COUNTS = ("one", "two", "three")

Staged = tuple[list[Thing], str, str]  # the things, the question, the chain


@dataclass(frozen=True)
class Question:
    """A template: `stage(rng, answer)` gives the things of a scene for which `answer` is right, question and chain."""

    modality: str
    kind: str
    answers: tuple[str, ...]
    stage: Callable[[np.random.Generator, str], Staged]


def somewhere(rng: np.random.Generator) -> dict:
    """On screen throughout, or off screen."""
    return {} if rng.random() < 0.5 else {"visible": None}


def _sound_present(rng, answer) -> Staged:
    name, *rest = others(rng)
    makers = cast(rng, [name, *rest])
    # One or two sounds either way, so that their number does not tell.
    first = 0 if answer == "yes" else 1
    heard = [make(sounding=sample_interval(rng, 3), **somewhere(rng))
             for make in makers[first:first + 1 + int(rng.integers(2))]]
    things = [*heard, *([makers[0]()] if answer == "no" and rng.random() < 0.5 else [])]
    end = "" if answer == "yes" else f" {chains.no_sound(name)}"
    return things, f"is there {chains.article(name)} sound ?", chains.hear(heard, times=False) + end


def _sound_count(rng, answer) -> Staged:
    count = COUNTS.index(answer) + 1
    makers = cast(rng, others(rng)[:4])
    things = [make(sounding=sample_interval(rng, 3), **somewhere(rng)) for make in makers[:count]]
    if rng.random() < 0.5:
        things.append(makers[count]())
    return things, "how many sounds are heard ?", f"{chains.hear(things[:count], times=False)} {chains.counted(count, 'heard')}"


def _sound_order(rng, answer) -> Staged:
    first, second, *_ = others(rng)
    early, late = apart(rng)
    if answer == "no":
        early, late = late, early
    things = [make(sounding=when, **somewhere(rng))
              for make, when in zip(cast(rng, [first, second]), (early, late), strict=True)]
    leader = first if answer == "yes" else second
    return things, f"does the {first} sound before the {second} ?", f"{chains.hear(things)} {chains.first(leader)}"


def _sight_count(rng, answer) -> Staged:
    count = COUNTS.index(answer) + 1
    makers = cast(rng, others(rng)[:4])
    things = [make() for make in makers[:count - 1]]
    things.append(makers[count - 1](sounding=sample_interval(rng, 3)))
    if rng.random() < 0.5:
        things.append(makers[count](visible=None, sounding=sample_interval(rng, 3)))
    return things, "how many things are seen ?", f"{chains.see(things[:count])} {chains.counted(count, 'seen')}"


def _sight_present(rng, answer) -> Staged:
    name, *rest = others(rng)
    makers = cast(rng, [name, *rest])
    heard = sample_interval(rng, 3) if rng.random() < 0.5 else None
    first = 0 if answer == "yes" else 1
    seen = [make(sounding=heard if make is makers[0] else None)
            for make in makers[first:first + 1 + int(rng.integers(3))]]
    unseen = [sample_thing(rng, rest[-1], visible=None, sounding=sample_interval(rng, 3))]
    if answer == "no" and heard:
        unseen.append(makers[0](visible=None, sounding=heard))
    things = [*seen, *unseen]
    end = "" if answer == "yes" else f" {chains.no_sight(name)}"
    return things, f"is there {chains.article(name)} in the video ?", chains.see(seen) + end


def _sight_place(rng, answer) -> Staged:
    place = QUADRANTS.index(answer)
    elsewhere = [int(q) for q in rng.permutation([q for q in range(4) if q != place])]
    name, *rest = others(rng)
    more = 1 + int(rng.integers(2))
    sounding = [None] * (1 + more)
    sounding[int(rng.integers(1 + more))] = sample_interval(rng, 3)
    things = [sample_thing(rng, n, q, sounding=when)
              for n, q, when in zip([name, *rest], [place, *elsewhere], sounding, strict=False)]
    thing = things[0]
    return things, f"where is the {chains.noun(thing)} ?", chains.see([thing])


def _source_seen(rng, answer) -> Staged:
    makers = cast(rng, others(rng)[:3])
    source = makers[0](sounding=sample_interval(rng, 3), **({} if answer == "yes" else {"visible": None}))
    # One or two things on screen either way, so that their number does not tell.
    silent = int(rng.integers(2)) if answer == "yes" else 1 + int(rng.integers(2))
    things = [source, *(make() for make in makers[1:1 + silent])]
    seen = [t for t in things if t.visible]
    end = chains.sounds(source) if answer == "yes" else chains.no_sight(source.name)
    return things, "is the sounding thing in the video ?", f"{chains.hear([source], times=False)} {chains.see(seen)} {end}"


def source_place(rng, answer) -> Staged:
    place = QUADRANTS.index(answer)
    elsewhere = int(rng.choice([q for q in range(4) if q != place]))
    name, other, *_ = others(rng)
    source = sample_thing(rng, name, place, sounding=sample_interval(rng, 3))
    things = [source, sample_thing(rng, other, elsewhere)]
    chain = f"{chains.hear([source], times=False)} {chains.see(things)} {chains.sounds(source)}"
    return things, "where is the sounding thing ?", chain


def _source_count(rng, answer) -> Staged:
    count = COUNTS.index(answer) + 1
    makers = cast(rng, others(rng)[:4])
    things = [make(sounding=sample_interval(rng, 3)) for make in makers[:count]]
    if count < 3 and rng.random() < 0.5:
        things.append(makers[count]())
    if rng.random() < 0.5:
        things.append(makers[3](visible=None, sounding=sample_interval(rng, 3)))
    heard, seen = [t for t in things if t.sounding], [t for t in things if t.visible]
    chain = f"{chains.hear(heard, times=False)} {chains.see(seen)} {chains.counted(count, 'seen and heard')}"
    return things, "how many things are both seen and heard ?", chain


def _source_first(rng, answer) -> Staged:
    early, late = apart(rng)
    makers = cast(rng, [answer, *others(rng, answer)[:1]])
    things = [make(sounding=when) for make, when in zip(makers, (early, late), strict=True)]
    return things, "which thing sounds first ?", f"{chains.hear(things)} {chains.first(answer)}"


def _place_order(rng, answer) -> Staged:
    early, late = apart(rng)
    if answer == "no":
        early, late = late, early
    things = [make(sounding=when) for make, when in zip(cast(rng, others(rng)[:2]), (early, late), strict=True)]
    one, other = things
    question = f"does the thing at {one.quadrant} sound before the thing at {other.quadrant} ?"
    leader = one if answer == "yes" else other
    return things, question, f"{chains.see(things)} {chains.hear(things)} {chains.first(leader.name)}"


QUESTIONS = (
    Question("Audio", "Counting", YES_NO, _sound_present),
    Question("Audio", "Counting", COUNTS, _sound_count),
    Question("Audio", "Comparative", YES_NO, _sound_order),
    Question("Visual", "Counting", YES_NO, _sight_present),
    Question("Visual", "Counting", COUNTS, _sight_count),
    Question("Visual", "Location", QUADRANTS, _sight_place),
    Question("Audio-Visual", "Existential", YES_NO, _source_seen),
    Question("Audio-Visual", "Location", QUADRANTS, source_place),
    Question("Audio-Visual", "Counting", COUNTS, _source_count),
    Question("Audio-Visual", "Comparative", YES_NO, _place_order),
    Question("Audio-Visual", "Temporal", CLASSES, _source_first),
)
