"""Short questions about a scene in plain words: what the base learns from and is gated on.

A probe asks for one ability. None uses a task's instruction or answer tags: the base must bring
perception, selection by name, time and copying, and the adapters bring the tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crab.data.world import CLASSES, COLOURS, FACE, QUADRANTS, SECONDS, Scene, Thing

NUMBER_WORDS = ("zero", "one", "two", "three", "four")

#: Each skill's question in several wordings, so that the base does not hang on one: pretraining would not
#: either. ``{n}`` is a thing's name, ``{s}`` a second, ``{q}`` a place. Gates count all of them.
WORDINGS = {
    "visible": ("is the {n} visible ?", "can you see the {n} ?", "is a {n} seen in the video ?"),
    "heard": ("is the {n} heard ?", "can you hear the {n} ?", "does the {n} make a sound ?"),
    "colour": ("what colour is the {n} ?", "name the colour of the {n} .", "which colour does the {n} have ?"),
    "motion": ("how does the {n} move ?", "name the action of the {n} .", "what does the {n} do in the video ?"),
    "position": ("where is the {n} ?", "name the place of the {n} ."),
    "time seen": ("when is the {n} visible ?", "from when to when is the {n} seen ?", "give the range in which you see the {n} ."),
    "time heard": ("when is the {n} heard ?", "from when to when does the {n} sound ?", "give the range in which you hear the {n} ."),
    "seen at": ("is the {n} visible at {s} ?", "is the {n} seen at {s} ?", "can you see the {n} at {s} ?"),
    "box": ("box of the {n} at {s} ?", "give the box of the {n} at {s} ."),
    "at": ("what is at {q} ?", "which thing is seen at {q} ?", "name the thing at {q} ."),
    "heard at": ("what is heard at {s} ?", "which thing makes a sound at {s} ?"),
    "which sounds": ("which visible thing is heard ?", "which visible thing makes the sound ?", "name the thing that is both seen and heard ."),
    "where sounds": ("where is the thing that is heard ?", "where is the thing that makes the sound ?"),
    "count seen": ("how many things are visible ?", "how many things are seen in the video ?"),
    "count heard": ("how many things are heard ?", "how many things make a sound ?"),
    "order": ("which is heard first ?", "which thing sounds before the other ?"),
    "emotion": ("how does the face feel ?", "which emotion does the face show ?"),
    "voice": ("how does the voice feel ?", "which emotion does the voice show ?"),
    "still box": ("box of the {n} ?", "give the box of the {n} .", "where is the {n} ? give its box ."),
    "still position": ("where is the {n} ?", "name the place of the {n} ."),
    "still colour": ("what colour is the {n} ?", "name the colour of the {n} .", "which colour does the {n} have ?"),
    "still sounds": ("which visible thing is heard ?", "which visible thing makes the sound ?"),
    "still box sounds": ("box of the thing that is heard ?", "give the box of the thing that sounds .", "which thing makes the sound ? give its box ."),
    "still box around": ("box around the things that are heard ?", "give the box around all things that sound ."),
    "still heard": ("what is heard ?", "which thing sounds ?"),
    "match": ("do sight and sound match ?", "does the sound match the video ?"),
    "which video": ("which video matches the sound ?", "find the video of the sound .", "which video shows the thing that is heard ?"),
    "which sound": ("which sound matches the video ?", "find the sound of the video .", "which sound is of a thing that is visible ?"),
    "video of": ("which video shows the {n} ?", "find the {n} in the two videos ."),
    "sound of": ("which sound is the {n} ?", "find the {n} in the two sounds ."),
    "caption": ("describe the scene .", "describe all that is seen and heard ."),
}  # fmt: skip


def wording(skill: str, rng: np.random.Generator, **named) -> str:
    """One of the skill's questions, filled in."""
    known = WORDINGS[skill]
    return known[rng.integers(len(known))].format(**named)


@dataclass(frozen=True)
class Probe:
    """One question and its answer.

    Attributes:
        skill: the ability asked for; gates are kept a skill.
        question, answer: plain words.
        picked: the answers the same question would have for every thing in the scene: what a model
            that reads well but picks an object at random would say. Empty where no object is picked.
    """

    skill: str
    question: str
    answer: str
    picked: tuple[str, ...] = ()


def _interval(interval) -> str:
    return f"from {interval[0]} to {interval[1]}" if interval else "never"


def _numbers(values) -> str:
    return " ".join(str(v) for v in values)


def _select(skill: str, answer_of, things: Sequence[Thing], rng, **named) -> list[Probe]:
    """One probe about a thing chosen from several by its name."""
    if not things:
        return []
    thing = things[rng.integers(len(things))]
    picked = tuple(answer_of(t) for t in things)
    return [Probe(skill, wording(skill, rng, n=thing.name, **named), answer_of(thing), picked if len(things) > 1 else ())]


def clip_probes(scene: Scene, rng: np.random.Generator) -> list[Probe]:
    """All the questions that a video with its sound answers, one draw of each."""
    seen, heard = scene.visible, scene.sounding
    out: list[Probe] = []
    for skill, present in (("visible", seen), ("heard", heard)):
        names = {t.name for t in present if t.name != FACE}
        absent = [c for c in CLASSES if c not in names]
        # The hard absent names are those present in the other modality only.
        decoys = [t.name for t in scene.things if t.name in absent]
        for wanted in (True, False):
            pool = sorted(names) if wanted else (decoys if decoys and rng.random() < 0.4 else absent)
            if pool:
                name = pool[rng.integers(len(pool))]
                out.append(Probe(skill, wording(skill, rng, n=name), "yes" if wanted else "no"))
    out += _select("colour", lambda t: t.colour, seen, rng)
    out += _select("motion", lambda t: t.motion, seen, rng)
    out += _select("position", lambda t: t.quadrant, seen, rng)
    # Half of all things are seen throughout; mostly the others are asked about, of whom there is more to say.
    passing = [t for t in seen if t.visible != (0, SECONDS)]
    timed = passing if passing and rng.random() < 0.8 else seen
    out += _select("time seen", lambda t: _interval(t.visible), timed, rng)
    out += _select("time heard", lambda t: _interval(t.sounding), heard, rng)
    second = int(rng.integers(SECONDS))
    out += _select("seen at", lambda t: "yes" if t.seen_at(second) else "no", timed, rng, s=second)
    now = [t for t in seen if t.seen_at(second)]
    out += _select("box", lambda t: _numbers(t.box(second)), now, rng, s=second)
    out += [_at(seen, rng), *_heard_at(heard, second, rng)]
    both = [t for t in seen if t.sounding]
    things = tuple(t.name for t in seen)
    if len(both) == 1 and len(seen) > 1:
        one = both[0]
        out.append(Probe("which sounds", wording("which sounds", rng), one.name, things))
        out.append(Probe("where sounds", wording("where sounds", rng), one.quadrant, tuple(t.quadrant for t in seen)))
    elif not both:
        out.append(Probe("which sounds", wording("which sounds", rng), "nothing", things))
    out.append(Probe("count seen", wording("count seen", rng), NUMBER_WORDS[len(seen)]))
    out.append(Probe("count heard", wording("count heard", rng), NUMBER_WORDS[len(heard)]))
    if len(heard) == 2 and heard[0].sounding[0] != heard[1].sounding[0]:
        first = min(heard, key=lambda t: t.sounding[0])
        out.append(Probe("order", wording("order", rng), first.name, tuple(t.name for t in heard)))
    for t in scene.things:
        if t.name == FACE:
            out.append(Probe("emotion", wording("emotion", rng), t.emotion))
            if t.sounding:
                out.append(Probe("voice", wording("voice", rng), t.heard_emotion))
    return out


def _at(seen: Sequence[Thing], rng) -> Probe:
    used = {t.quadrant: t.name for t in seen}
    quadrant = QUADRANTS[rng.integers(4)]
    if rng.random() < 0.7:
        quadrant = list(used)[rng.integers(len(used))] if used else quadrant
    return Probe("at", wording("at", rng, q=quadrant), used.get(quadrant, "nothing"), tuple(used.values()))


def _heard_at(heard: Sequence[Thing], second: int, rng) -> list[Probe]:
    now = [t.name for t in heard if t.heard_at(second)]
    if len(now) > 1:
        return []
    answer = now[0] if now else "nothing"
    return [Probe("heard at", wording("heard at", rng, s=second), answer, tuple(t.name for t in heard))]


def still_probes(scene: Scene, second: int, rng: np.random.Generator) -> list[Probe]:
    """What one frame and its second of sound answer."""
    seen = [t for t in scene.visible if t.seen_at(second)]
    heard = [t for t in scene.sounding if t.heard_at(second)]
    out = _select("still box", lambda t: _numbers(t.box(second)), seen, rng)
    out += _select("still position", lambda t: t.quadrant, seen, rng)
    out += _select("still colour", lambda t: t.colour, seen, rng)
    out.append(_at(seen, rng))
    both = [t for t in seen if t.heard_at(second)]
    if len(both) == 1 and len(seen) > 1:
        one = both[0]
        out.append(Probe("still sounds", wording("still sounds", rng), one.name, tuple(t.name for t in seen)))
        boxes = tuple(_numbers(t.box(second)) for t in seen)
        out.append(Probe("still box sounds", wording("still box sounds", rng), _numbers(one.box(second)), boxes))
    if len(both) > 1:
        edges = np.array([t.box(second) for t in both])
        around = (*edges[:, :2].min(0), *edges[:, 2:].max(0))
        out.append(Probe("still box around", wording("still box around", rng), _numbers(around)))
    if len(heard) == 1:
        out.append(Probe("still heard", wording("still heard", rng), heard[0].name))
    return out


def pair_probes(first: Scene, second: Scene, what: str, rng: np.random.Generator) -> list[Probe]:
    """Which of two videos shows, or which of two sounds has, a thing that is in one of them only.

    Args:
        what: ``video`` or ``sound``.
    """
    names = [{t.name for t in (scene.visible if what == "video" else scene.sounding)} for scene in (first, second)]
    only = [*((n, "first") for n in sorted(names[0] - names[1])), *((n, "second") for n in sorted(names[1] - names[0]))]
    skill = f"{what} of"
    return [Probe(skill, wording(skill, rng, n=n), answer) for n, answer in (only[i] for i in rng.permutation(len(only))[:2])]


def shares_sound(a: Scene, b: Scene) -> bool:
    """Whether something seen and heard in ``a`` is also seen or heard in ``b``."""
    return bool({t.name for t in a.visible if t.sounding} & {t.name for t in b.things})


def caption(scene: Scene) -> str:
    """Everything seen, then everything heard, in reading order and order of onset."""
    seen = sorted(scene.visible, key=lambda t: QUADRANTS.index(t.quadrant))
    heard = sorted(scene.sounding, key=lambda t: t.sounding)
    parts = [f"{t.colour} {t.name} {t.motion} at {t.quadrant} {_interval(t.visible)}" for t in seen]
    parts += [f"{t.name} heard {_interval(t.sounding)}" for t in heard]
    return " , ".join(parts)


def copy_probe(vocabulary: Sequence[str], rng: np.random.Generator) -> Probe:
    """Repeat some words: text alone, any word there is."""
    text = " ".join(vocabulary[i] for i in rng.choice(len(vocabulary), size=int(rng.integers(2, 8)), replace=False))
    return Probe("copy", f"repeat {text} .", text)


def words() -> set[str]:
    """Every word a probe, a caption or a scene can use."""
    from crab.data.world import EMOTIONS, MOTIONS

    asked = " ".join(text for known in WORDINGS.values() for text in known).format(n="", s="", q="")
    text = f"{asked} is yes no nothing of first second repeat from to never heard at ,"
    closed = [*CLASSES, *COLOURS, *MOTIONS, *EMOTIONS, *NUMBER_WORDS, FACE, *" ".join(QUADRANTS).split()]
    return {*text.split(), *closed, *map(str, range(SECONDS + 1)), *map(str, range(0, 225, 8))}
