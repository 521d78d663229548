"""Audio-visual matching: which belongs to which."""

from __future__ import annotations

from crab import tasks
from crab.world import chains
from crab.world.staging import Stage, cast, others
from crab.world.views.view import View
from crab.world.scene import CLASSES, Scene, Thing, sample_interval

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
    shown = " ".join(chains.video_shows(n, t) for n, t in zip(CHOICES, sources, strict=True))
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
    heard = " ".join(chains.sound_is(n, t) for n, t in zip(CHOICES, sources, strict=True))
    record = {
        "video_path": f"{stems[right]}.mp4", "audio1_path": f"{stems[0]}.mp3", "audio2_path": f"{stems[1]}.mp3",
        "correct_audio": right + 1, "video_event": sources[right].name,
        "audio1_event": sources[0].name, "audio2_event": sources[1].name,
        "label": f"{chains.see(scenes[right].visible)} {heard} {tasks.answer('v2a', CHOICES[right])}",
        "scene": [s.id for s in scenes],
    }
    return View(record, tuple(scenes), video={f"video/{stems[right]}.mp4": scenes[right]},
                audio={f"audio/{n}.mp3": s for n, s in zip(stems, scenes, strict=True)})


VIEWS = {"a2v": a2v, "v2a": v2a}
