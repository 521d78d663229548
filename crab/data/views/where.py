"""Places in a picture: boxes, points and masks of what sounds."""

from __future__ import annotations

import numpy as np

from crab import tasks
from crab.data import chains, render
from crab.data.staging import Stage, cast, others
from crab.data.views.view import Moment, View
from crab.data.world import CLASSES, LATTICE, SECONDS, Scene, Thing


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


VIEWS = {"arig": arig, "s4": s4}
