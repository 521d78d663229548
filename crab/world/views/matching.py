"""Audio-visual matching: which of two videos belongs to a sound, or which of two sounds to a video."""

from crab.world import chains
from crab.world.scene import CLASSES, Scene, Thing
from crab.world.staging import Stage, View, makers, others

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
        make = makers(rng, [name, *others(rng, first, second)])
        sources.append(make[0].sounds(5))
        beside = [make[1]()] if rng.random() < 0.3 else []
        scenes.append(stage.scene(rng, [sources[-1], *beside], which))
    return scenes, sources


def match(stage: Stage) -> View:
    """Which of two videos belongs to a sound (a2v), or which of two sounds to a video (v2a)."""
    two, one = ("video", "audio") if stage.slot == "a2v" else ("audio", "video")
    scenes, sources = _pair(stage)
    right = stage.index % 2
    if two == "video":
        chain = [chains.hear([sources[right]], times=False), *map(chains.video_shows, CHOICES, sources)]
    else:
        chain = [chains.see(scenes[right].visible), *map(chains.sound_is, CHOICES, sources)]
    names = {kind: [f"{stem}.{ending}" for stem in stage.stems] for kind, ending in _ENDINGS.items()}
    paths = {f"{one}_path": names[one][right], **{f"{two}{n}_path": name for n, name in enumerate(names[two], 1)}}
    record = {
        **dict(sorted(paths.items(), key=lambda item: item[0][:5], reverse=True)),  # videos stand first
        f"correct_{two}": right + 1,
        f"{one}_event": sources[right].name,
        **{f"{two}{n}_event": source.name for n, source in enumerate(sources, 1)},
        **stage.answer(" ".join(chain), CHOICES[right]),
        "scene": [scene.id for scene in scenes],
    }
    files = {f"{two}/{name}": (two, scene) for name, scene in zip(names[two], scenes, strict=True)}
    files[f"{one}/{names[one][right]}"] = (one, scenes[right])
    return View(record, tuple(scenes), files)


VIEWS = {"a2v": match, "v2a": match}
