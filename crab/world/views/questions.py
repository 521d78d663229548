"""Questions about a clip: templates that know their answers and how to stage a scene for one of them.

:data:`QUESTIONS` has the nine types of MUSIC-AVQA (Li et al., "Learning to Answer Questions in Dynamic Audio-Visual
Scenarios", CVPR 2022), where a question of presence counts as Counting. :data:`CHOICES` has the relations and types of
AVQA (Yang et al., "AVQA: A Dataset for Audio-Visual Question Answering on Videos", ACM MM 2022) without Why and Used
For, which the world cannot stage. Its wrong choices are first of all what else the clip holds.

One modality alone does not show the answer, and the number of things does not: the thing asked about may be seen and
silent, or heard off screen.
"""

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from crab.world import chains
from crab.world.scene import CLASSES, COLOURS, MOTIONS, QUADRANTS, SECONDS, Thing, sample_interval, sample_thing
from crab.world.staging import Stage, View, apart, cast, makers, off_screen, others, pick

YES_NO = ("yes", "no")
COUNTS = ("one", "two", "three")


class Staged(NamedTuple):
    """A question about a scene."""

    things: list[Thing]  # in the scene
    text: str
    chain: str
    likely: Sequence[str] = ()  # wrong choices that are offered before others


class Question(NamedTuple):
    """A template."""

    relation: str  # what is needed to answer it: sound, view or both
    kind: str
    answers: tuple[str, ...]
    stage: Callable[[np.random.Generator, str], Staged]  # stages one of the answers


def _sound_present(rng, answer) -> Staged:
    make, absent = cast(rng), answer == "no"
    heard = [m.sounds_anywhere() for m in make[absent : absent + 1 + int(rng.integers(2))]]
    silent = [make[0]()] if absent and rng.random() < 0.5 else []
    end = f" {chains.say('hear no', source=make[0].name)}" if absent else ""
    text = f"is there {chains.article(make[0].name)} sound ?"
    return Staged([*heard, *silent], text, chains.hear(heard, times=False) + end)


def _sound_count(rng, answer) -> Staged:
    make, count = cast(rng), COUNTS.index(answer) + 1
    heard = [m.sounds_anywhere() for m in make[:count]]
    silent = [make[count]()] if rng.random() < 0.5 else []
    chain = f"{chains.hear(heard, times=False)} {chains.say('count', number=answer, what='heard')}"
    return Staged([*heard, *silent], "how many sounds are heard ?", chain)


def _sound_order(rng, answer) -> Staged:
    names = others(rng)
    times = apart(rng) if answer == "yes" else apart(rng)[::-1]
    things = [m.sounds_anywhere(t) for m, t in zip(makers(rng, names), times, strict=False)]
    chain = f"{chains.hear(things)} {chains.say('first', source=names[0 if answer == 'yes' else 1])}"
    return Staged(things, f"does the {names[0]} sound before the {names[1]} ?", chain)


def _sight_count(rng, answer) -> Staged:
    make, count = cast(rng), COUNTS.index(answer) + 1
    seen = [*(m() for m in make[: count - 1]), make[count - 1].sounds()]
    unseen = [make[count].sounds(visible=None)] if rng.random() < 0.5 else []
    chain = f"{chains.see(seen)} {chains.say('count', number=answer, what='seen')}"
    return Staged([*seen, *unseen], "how many things are seen ?", chain)


def _sight_present(rng, answer) -> Staged:
    name, *rest = others(rng)
    make, absent = makers(rng, [name, *rest]), answer == "no"
    heard = sample_interval(rng, 3) if rng.random() < 0.5 else None
    seen = [m(sounding=heard if m is make[0] else None) for m in make[absent : absent + 1 + int(rng.integers(3))]]
    unseen = [off_screen(rng, rest[-1], sample_interval(rng, 3))]
    if absent and heard:
        unseen.append(make[0](visible=None, sounding=heard))
    end = f" {chains.say('see no', thing=name)}" if absent else ""
    return Staged([*seen, *unseen], f"is there {chains.article(name)} in the video ?", chains.see(seen) + end)


def _sight_place(rng, answer) -> Staged:
    place = QUADRANTS.index(answer)
    places = [place, *(int(q) for q in rng.permutation([q for q in range(4) if q != place]))]
    names = others(rng)[: 2 + int(rng.integers(2))]
    times = sample_interval(rng, 3)
    sounding = {int(rng.integers(len(names))): times}
    things = [sample_thing(rng, name, places[i], sounding=sounding.get(i)) for i, name in enumerate(names)]
    return Staged(things, f"where is the {chains.noun(things[0])} ?", chains.see(things[:1]))


def _source_seen(rng, answer) -> Staged:
    make, seen = cast(rng), answer == "yes"
    source = make[0].sounds(**({} if seen else {"visible": None}))
    silent = int(rng.integers(2)) + (not seen)  # so that one or two things are on screen for both answers
    rest = [m() for m in make[1 : 1 + silent]]
    end = chains.sounds(source) if seen else chains.say("see no", thing=source.name)
    chain = chains.heard_and_seen([source], [source, *rest] if seen else rest, end)
    return Staged([source, *rest], "is the sounding thing in the video ?", chain)


def _source_place(rng, answer) -> Staged:
    place = QUADRANTS.index(answer)
    elsewhere = int(rng.choice([q for q in range(4) if q != place]))
    name, other, *_ = others(rng)
    source = sample_thing(rng, name, place, sounding=sample_interval(rng, 3))
    things = [source, sample_thing(rng, other, elsewhere)]
    chain = chains.heard_and_seen([source], things, chains.sounds(source))
    return Staged(things, "where is the sounding thing ?", chain)


def _source_count(rng, answer) -> Staged:
    make, count = cast(rng), COUNTS.index(answer) + 1
    both = [m.sounds() for m in make[:count]]
    silent = [make[count]()] if count < 3 and rng.random() < 0.5 else []
    unseen = [make[3].sounds(visible=None)] if rng.random() < 0.5 else []
    end = chains.say("count", number=answer, what="seen and heard")
    chain = chains.heard_and_seen([*both, *unseen], [*both, *silent], end)
    return Staged([*both, *silent, *unseen], "how many things are both seen and heard ?", chain)


def _source_first(rng, answer) -> Staged:
    times = apart(rng)
    things = [m(sounding=t) for m, t in zip(cast(rng, answer), times, strict=False)]
    return Staged(things, "which thing sounds first ?", f"{chains.hear(things)} {chains.say('first', source=answer)}")


def _place_order(rng, answer) -> Staged:
    times = apart(rng) if answer == "yes" else apart(rng)[::-1]
    things = one, other = [m(sounding=t) for m, t in zip(cast(rng), times, strict=False)]
    end = chains.say("first", source=(one if answer == "yes" else other).name)
    text = f"does the thing at {one.quadrant} sound before the thing at {other.quadrant} ?"
    return Staged(things, text, f"{chains.see(things)} {chains.hear(things)} {end}")


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


def _which_heard(rng, answer) -> Staged:
    """One sound, on or off screen, and one or two silent things on screen."""
    make = cast(rng, answer)
    source = make[0].sounds_anywhere()
    things = [source, *(m() for m in make[1 : 2 + int(rng.integers(2))])]
    return Staged(things, "which thing is heard ?", chains.hear([source], times=False), [t.name for t in things])


def _sound_before(rng, answer) -> Staged:
    """Three sounds, on or off screen."""
    starts = np.cumsum([int(rng.integers(3)), *(2 + rng.integers(2, size=2))])
    things = [
        m.sounds_anywhere((int(start), int(rng.integers(start + 2, SECONDS + 1))))
        for m, start in zip(cast(rng, answer), starts, strict=False)
    ]
    chain = f"{chains.hear(things)} {chains.say('first', source=answer)}"
    return Staged(things, f"which thing sounds before the {things[1].name} ?", chain, [things[2].name])


_INTERVALS = {chains.lasting((a, b)): (a, b) for a in range(SECONDS) for b in range(a + 2, SECONDS + 1)}


def _sound_when(rng, answer) -> Staged:
    """Two sounds, on or off screen."""
    other = sample_interval(rng, 3)
    things = [m.sounds_anywhere(t) for m, t in zip(cast(rng), (_INTERVALS[answer], other), strict=False)]
    return Staged(things, f"when does the {things[0].name} sound ?", chains.hear(things), [chains.lasting(other)])


def _which_seen(rng, answer) -> Staged:
    """Two things on screen, and a sound from off screen."""
    place, elsewhere = (int(q) for q in rng.permutation(4)[:2])
    other, off, *_ = others(rng, answer)
    seen = [sample_thing(rng, answer, place), sample_thing(rng, other, elsewhere)]
    unseen = off_screen(rng, off, sample_interval(rng, 3))
    return Staged([*seen, unseen], f"which thing is at {QUADRANTS[place]} ?", chains.see(seen), [other, off])


def _happens(rng, answer) -> Staged:
    """Two things on screen, of which either may sound."""
    motion = pick(rng, MOTIONS, answer)
    sounding = [sample_interval(rng, 3), None]
    make, order = cast(rng), rng.permutation(2)
    things = [make[i](motion=does, sounding=sounding[order[i]]) for i, does in enumerate((answer, motion))]
    return Staged(things, f"what happens to the {things[0].name} ?", chains.see(things, does=True), [motion])


def _sounding_happens(rng, answer) -> Staged:
    """Two things on screen, of which one sounds."""
    motion = pick(rng, MOTIONS, answer)
    make = cast(rng)
    things = source, _ = [make[0].sounds(motion=answer), make[1](motion=motion)]
    chain = chains.heard_and_seen([source], things, chains.sounds(source), does=True)
    return Staged(things, "what happens to the sounding thing ?", chain, [motion])


def _comes_from(rng, answer) -> Staged:
    """Two things on screen, in different colours. The sound shows the class, and the picture its colour."""
    colour, name = answer.split()
    make = cast(rng, name)
    things = source, other = [make[0].sounds(colour=colour), make[1](colour=pick(rng, COLOURS, colour))]
    chain = chains.heard_and_seen([source], things, chains.sounds(source))
    wrong = [chains.noun(other), f"{colour} {other.name}", f"{other.colour} {name}"]
    return Staged(things, "what does the sound come from ?", chain, wrong)


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


def avqa(stage: Stage) -> View:
    """MUSIC-AVQA: the templates take turns, and so do the answers of each."""
    rng, number = stage.rng(), stage.wanted(range(len(QUESTIONS)), "template")
    question = QUESTIONS[number]
    value = stage.every(len(QUESTIONS)).wanted(question.answers, f"answer to {number}")
    things, text, chain, _ = question.stage(rng, value)
    fields = {
        "video_id": stage.stems[0],
        "question_id": stage.index,
        "type": json.dumps([question.relation, question.kind]),
        "question": text,
        "answer": value,
    }
    return stage.clip(stage.scene(rng, things), chain, value, **fields)


def avqa_thu(stage: Stage) -> View:
    """AVQA: the templates take turns, and so do the answers and the place of the right one among four choices."""
    rng, number = stage.rng(), stage.wanted(range(len(CHOICES)), "template")
    question, turn = CHOICES[number], stage.every(len(CHOICES))
    value = turn.wanted(question.answers, f"answer to {number}")
    place = turn.wanted(range(4), f"place in {number}")
    things, text, chain, likely = question.stage(rng, value)
    scene = stage.scene(rng, things)
    others = [str(a) for a in rng.permutation(question.answers)]
    wrong = list(dict.fromkeys(c for c in [*likely, *others] if c != value))[:3]
    wrong = [wrong[int(i)] for i in rng.permutation(3)]
    fields = {
        "id": stage.stems[0],
        "video_name": stage.stems[0],
        "video_id": stage.index,
        "question_relation": question.relation,
        "question_type": question.kind,
        "multi_choice": [*wrong[:place], value, *wrong[place:]],
        "question_text": text,
        "answer": place,
    }
    return stage.clip(scene, chain, value, **fields)


VIEWS = {"avqa": avqa, "avqa_thu": avqa_thu}
