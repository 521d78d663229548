"""Places in a picture: boxes, points and masks of what sounds."""

import numpy as np

from crab.tasks.segmentation import points_inside
from crab.world import chains, render
from crab.world.scene import CLASSES, LATTICE, SECONDS, Scene, Thing
from crab.world.staging import Stage, View, cast


def _sources(stage: Stage, sounding: int, silent: int) -> tuple[Scene, list[Thing], int, str]:
    """A scene with some sounding and some silent things, its sources, the second in which they sound, and the chain."""
    rng, name = stage.rng(), stage.wanted(CLASSES, "source")
    make = cast(rng, name)
    second = int(rng.integers(SECONDS))
    sources = [m(sounding=(second, second + 1)) for m in make[:sounding]]
    scene = stage.scene(rng, [*sources, *(m() for m in make[sounding : sounding + silent])])
    sources = chains.by_place(sources)
    return scene, sources, second, chains.heard_and_seen(sources, scene.visible, *map(chains.sounds, sources))


def arig(stage: Stage) -> View:
    """ARIG: the box of the one thing that sounds, among two or three things."""
    scene, (source,), second, chain = _sources(stage, 1, stage.wanted((1, 1, 2), "silent"))
    box = source.box(second)
    folder, fields = f"AVS/v1s/arig_{stage.stems[0]}", {"a_obj": source.name}
    last = {"top_left": list(box[:2]), "bottom_right": list(box[2:])}
    return stage.still(folder, scene, second, chain, box, fields, **last)


def _segment(stage: Stage, part: str, sounding: int, silent: int) -> View:
    """One box around all sources, three points with at least one on each, and their mask beside the frame."""
    scene, sources, second, chain = _sources(stage, sounding, silent)
    masks = [render.mask(t, second) for t in sources]
    largest = int(np.argmax([m.sum() for m in masks]))
    points = [p for i, m in enumerate(masks) for p in points_inside(m, 4 - len(masks) if i == largest else 1, LATTICE)]
    corners = np.array([t.box(second) for t in sources])
    box = tuple(int(v) for v in (*corners[:, :2].min(0), *corners[:, 2:].max(0)))
    stem = stage.stems[0]
    folder = f"AVS/{part}/{stem}"
    fields = {"vid": stem, "uid": f"{stem}_0", "a_obj": ",".join(sorted(t.name for t in sources))}
    view = stage.still(folder, scene, second, chain, (box, points), fields)
    view.files[f"{folder}/labels_rgb/0.png"] = ("mask", tuple(sources), second)
    return view


def s4(stage: Stage) -> View:
    """AVSBench single source: one thing sounds, with at most one silent thing."""
    return _segment(stage, "v1s", 1, stage.wanted((0, 1, 1), "silent"))


def ms3(stage: Stage) -> View:
    """AVSBench multi source: two or three things sound, among silent ones."""
    return _segment(stage, "v1m", *stage.wanted(((2, 1), (2, 2), (3, 1)), "sounding and silent"))


VIEWS = {"arig": arig, "s4": s4, "ms3": ms3}
