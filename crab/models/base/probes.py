"""Short questions about a scene in plain words: what the base learns from and is gated on.

A probe asks for one ability. None uses a task's instruction or answer tags: the base must bring
perception, selection by name, time and copying, and the adapters bring the tasks. It tells what it sees and hears in
the sentences of reasoning chains, and answers from such sentences alone, as a model trained on plain text would: which
of them a task wants it never learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from crab.world import chains
from crab.world.scene import CLASSES, COLOURS, FACE, QUADRANTS, SECONDS, Scene, Thing

NUMBER_WORDS = ("zero", "one", "two", "three", "four")

#: Each skill's question in several wordings, so that the base does not hang on one: pretraining would not
#: either. ``{n}`` and ``{m}`` are things' names, ``{s}`` a second, ``{q}`` a place. Gates count all of them.
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
    "still box": ("box of the {n} ?", "give the box of the {n} .", "where is the {n} ? give its box .", "i see the {n} . give its box ."),
    "still position": ("where is the {n} ?", "name the place of the {n} ."),
    "still colour": ("what colour is the {n} ?", "name the colour of the {n} .", "which colour does the {n} have ?"),
    "still sounds": ("which visible thing is heard ?", "which visible thing makes the sound ?"),
    "still box sounds": ("box of the thing that is heard ?", "give the box of the thing that sounds .", "which thing makes the sound ? give its box ."),
    "still box both": ("box around the {n} and the {m} ?", "give the box around the {n} and the {m} ."),
    "still box around": ("box around the things that are heard ?", "give the box around all things that sound ."),
    "still heard": ("what is heard ?", "which thing sounds ?"),
    "match": ("do sight and sound match ?", "does the sound match the video ?"),
    "which video": ("which video matches the sound ?", "find the video of the sound .", "which video shows the thing that is heard ?"),
    "which sound": ("which sound matches the video ?", "find the sound of the video .", "which sound is of a thing that is visible ?"),
    "video of": ("which video shows the {n} ?", "find the {n} in the two videos ."),
    "sound of": ("which sound is the {n} ?", "find the {n} in the two sounds ."),
    "sights told": ("describe what is seen .", "describe the things that are visible ."),
    "sounds told": ("describe what is heard .", "describe the things that are heard ."),
    "boxes told": ("describe where things are .", "give the box of all that is seen ."),
    "sources told": ("describe which things sound .", "describe which things are heard and which are silent ."),
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


def _select(skill: str, answer_of, things: Sequence[Thing], rng, count: int = 1, **named) -> list[Probe]:
    """Probes about ``count`` of several things, each chosen by its name; fewer where there are no more."""
    picked = tuple(answer_of(t) for t in things) if len(things) > 1 else ()
    chosen = [things[i] for i in rng.permutation(len(things))[:count]]
    return [Probe(skill, wording(skill, rng, n=thing.name, **named), answer_of(thing), picked) for thing in chosen]


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
    # Two things side by side: asked about one, mostly about one that passes, a base learns to say when *something* comes and goes.
    out += _select("time seen", lambda t: _interval(t.visible), seen, rng, count=2)
    out += _select("time heard", lambda t: _interval(t.sounding), heard, rng, count=2)
    second = int(rng.integers(SECONDS))
    # Half of all things are seen throughout; mostly the others are asked about, of whom there is more to say.
    passing = [t for t in seen if t.visible != (0, SECONDS)]
    timed = passing if passing and rng.random() < 0.8 else seen
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
    if len(seen) > 1:
        one, other = (seen[i] for i in rng.permutation(len(seen))[:2])
        asked = wording("still box both", rng, n=one.name, m=other.name)
        out.append(Probe("still box both", asked, _around([one, other], second)))
    if len(both) > 1:
        out.append(Probe("still box around", wording("still box around", rng), _around(both, second)))
    if len(heard) == 1:
        out.append(Probe("still heard", wording("still heard", rng), heard[0].name))
    return out


def _around(things: Sequence[Thing], second: int) -> str:
    edges = np.array([t.box(second) for t in things])
    return _numbers((*edges[:, :2].min(0), *edges[:, 2:].max(0)))


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


def _told(skill: str, sentences: str, rng) -> Probe:
    return Probe(skill, wording(skill, rng), sentences)


def clip_told(scene: Scene, rng: np.random.Generator) -> list[Probe]:
    """A clip in sentences: the whole of it, and what is seen, what is heard and what is both alone."""
    return [_told("caption", chains.caption(scene), rng), *_views_told(scene.visible, scene.sounding, rng)]


def still_told(scene: Scene, second: int, rng: np.random.Generator) -> list[Probe]:
    """One frame and its second of sound in sentences; what is seen also with its boxes."""
    seen, heard = ([t for t in scene.things if at(t)] for at in (lambda t: t.seen_at(second), lambda t: t.heard_at(second)))
    boxes = " ".join(f"the {chains.noun(t)} is at {_numbers(t.box(second))} ." for t in chains.by_place(seen))
    return [*_views_told(seen, heard, rng), *([_told("boxes told", boxes, rng)] if seen else [])]


def _views_told(seen: Sequence[Thing], heard: Sequence[Thing], rng) -> list[Probe]:
    out = [_told("sights told", chains.see(seen), rng), _told("sounds told", chains.hear(heard, times=False), rng)]
    if seen:
        sources = " ".join(chains.sounds(t) if t in heard else chains.silent(t) for t in chains.by_place(seen))
        out.append(_told("sources told", sources, rng))
    return out


def pair_told(first: Scene, second: Scene, what: str, rng: np.random.Generator) -> list[Probe]:
    """Two videos, or two sounds, in sentences.

    Args:
        what: ``video`` or ``sound``.
    """
    both = (("one", first), ("two", second))
    if what == "video":
        return [_told("sights told", " ".join(chains.video_shows(n, t) for n, s in both for t in chains.by_place(s.visible)), rng)]
    return [_told("sounds told", " ".join(chains.sound_is(n, t) for n, s in both for t in chains.by_time(s.sounding)), rng)]


def reading(scene: Scene, rng: np.random.Generator) -> tuple[str, list[Probe]]:
    """Sentences that tell of a clip, in any order, and the clip's questions as far as they answer them."""
    does, times, apart = rng.random(3) < 0.5
    lists = [[t] for t in scene.visible] if apart else [scene.visible]
    told = [chains.see(things, does, times) for things in lists] or [chains.see([])]
    lists = [[t] for t in scene.sounding] if apart else [scene.sounding]
    told += [chains.hear(things, times) for things in lists] or [chains.hear([])]
    told += [chains.sounds(t) if t.sounding else chains.silent(t) for t in scene.visible if rng.random() < 0.5]
    unsaid = {"box"} if rng.random() < 0.5 else {"box", "visible", "heard"}  # yes and no are read soonest
    unsaid |= set() if does else {"motion"}
    unsaid |= set() if times else {"time seen", "time heard", "seen at", "heard at", "order"}
    asked = [p for p in clip_probes(scene, rng) if p.skill not in unsaid and not (p.skill == "motion" and FACE in p.question)]
    return " ".join(rng.permutation(told)), [replace(p, skill="read") for p in asked]


def pair_reading(first: Scene, second: Scene, which: str, what: str, rng: np.random.Generator) -> tuple[str, list[Probe]]:
    """Sentences that tell of two videos, or two sounds, and of what matches the one called ``which``, and the pair's questions."""
    one = first if which == "first" else second
    other = chains.hear(one.sounding, times=False) if what == "video" else chains.see(one.visible)
    (told,) = pair_told(first, second, what, rng)
    asked = [Probe("read", wording(f"which {what}", rng), which), *pair_probes(first, second, what, rng)]
    return f"{other} {told.answer}", [replace(p, skill="read") for p in asked]


def copy_probe(vocabulary: Sequence[str], rng: np.random.Generator) -> Probe:
    """Repeat some words: text alone, any word there is."""
    text = " ".join(vocabulary[i] for i in rng.choice(len(vocabulary), size=int(rng.integers(2, 8)), replace=False))
    return Probe("copy", f"repeat {text} .", text)


def words() -> set[str]:
    """Every word a probe, a caption or a scene can use."""
    from crab.world.scene import EMOTIONS, MOTIONS

    asked = " ".join(text for known in WORDINGS.values() for text in known).format(n="", m="", s="", q="")
    text = f"{asked} is yes no nothing of first second repeat from to never heard at"
    text += " i see hear a an and no the voice showing seen heard sounds silent video sound shows one two ."
    closed = [*CLASSES, *COLOURS, *MOTIONS, *EMOTIONS, *NUMBER_WORDS, FACE, *" ".join(QUADRANTS).split()]
    return {*text.split(), *closed, *map(str, range(SECONDS + 1)), *map(str, range(0, 225, 8))}
