"""Emotion recognition: what a face shows and a voice tells, by five data sets' labels, priors and staging."""

from __future__ import annotations

from crab import tasks
from crab.world import chains
from crab.world.staging import Stage, cast, others, skewed
from crab.world.views.view import View, clip
from crab.world.scene import COLOURS, EMOTIONS, FACE, Thing, sample_interval

#: What each set calls the world's emotions, where it has a name of its own.
_NAMES = {"joy": "happy", "happiness": "happy", "sadness": "sad", "angry": "anger", "worried": "fear"}
#: MAFW's compounds: face and voice disagree, and only both together tell.
_COMPOUNDS = {
    "anxiety": ("neutral", "fear"),
    "contempt": ("neutral", "disgust"),
    "disappointment": ("sad", "neutral"),
    "helplessness": ("sad", "fear"),
}
#: Labels in shares near the published sets' own; the rarest are raised, so that a hundred test records hold each.
CREMAD = tuple(e for e in EMOTIONS if e != "surprise")
MELD = skewed(neutral=17, joy=6, surprise=4, anger=4, sadness=3, disgust=1, fear=1)
MER24 = skewed(neutral=5, angry=5, happy=4, sad=3, worried=2, surprise=1)
MAFW = skewed(anger=5, sadness=5, happiness=4, neutral=4, surprise=3, anxiety=3, disgust=2, fear=2,
              contempt=2, disappointment=2, helplessness=2)
DFEW = skewed(neutral=6, happy=5, angry=4, sad=4, surprise=3, fear=2, disgust=1)


def felt(label: str) -> dict[str, str | None]:
    """The fields of a face that a set's label stands for: the emotion shown, and the voice's where it is another."""
    face, voice = _COMPOUNDS.get(label, (_NAMES.get(label, label), None))
    return {"emotion": face, "voice": voice}


def _record(stage: Stage, rng, things: list[Thing], chain: str, label: str, field: str = "emotion") -> View:
    return clip(stage, stage.scene(rng, things), **{field: label}, label=f"{chain} {tasks.answer(stage.slot, label)}")


def cremad(stage: Stage) -> View:
    """CREMA-D: in a studio, a face that shows and voices one emotion; six emotions, balanced."""
    rng, label = stage.rng(), stage.wanted(CREMAD, "emotion")
    (make,) = cast(rng, [FACE])
    face = make(sounding=sample_interval(rng, 5), **felt(label))
    return _record(stage, rng, [face], f"{chains.see([face])} {chains.hear([face])}", label)


def meld(stage: Stage) -> View:
    """MELD: short lines of a dialogue, nearly half of them neutral; in half the clips a second face listens."""
    rng, label = stage.rng(), stage.wanted(MELD, "emotion")
    makers = cast(rng, [FACE, FACE])
    speaker = makers[0](sounding=sample_interval(rng, 1, 3), **felt(label))
    faces = [speaker]
    if rng.random() < 0.5:  # of another colour, so that words can tell them apart, and another emotion, so that the voice can
        colours = [c for c in COLOURS if c != speaker.colour]
        feelings = [e for e in EMOTIONS if e != speaker.emotion]
        faces.append(makers[1](colour=str(rng.choice(colours)), emotion=str(rng.choice(feelings))))
    chain = f"{chains.see(faces)} {chains.hear([speaker])} {chains.sounds(speaker)}"
    return _record(stage, rng, faces, chain, label, "Emotion")


def mer24(stage: Stage) -> View:
    """MER2024: a voice under two or three louder sounds, in view or not."""
    rng, label = stage.rng(), stage.wanted(MER24, "emotion")
    face, *makers = cast(rng, [FACE, *others(rng)[:3]])
    face = face(sounding=sample_interval(rng, 5), gain=0.35, **felt(label))
    clutter = [
        make(sounding=sample_interval(rng, 6), gain=0.7, **({} if rng.random() < 0.5 else {"visible": None}))
        for make in makers[:2 + int(rng.integers(2))]
    ]
    chain = f"{chains.see([face])} {chains.hear([face], times=False)}"
    return _record(stage, rng, [face, *clutter], chain, label, "discrete")


def mafw(stage: Stage) -> View:
    """MAFW: eleven emotions, four of them compounds of a face and a voice that disagree; things stand about."""
    rng, label = stage.rng(), stage.wanted(MAFW, "emotion")
    makers = cast(rng, [FACE, *others(rng)[:1]])
    face = makers[0](sounding=sample_interval(rng, 5), **felt(label))
    things = [face, *([makers[1]()] if rng.random() < 0.4 else [])]
    return _record(stage, rng, things, f"{chains.see([face])} {chains.hear([face], times=False)}", label)


def dfew(stage: Stage) -> View:
    """DFEW: film scenes with a long tail of labels; the face is there for a while only and often says nothing."""
    rng, label, sound = stage.rng(), stage.wanted(DFEW, "emotion"), stage.wanted(("voice", "voice", "thing", "silence"), "sound")
    makers = cast(rng, [FACE, *others(rng)[:1]])
    visible = sample_interval(rng, 5)
    face = makers[0](visible=visible, sounding=visible if sound == "voice" else None, **felt(label))
    things = [face, *([makers[1](visible=None, sounding=sample_interval(rng, 4))] if sound == "thing" else [])]
    heard = [t for t in things if t.sounding]
    return _record(stage, rng, things, f"{chains.see([face], times=True)} {chains.hear(heard, times=False)}", label)


VIEWS = {"cremad": cremad, "meld": meld, "mer24": mer24, "mafw": mafw, "dfew": dfew}
