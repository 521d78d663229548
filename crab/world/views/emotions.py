"""Emotion recognition: what a face shows and a voice tells. Each data set has its own labels, shares and staging."""

from collections.abc import Callable

import numpy as np

from crab.world import chains
from crab.world.scene import COLOURS, EMOTIONS, FACE, Thing, sample_interval
from crab.world.staging import Stage, View, cast, makers, pick, skewed

#: Labels that are emotions of the world by another name.
_NAMES = {"joy": "happy", "happiness": "happy", "sadness": "sad", "angry": "anger", "worried": "fear"}
#: The compounds of MAFW: (face, voice) disagree, and only both together show the label.
_COMPOUNDS = {
    "anxiety": ("neutral", "fear"),
    "contempt": ("neutral", "disgust"),
    "disappointment": ("sad", "neutral"),
    "helplessness": ("sad", "fear"),
}

Staged = tuple[list[Thing], str]  # the things of a scene, and its chain


def _studio(stage: Stage, rng, felt: dict) -> Staged:
    """CREMA-D: one face alone."""
    (make,) = makers(rng, [FACE])
    face = make.sounds(5, **felt)
    return [face], f"{chains.see([face])} {chains.hear([face])}"


def _dialogue(stage: Stage, rng, felt: dict) -> Staged:
    """MELD: short lines. In half of the clips a second face listens, of another colour and emotion."""
    make = makers(rng, [FACE, FACE])
    speaker = make[0](sounding=sample_interval(rng, 1, 3), **felt)
    faces = [speaker]
    if rng.random() < 0.5:
        colour = pick(rng, COLOURS, speaker.colour)
        faces.append(make[1](colour=colour, emotion=pick(rng, EMOTIONS, speaker.emotion)))
    return faces, f"{chains.see(faces)} {chains.hear([speaker])} {chains.sounds(speaker)}"


def _noise(stage: Stage, rng, felt: dict) -> Staged:
    """MER2024: a voice under two or three louder sounds, on or off screen."""
    make = cast(rng, FACE)
    face = make[0].sounds(5, gain=0.35, **felt)
    clutter = [m.sounds_anywhere(shortest=6, gain=0.7) for m in make[1 : 3 + int(rng.integers(2))]]
    return [face, *clutter], f"{chains.see([face])} {chains.hear([face], times=False)}"


def _in_the_wild(stage: Stage, rng, felt: dict) -> Staged:
    """MAFW: a face, and sometimes a silent thing. Four of the labels are compounds."""
    make = cast(rng, FACE)
    face = make[0].sounds(5, **felt)
    beside = [make[1]()] if rng.random() < 0.4 else []
    return [face, *beside], f"{chains.see([face])} {chains.hear([face], times=False)}"


def _film(stage: Stage, rng, felt: dict) -> Staged:
    """DFEW: the face is there for a while only and often says nothing."""
    sound = stage.wanted(("voice", "voice", "thing", "silence"), "sound")
    make = cast(rng, FACE)
    visible = sample_interval(rng, 5)
    face = make[0](visible=visible, sounding=visible if sound == "voice" else None, **felt)
    unseen = [make[1].sounds(4, visible=None)] if sound == "thing" else []
    heard = [t for t in (face, *unseen) if t.sounding]
    return [face, *unseen], f"{chains.see([face], times=True)} {chains.hear(heard, times=False)}"


_MELD = skewed(neutral=17, joy=6, surprise=4, anger=4, sadness=3, disgust=1, fear=1)
_MER = skewed(neutral=5, angry=5, happy=4, sad=3, worried=2, surprise=1)
_MAFW = (
    *skewed(anger=5, sadness=5, happiness=4, neutral=4, surprise=3, anxiety=3, disgust=2, fear=2),
    *skewed(contempt=2, disappointment=2, helplessness=2),
)
_DFEW = skewed(neutral=6, happy=5, angry=4, sad=4, surprise=3, fear=2, disgust=1)
#: Slot -> its labels in their shares, the record's field of the label, and how a clip is staged. The shares are near
#: those of the published sets. The rarest are raised, so that a hundred test records hold each label.
_SETS: dict[str, tuple[tuple[str, ...], str, Callable[[Stage, np.random.Generator, dict], Staged]]] = {
    "cremad": (tuple(e for e in EMOTIONS if e != "surprise"), "emotion", _studio),
    "meld": (_MELD, "Emotion", _dialogue),
    "mer24": (_MER, "discrete", _noise),
    "mafw": (_MAFW, "emotion", _in_the_wild),
    "dfew": (_DFEW, "emotion", _film),
}


def emotion(stage: Stage) -> View:
    """The emotion of the one face, or of the face that speaks."""
    labels, field, staged = _SETS[stage.slot]
    rng, label = stage.rng(), stage.wanted(labels, "emotion")
    face, voice = _COMPOUNDS.get(label, (_NAMES.get(label, label), None))
    things, chain = staged(stage, rng, {"emotion": face, "voice": voice})
    return stage.clip(stage.scene(rng, things), chain, label, **{field: label})


VIEWS = dict.fromkeys(_SETS, emotion)
