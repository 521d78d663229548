"""Short questions about a scene in plain words: what the base learns from, and what its gates measure.

Each probe asks for one ability. No probe uses the instruction or the answer tags of a task: the base must bring
perception, selection by name, time and copying; the adapters bring the tasks. The base also tells what it sees and
hears in the sentences of reasoning chains, and answers from such sentences alone. It never learns which a task wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from crab.world import chains
from crab.world.scene import CLASSES, COLOURS, EMOTIONS, FACE, MOTIONS, QUADRANTS, SECONDS, Scene, Thing


@dataclass(frozen=True)
class Skill:
    """An ability that the base is taught and measured on.

    Attributes:
        contexts: kinds of context that practise it, see `crab.models.base.curriculum.CONTEXTS`.
        wordings: of its question: ``{n}`` and ``{m}`` are names of things, ``{s}`` is a second, ``{q}`` a place.
        rarity: how much more often a question is kept, because few scenes answer it.
    """

    contexts: tuple[str, ...]
    wordings: tuple[str, ...]
    rarity: float = 1.0


#: Skills by the stage of the curriculum that teaches them first. Each stage keeps all earlier skills in the mix.
STAGES: dict[str, dict[str, Skill]] = {
    "text": {
        "copy": Skill(("text",), ()),
        "read": Skill(("reading",), ()),
    },
    "presence": {
        "visible": Skill(("clip",), ("is the {n} visible ?", "can you see the {n} ?", "is a {n} seen in the video ?")),
        "heard": Skill(("clip",), ("is the {n} heard ?", "can you hear the {n} ?", "does the {n} make a sound ?")),
    },
    "selection": {
        "colour": Skill(("clip",), (
            "what colour is the {n} ?", "name the colour of the {n} .", "which colour does the {n} have ?")),
        "motion": Skill(("clip",), (
            "how does the {n} move ?", "name the action of the {n} .", "what does the {n} do in the video ?")),
        "position": Skill(("clip",), ("where is the {n} ?", "name the place of the {n} .")),
        "at": Skill(("clip",), ("what is at {q} ?", "which thing is seen at {q} ?", "name the thing at {q} .")),
        "emotion": Skill(("clip",), ("how does the face feel ?", "which emotion does the face show ?"), 4),
        "voice": Skill(("clip",), ("how does the voice feel ?", "which emotion does the voice show ?"), 4),
        "seen at": Skill(("clip",), (
            "is the {n} visible at {s} ?", "is the {n} seen at {s} ?", "can you see the {n} at {s} ?"), 2),
        "heard at": Skill(("clip",), ("what is heard at {s} ?", "which thing makes a sound at {s} ?")),
        "still position": Skill(("still",), ("where is the {n} ?", "name the place of the {n} .")),
        "still colour": Skill(("still",), (
            "what colour is the {n} ?", "name the colour of the {n} .", "which colour does the {n} have ?")),
        "still heard": Skill(("still",), ("what is heard ?", "which thing sounds ?")),
    },
    "space and time": {
        "still box": Skill(("still",), (
            "box of the {n} ?", "give the box of the {n} .", "where is the {n} ? give its box .",
            "i see the {n} . give its box ."), 2),
        "box": Skill(("clip",), ("box of the {n} at {s} ?", "give the box of the {n} at {s} ."), 3),
        "time seen": Skill(("clip",), (
            "when is the {n} visible ?", "from when to when is the {n} seen ?",
            "give the range in which you see the {n} ."), 3),
        "time heard": Skill(("clip",), (
            "when is the {n} heard ?", "from when to when does the {n} sound ?",
            "give the range in which you hear the {n} ."), 3),
        "count seen": Skill(("clip",), ("how many things are visible ?", "how many things are seen in the video ?")),
        "count heard": Skill(("clip",), ("how many things are heard ?", "how many things make a sound ?")),
        "order": Skill(("clip",), ("which is heard first ?", "which thing sounds before the other ?"), 2),
        "video of": Skill(("pair",), ("which video shows the {n} ?", "find the {n} in the two videos .")),
        "sound of": Skill(("pair",), ("which sound is the {n} ?", "find the {n} in the two sounds .")),
    },
    "binding": {
        "which sounds": Skill(("clip",), (
            "which visible thing is heard ?", "which visible thing makes the sound ?",
            "name the thing that is both seen and heard ."), 2),
        "where sounds": Skill(("clip",), (
            "where is the thing that is heard ?", "where is the thing that makes the sound ?"), 2),
        "still sounds": Skill(("still",), (
            "which visible thing is heard ?", "which visible thing makes the sound ?"), 2),
        "still box sounds": Skill(("still",), (
            "box of the thing that is heard ?", "give the box of the thing that sounds .",
            "which thing makes the sound ? give its box ."), 3),
        "still box both": Skill(("still",), (
            "box around the {n} and the {m} ?", "give the box around the {n} and the {m} ."), 2),
        "still box around": Skill(("still",), (
            "box around the things that are heard ?", "give the box around all things that sound ."), 4),
        "match": Skill(("match",), ("do sight and sound match ?", "does the sound match the video ?")),
        "which video": Skill(("pair",), (
            "which video matches the sound ?", "find the video of the sound .",
            "which video shows the thing that is heard ?"), 3),
        "which sound": Skill(("pair",), (
            "which sound matches the video ?", "find the sound of the video .",
            "which sound is of a thing that is visible ?"), 3),
    },
    "describing": {
        "sights told": Skill(("clip_told", "still_told"), (
            "describe what is seen .", "describe the things that are visible .")),
        "sounds told": Skill(("clip_told", "still_told"), (
            "describe what is heard .", "describe the things that are heard .")),
        "sources told": Skill(("clip_told", "still_told"), (
            "describe which things sound .", "describe which things are heard and which are silent .")),
        "boxes told": Skill(("still_told",), ("describe where things are .", "give the box of all that is seen .")),
        "caption": Skill(("clip_told",), ("describe the scene .", "describe all that is seen and heard ."), 3),
    },
}  # fmt: skip
SKILLS = {name: skill for skills in STAGES.values() for name, skill in skills.items()}


@dataclass(frozen=True)
class Probe:
    """One question and its answer, in plain words.

    ``picked`` holds the answer for each thing in the scene. A model that reads well but picks at random says one
    of these. It is empty where no thing is picked.
    """

    skill: str
    question: str
    answer: str
    picked: tuple[str, ...] = ()


def probe(skill: str, rng: np.random.Generator, answer: str, picked: Iterable[str] = (), **names) -> Probe:
    """A probe in one of the wordings of its skill; ``names`` fill the wording in."""
    wordings = SKILLS[skill].wordings
    return Probe(skill, wordings[rng.integers(len(wordings))].format(**names), answer, tuple(picked))


def _box(edges: Iterable[int]) -> str:
    return " ".join(map(str, edges))


def _select(skill: str, answer: Callable, things: Sequence[Thing], rng, count: int = 1, **names) -> list[Probe]:
    """Probes about ``count`` of several things (fewer if there are fewer), each chosen by its name."""
    picked = [answer(t) for t in things] if len(things) > 1 else []
    chosen = [things[i] for i in rng.permutation(len(things))[:count]]
    return [probe(skill, rng, answer(t), picked, n=t.name, **names) for t in chosen]


def clip_probes(scene: Scene, rng: np.random.Generator) -> list[Probe]:
    """All questions that a video with its sound answers, each drawn once."""
    seen, heard = scene.visible, scene.sounding
    out: list[Probe] = []
    for skill, present in (("visible", seen), ("heard", heard)):
        names = {t.name for t in present if t.name != FACE}
        absent = [c for c in CLASSES if c not in names]
        decoys = [t.name for t in scene.things if t.name in absent]  # present in the other modality: hard to deny
        for answer in ("yes", "no"):
            pool = sorted(names) if answer == "yes" else decoys if decoys and rng.random() < 0.4 else absent
            if pool:
                name = pool[rng.integers(len(pool))]
                out.append(probe(skill, rng, answer, n=name))
    out += _select("colour", lambda t: t.colour, seen, rng)
    out += _select("motion", lambda t: t.motion, seen, rng)
    out += _select("position", lambda t: t.quadrant, seen, rng)
    # two things at once: asked about one only, a base learns when *something* comes and goes, not which thing
    out += _select("time seen", lambda t: chains.lasting(t.visible), seen, rng, count=2)
    out += _select("time heard", lambda t: chains.lasting(t.sounding), heard, rng, count=2)
    second = int(rng.integers(SECONDS))
    # half of all things are seen throughout, so mostly ask about the others
    passing = [t for t in seen if t.visible != (0, SECONDS)]
    timed = passing if passing and rng.random() < 0.8 else seen
    out += _select("seen at", lambda t: "yes" if t.seen_at(second) else "no", timed, rng, s=second)
    now = [t for t in seen if t.seen_at(second)]
    out += _select("box", lambda t: _box(t.box(second)), now, rng, s=second)
    out.append(_at(seen, rng))
    sounds = [t.name for t in heard if t.heard_at(second)] or ["nothing"]
    if len(sounds) == 1:
        out.append(probe("heard at", rng, sounds[0], [t.name for t in heard], s=second))
    both = [t for t in seen if t.sounding]
    names = [t.name for t in seen]
    if len(both) == 1 and len(seen) > 1:
        out.append(probe("which sounds", rng, both[0].name, names))
        out.append(probe("where sounds", rng, both[0].quadrant, [t.quadrant for t in seen]))
    elif not both:
        out.append(probe("which sounds", rng, "nothing", names))
    out.append(probe("count seen", rng, chains.NUMBERS[len(seen)]))
    out.append(probe("count heard", rng, chains.NUMBERS[len(heard)]))
    if len(heard) == 2 and heard[0].sounding[0] != heard[1].sounding[0]:
        first = min(heard, key=lambda t: t.sounding[0])
        out.append(probe("order", rng, first.name, [t.name for t in heard]))
    for face in (t for t in scene.things if t.name == FACE):
        out.append(probe("emotion", rng, face.emotion))
        if face.sounding:
            out.append(probe("voice", rng, face.heard_emotion))
    return out


def _at(seen: Sequence[Thing], rng: np.random.Generator) -> Probe:
    names = {t.quadrant: t.name for t in seen}
    quadrant = QUADRANTS[rng.integers(4)]
    if rng.random() < 0.7 and names:
        quadrant = list(names)[rng.integers(len(names))]
    return probe("at", rng, names.get(quadrant, "nothing"), names.values(), q=quadrant)


def still_probes(scene: Scene, second: int, rng: np.random.Generator) -> list[Probe]:
    """All questions that one frame and its second of sound answer, each drawn once."""
    seen = [t for t in scene.visible if t.seen_at(second)]
    heard = [t for t in scene.sounding if t.heard_at(second)]
    out = _select("still box", lambda t: _box(t.box(second)), seen, rng)
    out += _select("still position", lambda t: t.quadrant, seen, rng)
    out += _select("still colour", lambda t: t.colour, seen, rng)
    out.append(_at(seen, rng))
    both = [t for t in seen if t.heard_at(second)]
    if len(both) == 1 and len(seen) > 1:
        boxes = {t.name: _box(t.box(second)) for t in seen}
        out.append(probe("still sounds", rng, both[0].name, boxes))
        out.append(probe("still box sounds", rng, boxes[both[0].name], boxes.values()))
    if len(seen) > 1:
        one, other = (seen[i] for i in rng.permutation(len(seen))[:2])
        out.append(probe("still box both", rng, _around([one, other], second), n=one.name, m=other.name))
    if len(both) > 1:
        out.append(probe("still box around", rng, _around(both, second)))
    if len(heard) == 1:
        out.append(probe("still heard", rng, heard[0].name))
    return out


def _around(things: Sequence[Thing], second: int) -> str:
    left, top, right, bottom = zip(*(t.box(second) for t in things), strict=True)
    return _box((min(left), min(top), max(right), max(bottom)))


def pair_probes(first: Scene, second: Scene, what: str, rng: np.random.Generator) -> list[Probe]:
    """Which of two videos (``what`` is ``video``) or sounds (``sound``) has a thing, for things that only one has."""
    one, two = ({t.name for t in (scene.visible if what == "video" else scene.sounding)} for scene in (first, second))
    only = [*((n, "first") for n in sorted(one - two)), *((n, "second") for n in sorted(two - one))]
    return [probe(f"{what} of", rng, only[i][1], n=only[i][0]) for i in rng.permutation(len(only))[:2]]


def sounds_alone(a: Scene, b: Scene) -> bool:
    """Whether something is both seen and heard in ``a``, and none of that is seen or heard in ``b``."""
    sources = {t.name for t in a.visible if t.sounding}
    return bool(sources) and sources.isdisjoint(t.name for t in b.things)


def clip_told(scene: Scene, rng: np.random.Generator) -> list[Probe]:
    """A clip in sentences: all of it, then only what is seen, what is heard, and which seen things sound."""
    return [probe("caption", rng, chains.caption(scene)), *_views_told(scene.visible, scene.sounding, rng)]


def still_told(scene: Scene, second: int, rng: np.random.Generator) -> list[Probe]:
    """One frame and its second of sound in sentences; what is seen also with its boxes."""
    seen = [t for t in scene.things if t.seen_at(second)]
    heard = [t for t in scene.things if t.heard_at(second)]
    boxes = " ".join(f"the {chains.noun(t)} is at {_box(t.box(second))} ." for t in chains.by_place(seen))
    return [*_views_told(seen, heard, rng), *([probe("boxes told", rng, boxes)] if seen else [])]


def _views_told(seen: Sequence[Thing], heard: Sequence[Thing], rng: np.random.Generator) -> list[Probe]:
    out = [probe("sights told", rng, chains.see(seen)), probe("sounds told", rng, chains.hear(heard, times=False))]
    if seen:
        sources = (chains.sounds(t) if t in heard else chains.silent(t) for t in chains.by_place(seen))
        out.append(probe("sources told", rng, " ".join(sources)))
    return out


def pair_told(first: Scene, second: Scene, what: str, rng: np.random.Generator) -> Probe:
    """Two videos, or two sounds (``what`` is ``video`` or ``sound``), in sentences."""
    if what == "video":
        skill, tell, things = "sights told", chains.video_shows, [chains.by_place(s.visible) for s in (first, second)]
    else:
        skill, tell, things = "sounds told", chains.sound_is, [chains.by_time(s.sounding) for s in (first, second)]
    sentences = [tell(number, t) for number, group in zip(("one", "two"), things, strict=True) for t in group]
    return probe(skill, rng, " ".join(sentences))


def reading(scene: Scene, rng: np.random.Generator) -> tuple[str, list[Probe]]:
    """Sentences about a clip in random order, and those questions about the clip that they answer."""
    motions, times, apart = rng.random(3) < 0.5
    parts = lambda things: [[t] for t in things] or [[]] if apart else [things]  # noqa: E731
    sentences = [chains.see(things, motions, times) for things in parts(scene.visible)]
    sentences += [chains.hear(things, times) for things in parts(scene.sounding)]
    sentences += [chains.sounds(t) if t.sounding else chains.silent(t) for t in scene.visible if rng.random() < 0.5]
    unsaid = {"box"} if rng.random() < 0.5 else {"box", "visible", "heard"}  # yes and no are learned first
    unsaid |= set() if motions else {"motion"}
    unsaid |= set() if times else {"time seen", "time heard", "seen at", "heard at", "order"}
    asked = [p for p in clip_probes(scene, rng) if p.skill not in unsaid]
    asked = [p for p in asked if p.skill != "motion" or FACE not in p.question]  # no sentence tells it
    return " ".join(rng.permutation(sentences)), [replace(p, skill="read") for p in asked]


def pair_reading(first: Scene, second: Scene, which: str, what: str, rng) -> tuple[str, list[Probe]]:
    """Sentences about two videos, or two sounds, and about what matches the one called ``which``; with questions."""
    one = first if which == "first" else second
    other = chains.hear(one.sounding, times=False) if what == "video" else chains.see(one.visible)
    pair = pair_told(first, second, what, rng)
    asked = [probe(f"which {what}", rng, which), *pair_probes(first, second, what, rng)]
    return f"{other} {pair.answer}", [replace(p, skill="read") for p in asked]


def copy_probe(vocabulary: Sequence[str], rng: np.random.Generator) -> Probe:
    """Repeat two to seven words of the vocabulary: text alone."""
    text = " ".join(vocabulary[i] for i in rng.choice(len(vocabulary), size=int(rng.integers(2, 8)), replace=False))
    return Probe("copy", f"repeat {text} .", text)


def words() -> set[str]:
    """Every word that a probe or a scene can use."""
    asked = " ".join(text for skill in SKILLS.values() for text in skill.wordings).format(n="", m="", s="", q="")
    text = f"{asked} is yes no nothing of first second repeat from to never heard at"
    text += " i see hear a an and no the voice showing seen heard sounds silent video sound shows one two ."
    names = [*CLASSES, *COLOURS, *MOTIONS, *EMOTIONS, *chains.NUMBERS, FACE, *" ".join(QUADRANTS).split()]
    return {*text.split(), *names, *map(str, range(SECONDS + 1)), *map(str, range(0, 225, 8))}
