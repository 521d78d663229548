"""Templates of questions about a clip. Each one knows its answers and how to stage a scene for one of them.

:data:`QUESTIONS` has the nine types of MUSIC-AVQA (Li et al., "Learning to Answer Questions in Dynamic Audio-Visual
Scenarios", CVPR 2022), where a question of presence counts as Counting. :data:`CHOICES` has the relations and types of
AVQA (Yang et al., "AVQA: A Dataset for Audio-Visual Question Answering on Videos", ACM MM 2022) without Why and Used
For, which the world cannot stage; the wrong choices are first of all what else the clip holds.

In each scene one modality alone does not show the answer: the thing asked about may be seen and silent, or heard off
screen; and the number of things does not show it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from crab.world import chains
from crab.world.scene import CLASSES, COLOURS, MOTIONS, QUADRANTS, SECONDS, Thing, sample_interval, sample_thing
from crab.world.staging import OFF_SCREEN, apart, cast, others, pick, somewhere, sound_somewhere

YES_NO = ("yes", "no")
COUNTS = ("one", "two", "three")
OFFERED = 4


class Staged(NamedTuple):
    """The things of a scene, the question about it, the chain, and the wrong choices that are offered before others."""

    things: list[Thing]
    text: str
    chain: str
    likely: Sequence[str] = ()


class Question(NamedTuple):
    """A template. `relation` is what is needed to answer it; `stage(rng, answer)` makes a scene for that answer."""

    relation: str
    kind: str
    answers: tuple[str, ...]
    stage: Callable[[np.random.Generator, str], Staged]

    def choices(self, rng: np.random.Generator, answer: str, likely: Sequence[str], place: int) -> list[str]:
        """Four different choices with the answer at `place`; the wrong ones are `likely` ones, then other answers."""
        rest = [str(a) for a in rng.permutation(self.answers)]
        wrong = list(dict.fromkeys(c for c in [*likely, *rest] if c != answer))[: OFFERED - 1]
        wrong = [wrong[int(i)] for i in rng.permutation(len(wrong))]
        return [*wrong[:place], answer, *wrong[place:]]


# ---------------------------------------------------------------- MUSIC-AVQA


def _sound_present(rng, answer) -> Staged:
    name, *rest = others(rng)
    makers = cast(rng, [name, *rest])
    start = YES_NO.index(answer)
    heard = [sound_somewhere(rng, make) for make in makers[start : start + 1 + int(rng.integers(2))]]
    unheard = [makers[0]()] if answer == "no" and rng.random() < 0.5 else []
    end = "" if answer == "yes" else f" {chains.no_sound(name)}"
    chain = chains.hear(heard, times=False) + end
    return Staged([*heard, *unheard], f"is there {chains.article(name)} sound ?", chain)


def _sound_count(rng, answer) -> Staged:
    count = COUNTS.index(answer) + 1
    makers = cast(rng, others(rng)[:4])
    heard = [sound_somewhere(rng, make) for make in makers[:count]]
    silent = [makers[count]()] if rng.random() < 0.5 else []
    chain = f"{chains.hear(heard, times=False)} {chains.counted(count, 'heard')}"
    return Staged([*heard, *silent], "how many sounds are heard ?", chain)


def _sound_order(rng, answer) -> Staged:
    first, second, *_ = others(rng)
    intervals = apart(rng, swap=answer == "no")
    makers = cast(rng, [first, second])
    things = [make(sounding=times, **somewhere(rng)) for make, times in zip(makers, intervals, strict=True)]
    chain = f"{chains.hear(things)} {chains.first(first if answer == 'yes' else second)}"
    return Staged(things, f"does the {first} sound before the {second} ?", chain)


def _sight_count(rng, answer) -> Staged:
    count = COUNTS.index(answer) + 1
    makers = cast(rng, others(rng)[:4])
    seen = [make() for make in makers[: count - 1]]
    seen.append(makers[count - 1](sounding=sample_interval(rng, 3)))
    unseen = [makers[count](**OFF_SCREEN, sounding=sample_interval(rng, 3))] if rng.random() < 0.5 else []
    chain = f"{chains.see(seen)} {chains.counted(count, 'seen')}"
    return Staged([*seen, *unseen], "how many things are seen ?", chain)


def _sight_present(rng, answer) -> Staged:
    name, *rest = others(rng)
    makers = cast(rng, [name, *rest])
    heard = sample_interval(rng, 3) if rng.random() < 0.5 else None
    start = YES_NO.index(answer)
    seen = [
        make(sounding=heard if make is makers[0] else None) for make in makers[start : start + 1 + int(rng.integers(3))]
    ]
    unseen = [sample_thing(rng, rest[-1], visible=None, sounding=sample_interval(rng, 3))]
    if answer == "no" and heard:
        unseen.append(makers[0](**OFF_SCREEN, sounding=heard))
    end = "" if answer == "yes" else f" {chains.no_sight(name)}"
    return Staged([*seen, *unseen], f"is there {chains.article(name)} in the video ?", chains.see(seen) + end)


def _sight_place(rng, answer) -> Staged:
    place = QUADRANTS.index(answer)
    elsewhere = [int(q) for q in rng.permutation([q for q in range(4) if q != place])]
    names = others(rng)[: 2 + int(rng.integers(2))]
    sounding = sample_interval(rng, 3)
    source = int(rng.integers(len(names)))
    things = [
        sample_thing(rng, name, quadrant, sounding=sounding if i == source else None)
        for i, (name, quadrant) in enumerate(zip(names, [place, *elsewhere], strict=False))
    ]
    return Staged(things, f"where is the {chains.noun(things[0])} ?", chains.see(things[:1]))


def _source_seen(rng, answer) -> Staged:
    makers = cast(rng, others(rng)[:3])
    seen = answer == "yes"
    source = makers[0](sounding=sample_interval(rng, 3), **({} if seen else OFF_SCREEN))
    silent = int(rng.integers(2)) + (not seen)  # so that one or two things are on screen for both answers
    things = [source, *(make() for make in makers[1 : 1 + silent])]
    end = chains.sounds(source) if seen else chains.no_sight(source.name)
    chain = chains.heard_and_seen([source], [t for t in things if t.visible], end)
    return Staged(things, "is the sounding thing in the video ?", chain)


def _source_place(rng, answer) -> Staged:
    place = QUADRANTS.index(answer)
    elsewhere = int(rng.choice([q for q in range(4) if q != place]))
    name, other, *_ = others(rng)
    source = sample_thing(rng, name, place, sounding=sample_interval(rng, 3))
    things = [source, sample_thing(rng, other, elsewhere)]
    chain = chains.heard_and_seen([source], things, chains.sounds(source))
    return Staged(things, "where is the sounding thing ?", chain)


def _source_count(rng, answer) -> Staged:
    count = COUNTS.index(answer) + 1
    makers = cast(rng, others(rng)[:4])
    things = [make(sounding=sample_interval(rng, 3)) for make in makers[:count]]
    if count < 3 and rng.random() < 0.5:
        things.append(makers[count]())
    if rng.random() < 0.5:
        things.append(makers[3](**OFF_SCREEN, sounding=sample_interval(rng, 3)))
    heard, seen = [t for t in things if t.sounding], [t for t in things if t.visible]
    chain = chains.heard_and_seen(heard, seen, chains.counted(count, "seen and heard"))
    return Staged(things, "how many things are both seen and heard ?", chain)


def _source_first(rng, answer) -> Staged:
    intervals = apart(rng)
    makers = cast(rng, [answer, *others(rng, answer)[:1]])
    things = [make(sounding=times) for make, times in zip(makers, intervals, strict=True)]
    return Staged(things, "which thing sounds first ?", f"{chains.hear(things)} {chains.first(answer)}")


def _place_order(rng, answer) -> Staged:
    intervals = apart(rng, swap=answer == "no")
    makers = cast(rng, others(rng)[:2])
    things = one, other = [make(sounding=times) for make, times in zip(makers, intervals, strict=True)]
    text = f"does the thing at {one.quadrant} sound before the thing at {other.quadrant} ?"
    leader = one if answer == "yes" else other
    return Staged(things, text, f"{chains.see(things)} {chains.hear(things)} {chains.first(leader.name)}")


QUESTIONS = (
    Question("Audio", "Counting", YES_NO, _sound_present),
    Question("Audio", "Counting", COUNTS, _sound_count),
    Question("Audio", "Comparative", YES_NO, _sound_order),
    Question("Visual", "Counting", YES_NO, _sight_present),
    Question("Visual", "Counting", COUNTS, _sight_count),
    Question("Visual", "Location", QUADRANTS, _sight_place),
    Question("Audio-Visual", "Existential", YES_NO, _source_seen),
    Question("Audio-Visual", "Location", QUADRANTS, _source_place),
    Question("Audio-Visual", "Counting", COUNTS, _source_count),
    Question("Audio-Visual", "Comparative", YES_NO, _place_order),
    Question("Audio-Visual", "Temporal", CLASSES, _source_first),
)


# ---------------------------------------------------------------- AVQA


def _which_heard(rng, answer) -> Staged:
    """One sound, on or off screen, and one or two silent things on screen."""
    makers = cast(rng, [answer, *others(rng, answer)])
    source = sound_somewhere(rng, makers[0])
    things = [source, *(make() for make in makers[1 : 2 + int(rng.integers(2))])]
    return Staged(things, "which thing is heard ?", chains.hear([source], times=False), [t.name for t in things])


def _sound_before(rng, answer) -> Staged:
    """Three sounds, on or off screen."""
    starts = np.cumsum([int(rng.integers(3)), *(2 + rng.integers(2, size=2))])
    makers = cast(rng, [answer, *others(rng, answer)[:2]])
    things = [
        make(sounding=(int(start), int(rng.integers(start + 2, SECONDS + 1))), **somewhere(rng))
        for make, start in zip(makers, starts, strict=True)
    ]
    text = f"which thing sounds before the {things[1].name} ?"
    return Staged(things, text, f"{chains.hear(things)} {chains.first(answer)}", [things[2].name])


_INTERVALS = {chains.lasting((a, b)): (a, b) for a in range(SECONDS) for b in range(a + 2, SECONDS + 1)}


def _sound_when(rng, answer) -> Staged:
    """Two sounds, on or off screen."""
    other = sample_interval(rng, 3)
    makers = cast(rng, others(rng)[:2])
    intervals = _INTERVALS[answer], other
    things = [make(sounding=times, **somewhere(rng)) for make, times in zip(makers, intervals, strict=True)]
    return Staged(things, f"when does the {things[0].name} sound ?", chains.hear(things), [chains.lasting(other)])


def _which_seen(rng, answer) -> Staged:
    """Two things on screen, and a sound from off screen."""
    place, elsewhere = (int(q) for q in rng.permutation(4)[:2])
    other, off, *_ = others(rng, answer)
    seen = [sample_thing(rng, answer, place), sample_thing(rng, other, elsewhere)]
    unseen = sample_thing(rng, off, visible=None, sounding=sample_interval(rng, 3))
    return Staged([*seen, unseen], f"which thing is at {QUADRANTS[place]} ?", chains.see(seen), [other, off])


def _happens(rng, answer) -> Staged:
    """Two things on screen, of which either may sound."""
    motion = pick(rng, MOTIONS, answer)
    heard = [sample_interval(rng, 3), None]
    makers, order = cast(rng, others(rng)[:2]), rng.permutation(2)
    things = [
        make(motion=does, sounding=heard[i]) for make, does, i in zip(makers, (answer, motion), order, strict=True)
    ]
    return Staged(things, f"what happens to the {things[0].name} ?", chains.see(things, does=True), [motion])


def _sounding_happens(rng, answer) -> Staged:
    """Two things on screen, of which one sounds."""
    motion = pick(rng, MOTIONS, answer)
    makers = cast(rng, others(rng)[:2])
    source, other = makers[0](motion=answer, sounding=sample_interval(rng, 3)), makers[1](motion=motion)
    chain = chains.heard_and_seen([source], [source, other], chains.sounds(source), does=True)
    return Staged([source, other], "what happens to the sounding thing ?", chain, [motion])


def _comes_from(rng, answer) -> Staged:
    """Two things on screen, in different colours. The sound shows the class, and the picture its colour."""
    colour, name = answer.split()
    makers = cast(rng, [name, *others(rng, name)[:1]])
    source = makers[0](colour=colour, sounding=sample_interval(rng, 3))
    other = makers[1](colour=pick(rng, COLOURS, colour))
    chain = chains.heard_and_seen([source], [source, other], chains.sounds(source))
    wrong = [chains.noun(other), f"{colour} {other.name}", f"{other.colour} {name}"]
    return Staged([source, other], "what does the sound come from ?", chain, wrong)


CHOICES = (
    Question("Sound", "Which", CLASSES, _which_heard),
    Question("Sound", "Before Next", CLASSES, _sound_before),
    Question("Sound", "When", tuple(_INTERVALS), _sound_when),
    Question("View", "Which", CLASSES, _which_seen),
    Question("View", "Happening", MOTIONS, _happens),
    Question("Both", "Happening", MOTIONS, _sounding_happens),
    Question("Both", "Where", QUADRANTS, _source_place),
    Question("Both", "Come From", tuple(f"{c} {n}" for c in COLOURS for n in CLASSES), _comes_from),
)
