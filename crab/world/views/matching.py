"""Audio-visual matching: which of two videos belongs to a sound, or which of two sounds to a video."""

from __future__ import annotations

from crab.world import chains
from crab.world.scene import CLASSES, Scene, Thing, sample_interval
from crab.world.staging import Stage, cast, others
from crab.world.views.view import View, answer

CHOICES = ("one", "two")
_ENDINGS = {"video": "mp4", "audio": "mp3"}


def _pair(stage: Stage) -> tuple[list[Scene], list[Thing]]:
    """Two scenes, each with a thing that is seen and heard, of different classes. Neither shows the other's class.

    Records 2k and 2k + 1 share them and differ in which one is asked for. So the answers are balanced, and a guess from
    one side does not help.
    """
    pair = stage.every(2)
    first = pair.wanted(CLASSES, "first")
    second = pair.every(len(CLASSES)).wanted([c for c in CLASSES if c != first], f"beside {first}")
    scenes, sources = [], []
    for which, name in enumerate((first, second)):
        rng = stage.rng(which)
        make = cast(rng, [name, *others(rng, first, second)[:1]])
        sources.append(make[0](sounding=sample_interval(rng, 5)))
        beside = [make[1]()] if rng.random() < 0.3 else []
        scenes.append(stage.scene(rng, [sources[-1], *beside], which))
    return scenes, sources


def _match(stage: Stage, two: str, one: str, chain: str, scenes: list[Scene], sources: list[Thing]) -> View:
    """The record that shows both scenes as `two` and the right one as `one`: "video" and "audio", or the reverse."""
    right = stage.index % 2
    names = {kind: [f"{stem}.{ending}" for stem in stage.stems] for kind, ending in _ENDINGS.items()}
    paths = {f"{two}{n}_path": name for n, name in enumerate(names[two], 1)} | {f"{one}_path": names[one][right]}
    record = {
        **dict(sorted(paths.items(), key=lambda item: not item[0].startswith("video"))),
        f"correct_{two}": right + 1,
        f"{one}_event": sources[right].name,
        **{f"{two}{n}_event": source.name for n, source in enumerate(sources, 1)},
        **answer(stage, chain, CHOICES[right]),
        "scene": [s.id for s in scenes],
    }
    shown = {
        two: {f"{two}/{name}": scene for name, scene in zip(names[two], scenes, strict=True)},
        one: {f"{one}/{names[one][right]}": scenes[right]},
    }
    return View(record, tuple(scenes), **shown)


def a2v(stage: Stage) -> View:
    """Which of two videos belongs to a sound."""
    scenes, sources = _pair(stage)
    heard = chains.hear([sources[stage.index % 2]], times=False)
    shown = [chains.video_shows(n, t) for n, t in zip(CHOICES, sources, strict=True)]
    return _match(stage, "video", "audio", " ".join([heard, *shown]), scenes, sources)


def v2a(stage: Stage) -> View:
    """Which of two sounds belongs to a video."""
    scenes, sources = _pair(stage)
    seen = chains.see(scenes[stage.index % 2].visible)
    sounds = [chains.sound_is(n, t) for n, t in zip(CHOICES, sources, strict=True)]
    return _match(stage, "audio", "video", " ".join([seen, *sounds]), scenes, sources)


VIEWS = {"a2v": a2v, "v2a": v2a}
