"""A scene's records: one view for each slot, in that slot's fields, labels and answer tags.

A view stages scenes for a wanted label and writes the record with an explicit answer: a chain of statements true of
the scene graph (:mod:`crab.data.chains`), then the tagged answer (:mod:`crab.tasks`).  Every record, of train and of
test, also holds ``scene``, the id of its scene (a list for two), by which a chain can be checked.

To add a slot: a view here, and its name in :data:`VIEWS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from crab import tasks
from crab.data import chains, render
from crab.data.questions import QUESTIONS
from crab.data.staging import Stage, around, cast, others, scene_id
from crab.data.world import (
    CLASSES,
    EMOTIONS,
    FACE,
    LATTICE,
    MOTIONS,
    SECONDS,
    Scene,
    Thing,
    sample_interval,
    sample_scene,
    sample_thing,
)

Moment = tuple[Scene, int]  # a scene and one of its seconds


@dataclass(frozen=True)
class View:
    """One record, its scenes, and the media it names: path below the media slot's folder -> what to render there."""

    record: dict
    scenes: tuple[Scene, ...]
    video: dict[str, Scene] = field(default_factory=dict)
    audio: dict[str, Scene] = field(default_factory=dict)
    image: dict[str, Moment] = field(default_factory=dict)
    second: dict[str, Moment] = field(default_factory=dict)  # one second of sound
    mask: dict[str, tuple[Thing, int]] = field(default_factory=dict)


def _clip(stage: Stage, scene: Scene, **fields) -> View:
    """A record about one video and its sound."""
    stem = stage.stems[0]
    record = {"video_path": f"{stem}.mp4", "audio_path": f"{stem}.mp3", **fields, "scene": scene.id}
    return View(record, (scene,), video={f"video/{stem}.mp4": scene}, audio={f"audio/{stem}.mp3": scene})


# ---------------------------------------------------------------- when

def ave(stage: Stage) -> View:
    """AVE: one event both heard and seen, and where the two overlap.  A silent thing or a sound may distract."""
    rng, name = stage.rng(), stage.wanted(CLASSES, "event")
    make = cast(rng, [name, *others(rng, name)[:2]])
    core = sample_interval(rng)
    visible, sounding = around(rng, core)
    thing = make[0](visible=visible, sounding=sounding)
    things = [thing]
    if rng.random() < 0.5:
        things.append(make[1](visible=sample_interval(rng, 4)))
    if rng.random() < 0.3:
        things.append(make[2](visible=None, sounding=sample_interval(rng)))
    start, end = core
    chain = f"{chains.hear([thing])} {chains.see([thing], times=True)} both hold {chains.lasting(core)} ."
    return _clip(stage, stage.scene(rng, things), vid=stage.stems[0], event=name, start_time=start, end_time=end,
                 label_content=f"{chain} {tasks.answer('ave', (name, start, end))}")


# Roles of a clip's one or two things: seen and heard, only heard (off screen), only seen.
_ROLES = (("both",), ("heard", "seen"), ("both", "heard"), ("both", "seen"))


def avvp(stage: Stage) -> View:
    """LLP: audio and visual events, each with its own times, off-screen sounds and silent things included."""
    rng, name = stage.rng(), stage.wanted(CLASSES, "event")
    roles = stage.wanted(_ROLES, "roles")
    things = [
        make(visible=sample_interval(rng) if role != "heard" else None,
             sounding=sample_interval(rng) if role != "seen" else None)
        for role, make in zip(roles, cast(rng, [name, *others(rng, name)[:1]]), strict=False)
    ]
    scene = stage.scene(rng, things)
    events = [("audio", t.name, *t.sounding) for t in chains.by_time(scene.sounding)]
    events += [("visual", t.name, *t.visible) for t in chains.by_place(scene.visible)]
    chain = f"{chains.hear(scene.sounding)} {chains.see(scene.visible, times=True)}"
    return _clip(stage, scene, filename=stage.stems[0], vid=stage.stems[0],
                 event=",".join(sorted(t.name for t in things)),
                 label_content=f"{chain} {tasks.answer('avvp', events)}")


# ---------------------------------------------------------------- where

def _still(stage: Stage, silent: int) -> tuple[Scene, Thing, int]:
    """A scene of one sounding and `silent` silent things, its source, and the second in which it sounds."""
    rng, name = stage.rng(), stage.wanted(CLASSES, "source")
    make = cast(rng, [name, *others(rng, name)[:silent]])
    second = int(rng.integers(SECONDS))
    source = make[0](sounding=(second, second + 1))
    return stage.scene(rng, [source, *(m() for m in make[1:])]), source, second


def _frame(stage: Stage, clip: str, moment: Moment, **fields) -> View:
    """A record about one frame and the second of sound around it: a clip of that one second, so frame 0."""
    picture, heard = f"{clip}/frames/0.jpg", f"{clip}/audio.wav"
    # AV-UIE names the frame differently in its train and test records.
    path = "image_path" if stage.split == "train" else "visual_path"
    record = {path: picture, "audio_path": heard, **fields, "frame_idx": 0, "scene": moment[0].id, "second": moment[1]}
    return View(record, (moment[0],), image={picture: moment}, second={heard: moment})


def arig(stage: Stage) -> View:
    """ARIG: two or three things in the picture, one of them sounds; its box."""
    scene, source, second = _still(stage, stage.wanted((1, 1, 2), "silent"))
    box = source.box(second)
    return _frame(stage, f"AVS/v1s/arig_{stage.stems[0]}", (scene, second), a_obj=source.name,
                  label_content=f"{chains.source(scene, source)} {tasks.answer('arig', box)}",
                  top_left=list(box[:2]), bottom_right=list(box[2:]))


def s4(stage: Stage) -> View:
    """AVSBench single source: the box of the sounding thing, three points on it, and its mask beside the frame."""
    scene, source, second = _still(stage, stage.wanted((0, 1, 1), "silent"))
    stem, box = stage.stems[0], source.box(second)
    points = points_inside(render.mask(source, second))
    view = _frame(stage, f"AVS/v1s/{stem}", (scene, second), vid=stem, uid=f"{stem}_0", a_obj=source.name,
                  label_content=f"{chains.source(scene, source)} {tasks.answer('s4', (box, points))}")
    view.mask[f"AVS/v1s/{stem}/labels_rgb/0.png"] = (source, second)
    return view


def points_inside(mask: np.ndarray) -> list[tuple[int, int]]:
    """Three (x, y) on a mask: high, middle and low among its lattice points, off its edge where it is wide enough.

    Args:
        mask: bool [H, W] with at least three pixels.
    """
    deep = mask.copy()
    for axis in (0, 1):
        deep &= np.roll(mask, 2, axis) & np.roll(mask, -2, axis)
    lattice = np.zeros_like(mask)
    lattice[::LATTICE, ::LATTICE] = True
    for candidates in (deep & lattice, mask & lattice, mask):
        spots = np.argwhere(candidates)
        if len(spots) >= 3:
            return [(int(x), int(y)) for y, x in (spots[len(spots) * part // 6] for part in (1, 3, 5))]
    raise ValueError(f"the mask has {int(mask.sum())} pixels; three points need at least three")


# ---------------------------------------------------------------- what

def avqa(stage: Stage) -> View:
    """MUSIC-AVQA: templates take turns, and within each its answers do."""
    rng, number = stage.rng(), stage.wanted(range(len(QUESTIONS)), "template")
    question = QUESTIONS[number]
    value = stage.every(len(QUESTIONS)).wanted(question.answers, f"answer to {number}")
    things, text, chain = question.stage(rng, value)
    return _clip(stage, stage.scene(rng, things), video_id=stage.stems[0], question_id=stage.index,
                 type=json.dumps([question.modality, question.kind]), question=text, answer=value,
                 label=f"{chain} {tasks.answer('avqa', value)}")


def cremad(stage: Stage) -> View:
    """CREMA-D: a face that shows and voices one emotion."""
    rng, feeling = stage.rng(), stage.wanted(EMOTIONS, "emotion")
    face = sample_thing(rng, FACE, sounding=sample_interval(rng, 5), emotion=feeling)
    chain = f"{chains.see([face])} {chains.hear([face])}"
    return _clip(stage, stage.scene(rng, [face]), emotion=feeling,
                 label=f"{chain} {tasks.answer('cremad', feeling)}")


def ks(stage: Stage) -> View:
    """Kinetics-Sounds: the action is what the sounding thing does; a silent one may do something else."""
    rng, motion, name = stage.rng(), stage.wanted(MOTIONS, "action"), stage.wanted(CLASSES, "class")
    make = cast(rng, [name, *others(rng, name)[:1]])
    source = make[0](sounding=sample_interval(rng, 5), motion=motion)
    things = [source]
    if rng.random() < 0.7:
        things.append(make[1](motion=str(rng.choice([m for m in MOTIONS if m != motion]))))
    chain = f"{chains.hear([source], times=False)} {chains.see(things, does=True)} {chains.sounds(source)}"
    return _clip(stage, stage.scene(rng, things), action=motion, label=f"{chain} {tasks.answer('ks', motion)}")


# ---------------------------------------------------------------- which

CHOICES = ("one", "two")


def _pair(stage: Stage) -> tuple[list[Scene], list[Thing]]:
    """Two scenes, each with one thing seen and heard, of different classes; neither shows the other's class.

    Records 2k and 2k + 1 share them and differ in which one is asked for: balanced, and no guess from one side helps.
    """
    pair = stage.every(2)
    first = pair.wanted(CLASSES, "first")
    second = pair.every(len(CLASSES)).wanted([c for c in CLASSES if c != first], f"beside {first}")
    scenes, sources = [], []
    for which, name in enumerate((first, second)):
        rng = stage.rng(which)
        make = cast(rng, [name, *others(rng, first, second)[:1]])
        sources.append(make[0](sounding=sample_interval(rng, 5)))
        things = [sources[-1], *([make[1]()] if rng.random() < 0.3 else [])]
        scenes.append(stage.scene(rng, things, which))
    return scenes, sources


def a2v(stage: Stage) -> View:
    """Which of two videos a sound belongs to."""
    scenes, sources = _pair(stage)
    right, stems = stage.index % 2, stage.stems
    shown = " ".join(f"video {n} shows {chains.sight(t)} ." for n, t in zip(CHOICES, sources, strict=True))
    record = {
        "video1_path": f"{stems[0]}.mp4", "video2_path": f"{stems[1]}.mp4", "audio_path": f"{stems[right]}.mp3",
        "correct_video": right + 1, "audio_event": sources[right].name,
        "video1_event": sources[0].name, "video2_event": sources[1].name,
        "label": f"{chains.hear([sources[right]], times=False)} {shown} {tasks.answer('a2v', CHOICES[right])}",
        "scene": [s.id for s in scenes],
    }
    return View(record, tuple(scenes), video={f"video/{n}.mp4": s for n, s in zip(stems, scenes, strict=True)},
                audio={f"audio/{stems[right]}.mp3": scenes[right]})


def v2a(stage: Stage) -> View:
    """Which of two sounds belongs to a video."""
    scenes, sources = _pair(stage)
    right, stems = stage.index % 2, stage.stems
    heard = " ".join(f"sound {n} is {chains.sound(t, times=False)} ." for n, t in zip(CHOICES, sources, strict=True))
    record = {
        "video_path": f"{stems[right]}.mp4", "audio1_path": f"{stems[0]}.mp3", "audio2_path": f"{stems[1]}.mp3",
        "correct_audio": right + 1, "video_event": sources[right].name,
        "audio1_event": sources[0].name, "audio2_event": sources[1].name,
        "label": f"{chains.see(scenes[right].visible)} {heard} {tasks.answer('v2a', CHOICES[right])}",
        "scene": [s.id for s in scenes],
    }
    return View(record, tuple(scenes), video={f"video/{stems[right]}.mp4": scenes[right]},
                audio={f"audio/{n}.mp3": s for n, s in zip(stems, scenes, strict=True)})


# ---------------------------------------------------------------- everything

def avcap(stage: Stage) -> View:
    """VALOR: all that is seen and heard, where and when, of a scene staged for no task."""
    scene = sample_scene(scene_id(stage.slot, stage.split, stage.scenes[0]), stage.seed)
    return _clip(stage, scene, video_id=stage.stems[0], label_content=tasks.answer("avcap", chains.caption(scene)))


VIEWS: dict[str, Callable[[Stage], View]] = {
    "ave": ave, "avvp": avvp, "arig": arig, "s4": s4, "avqa": avqa, "cremad": cremad, "ks": ks,
    "a2v": a2v, "v2a": v2a, "avcap": avcap,
}


def view(slot: str, split: str, index: int, seed: int) -> View:
    """Record `index` of a slot's split, with its scenes and media.  The same four always give the same view."""
    if slot not in VIEWS:
        raise ValueError(f"no view makes records of slot '{slot}'; those made: {', '.join(VIEWS)}")
    paired = tasks.get_slot(slot).media in ("two_videos_audio", "video_two_audios")
    scenes = (index - index % 2, index - index % 2 + 1) if paired else (index,)
    return VIEWS[slot](Stage(slot, split, index, seed, scenes))
