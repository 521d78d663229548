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


def _select(skill: str, question: str, answer_of, things: Sequence[Thing], rng) -> list[Probe]:
    """One probe about a thing chosen from several by what ``question`` names it with."""
    if not things:
        return []
    thing = things[rng.integers(len(things))]
    picked = tuple(answer_of(t) for t in things)
    return [Probe(skill, question.format(t=thing), answer_of(thing), picked if len(things) > 1 else ())]


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
                out.append(Probe(skill, f"is the {name} {skill} ?", "yes" if wanted else "no"))
    for skill, question, answer in (
        ("colour", "what colour is the {t.name} ?", lambda t: t.colour),
        ("motion", "how does the {t.name} move ?", lambda t: t.motion),
        ("position", "where is the {t.name} ?", lambda t: t.quadrant),
    ):
        out += _select(skill, question, answer, seen, rng)
    # Half of all things are seen throughout; mostly the others are asked about, of whom there is more to say.
    passing = [t for t in seen if t.visible != (0, SECONDS)]
    timed = passing if passing and rng.random() < 0.8 else seen
    out += _select("time seen", "when is the {t.name} visible ?", lambda t: _interval(t.visible), timed, rng)
    out += _select("time heard", "when is the {t.name} heard ?", lambda t: _interval(t.sounding), heard, rng)
    second = int(rng.integers(SECONDS))
    out += _select("seen at", f"is the {{t.name}} visible at {second} ?", lambda t: "yes" if t.seen_at(second) else "no", timed, rng)
    now = [t for t in seen if t.seen_at(second)]
    out += _select("box", f"box of the {{t.name}} at {second} ?", lambda t: _numbers(t.box(second)), now, rng)
    out += [_at(seen, rng), *_heard_at(heard, second)]
    both = [t for t in seen if t.sounding]
    if len(both) == 1 and len(seen) > 1:
        one = both[0]
        out.append(Probe("which sounds", "which visible thing is heard ?", one.name, tuple(t.name for t in seen)))
        out.append(
            Probe("where sounds", "where is the thing that is heard ?", one.quadrant, tuple(t.quadrant for t in seen))
        )
    elif not both:
        out.append(Probe("which sounds", "which visible thing is heard ?", "nothing", tuple(t.name for t in seen)))
    out.append(Probe("count seen", "how many things are visible ?", NUMBER_WORDS[len(seen)]))
    out.append(Probe("count heard", "how many things are heard ?", NUMBER_WORDS[len(heard)]))
    if len(heard) == 2 and heard[0].sounding[0] != heard[1].sounding[0]:
        first = min(heard, key=lambda t: t.sounding[0])
        out.append(Probe("order", "which is heard first ?", first.name, tuple(t.name for t in heard)))
    for t in scene.things:
        if t.name == FACE:
            out.append(Probe("emotion", "how does the face feel ?", t.emotion))
            if t.sounding:
                out.append(Probe("voice", "how does the voice feel ?", t.heard_emotion))
    return out


def _at(seen: Sequence[Thing], rng) -> Probe:
    used = {t.quadrant: t.name for t in seen}
    quadrant = QUADRANTS[rng.integers(4)]
    if rng.random() < 0.7:
        quadrant = list(used)[rng.integers(len(used))] if used else quadrant
    return Probe("at", f"what is at {quadrant} ?", used.get(quadrant, "nothing"), tuple(used.values()))


def _heard_at(heard: Sequence[Thing], second: int) -> list[Probe]:
    now = [t.name for t in heard if t.heard_at(second)]
    if len(now) > 1:
        return []
    return [Probe("heard at", f"what is heard at {second} ?", now[0] if now else "nothing", tuple(t.name for t in heard))]


def still_probes(scene: Scene, second: int, rng: np.random.Generator) -> list[Probe]:
    """What one frame and its second of sound answer."""
    seen = [t for t in scene.visible if t.seen_at(second)]
    heard = [t for t in scene.sounding if t.heard_at(second)]
    out = _select("still box", "box of the {t.name} ?", lambda t: _numbers(t.box(second)), seen, rng)
    out += _select("still position", "where is the {t.name} ?", lambda t: t.quadrant, seen, rng)
    out += _select("still colour", "what colour is the {t.name} ?", lambda t: t.colour, seen, rng)
    out.append(_at(seen, rng))
    both = [t for t in seen if t.heard_at(second)]
    if len(both) == 1 and len(seen) > 1:
        one = both[0]
        out.append(Probe("still sounds", "which visible thing is heard ?", one.name, tuple(t.name for t in seen)))
        boxes = tuple(_numbers(t.box(second)) for t in seen)
        out.append(Probe("still box sounds", "box of the thing that is heard ?", _numbers(one.box(second)), boxes))
    if len(both) > 1:
        edges = np.array([t.box(second) for t in both])
        around = (*edges[:, :2].min(0), *edges[:, 2:].max(0))
        out.append(Probe("still box around", "box around the things that are heard ?", _numbers(around)))
    if len(heard) == 1:
        out.append(Probe("still heard", "what is heard ?", heard[0].name))
    return out


def pair_probes(first: Scene, second: Scene, what: str, rng: np.random.Generator) -> list[Probe]:
    """Which of two videos shows, or which of two sounds has, a thing that is in one of them only.

    Args:
        what: ``video`` or ``sound``.
    """
    names = [{t.name for t in (scene.visible if what == "video" else scene.sounding)} for scene in (first, second)]
    only = [*((n, "first") for n in sorted(names[0] - names[1])), *((n, "second") for n in sorted(names[1] - names[0]))]
    verb = {"video": "shows", "sound": "is"}[what]
    return [Probe(f"{what} of", f"which {what} {verb} the {n} ?", answer) for n, answer in (only[i] for i in rng.permutation(len(only))[:2])]


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

    text = (
        "around is the visible heard yes no what colour how does move where when box of at nothing which thing that are "
        "how many things first second face feel repeat do sight and sound match video matches from to "
        "never voice describe shows , . ? "
    )
    closed = [*CLASSES, *COLOURS, *MOTIONS, *EMOTIONS, *NUMBER_WORDS, FACE, *" ".join(QUADRANTS).split()]
    return {*text.split(), *closed, *map(str, range(SECONDS + 1)), *map(str, range(0, 225, 8))}
