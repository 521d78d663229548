"""Question templates of AVQA's kind, each with four choices: it knows what it relates to, its type, and how to stage one.

Relations and types are AVQA's own (Yang et al., "AVQA: A Dataset for Audio-Visual Question Answering on Videos", ACM MM
2022); of its eight types the world cannot stage Why and Used For.  Wrong choices are first of all what else the clip
holds, so that only what is asked for decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from crab.world import chains
from crab.world.questions import Staged, somewhere, source_place
from crab.world.staging import cast, others
from crab.world.scene import CLASSES, COLOURS, MOTIONS, QUADRANTS, SECONDS, sample_interval, sample_thing

CHOICES = 4

Offer = tuple[Staged, list[str]]


@dataclass(frozen=True)
class Choice:
    """A template: `stage(rng, answer)` gives things, question and chain, and the wrong choices it wants above others.

    Attributes:
        relation: what is needed to answer: "Sound", "View" or "Both".
        answers: the answers that take turns; wrong choices fill up from here.
    """

    relation: str
    kind: str
    answers: tuple[str, ...]
    stage: Callable[[np.random.Generator, str], Offer]

    def offered(self, rng: np.random.Generator, answer: str, likely: list[str], place: int) -> list[str]:
        """Four different choices, the answer at `place`."""
        rest = [str(a) for a in rng.permutation(self.answers)]
        wrong = list(dict.fromkeys(c for c in [*likely, *rest] if c != answer))[:CHOICES - 1]
        wrong = [wrong[int(i)] for i in rng.permutation(len(wrong))]
        return [*wrong[:place], answer, *wrong[place:]]


def _heard(rng, answer) -> Offer:
    """What sounds may be in view or not; one or two silent things are."""
    makers = cast(rng, [answer, *others(rng, answer)])
    source = makers[0](sounding=sample_interval(rng, 3), **somewhere(rng))
    things = [source, *(make() for make in makers[1:2 + int(rng.integers(2))])]
    return (things, "which thing is heard ?", chains.hear([source], times=False)), [t.name for t in things]


def _in_order(rng, answer) -> Offer:
    """Three sounds, in view or not."""
    starts = np.cumsum([int(rng.integers(3)), *(2 + rng.integers(2, size=2))])
    things = [make(sounding=(int(start), int(rng.integers(start + 2, SECONDS + 1))), **somewhere(rng))
              for make, start in zip(cast(rng, [answer, *others(rng, answer)[:2]]), starts, strict=True)]
    question = f"which thing sounds before the {things[1].name} ?"
    return (things, question, f"{chains.hear(things)} {chains.first(answer)}"), [things[2].name]


def _when(rng, answer) -> Offer:
    """Two sounds, in view or not."""
    other = sample_interval(rng, 3)
    first, second = cast(rng, others(rng)[:2])
    thing = first(sounding=_INTERVALS[answer], **somewhere(rng))
    things = [thing, second(sounding=other, **somewhere(rng))]
    return (things, f"when does the {thing.name} sound ?", chains.hear(things)), [chains.lasting(other)]


def _seen(rng, answer) -> Offer:
    """Two things in view, and a sound from off screen."""
    place, elsewhere = (int(q) for q in rng.permutation(4)[:2])
    other, off, *_ = others(rng, answer)
    things = [sample_thing(rng, answer, place), sample_thing(rng, other, elsewhere),
              sample_thing(rng, off, visible=None, sounding=sample_interval(rng, 3))]
    return (things, f"which thing is at {QUADRANTS[place]} ?", chains.see(things[:2])), [other, off]


def _happens(rng, answer) -> Offer:
    """Two things in view, of which either may sound."""
    motion = str(rng.choice([m for m in MOTIONS if m != answer]))
    heard = [sample_interval(rng, 3), None]
    makers = cast(rng, others(rng)[:2])
    things = [make(motion=m, sounding=heard[i])
              for make, m, i in zip(makers, (answer, motion), rng.permutation(2), strict=True)]
    return (things, f"what happens to the {things[0].name} ?", chains.see(things, does=True)), [motion]


def _sounding_happens(rng, answer) -> Offer:
    """Two things in view, of which one sounds."""
    motion = str(rng.choice([m for m in MOTIONS if m != answer]))
    makers = cast(rng, others(rng)[:2])
    source, other = makers[0](motion=answer, sounding=sample_interval(rng, 3)), makers[1](motion=motion)
    things = [source, other]
    chain = f"{chains.hear([source], times=False)} {chains.see(things, does=True)} {chains.sounds(source)}"
    return (things, "what happens to the sounding thing ?", chain), [motion]


def _comes_from(rng, answer) -> Offer:
    """Two things in view, in different colours: the sound tells the class and the view its colour."""
    colour, name = answer.split()
    makers = cast(rng, [name, *others(rng, name)[:1]])
    source = makers[0](colour=colour, sounding=sample_interval(rng, 3))
    other = makers[1](colour=str(rng.choice([c for c in COLOURS if c != colour])))
    chain = f"{chains.hear([source], times=False)} {chains.see([source, other])} {chains.sounds(source)}"
    wrong = [chains.noun(other), f"{colour} {other.name}", f"{other.colour} {name}"]
    return ([source, other], "what does the sound come from ?", chain), wrong


_INTERVALS = {chains.lasting((a, b)): (a, b) for a in range(SECONDS) for b in range(a + 2, SECONDS + 1)}

TEMPLATES = (
    Choice("Sound", "Which", CLASSES, _heard),
    Choice("Sound", "Before Next", CLASSES, _in_order),
    Choice("Sound", "When", tuple(_INTERVALS), _when),
    Choice("View", "Which", CLASSES, _seen),
    Choice("View", "Happening", MOTIONS, _happens),
    Choice("Both", "Happening", MOTIONS, _sounding_happens),
    Choice("Both", "Where", QUADRANTS, lambda rng, answer: (source_place(rng, answer), [])),
    Choice("Both", "Come From", tuple(f"{c} {n}" for c in COLOURS for n in CLASSES), _comes_from),
)
