"""Places in a picture: boxes, points and masks of what sounds, or is described."""

from __future__ import annotations

import numpy as np

from crab import tasks
from crab.world import chains, render
from crab.world.references import REFERENCES, unseen_colour
from crab.world.staging import Stage, cast, others, skewed
from crab.world.views.view import Moment, View
from crab.world.scene import CLASSES, COLOURS, LATTICE, SECONDS, Scene, Thing
from crab.tasks.referring import NULL
from crab.tasks.segmentation import Point, points_inside

#: Test splits of Ref-AVS: seen, unseen, and null, whose described thing is not there.
REF_SPLITS = skewed(test_s=4, test_u=3, test_n=3)


def _still(stage: Stage, silent: int) -> tuple[Scene, Thing, int]:
    """A scene of one sounding and `silent` silent things, its source, and the second in which it sounds."""
    rng, name = stage.rng(), stage.wanted(CLASSES, "source")
    make = cast(rng, [name, *others(rng, name)[:silent]])
    second = int(rng.integers(SECONDS))
    source = make[0](sounding=(second, second + 1))
    return stage.scene(rng, [source, *(m() for m in make[1:])]), source, second


def _points(mask: np.ndarray, count: int = 3) -> list[Point]:
    """`points_inside` on the lattice whose numbers the world's vocabulary has."""
    return points_inside(mask, count, LATTICE)


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
    points = _points(render.mask(source, second))
    view = _frame(stage, f"AVS/v1s/{stem}", (scene, second), vid=stem, uid=f"{stem}_0", a_obj=source.name,
                  label_content=f"{chains.source(scene, source)} {tasks.answer('s4', (box, points))}")
    view.mask[f"AVS/v1s/{stem}/labels_rgb/0.png"] = ((source,), second)
    return view


def ms3(stage: Stage) -> View:
    """AVSBench multi source: one box around two or three things that sound, among silent ones; points on each of them."""
    rng, name = stage.rng(), stage.wanted(CLASSES, "source")
    count, silent = stage.wanted(((2, 1), (2, 2), (3, 1)), "sounding and silent")
    makers = cast(rng, [name, *others(rng, name)[:count + silent - 1]])
    second = int(rng.integers(SECONDS))
    sources = [make(sounding=(second, second + 1)) for make in makers[:count]]
    scene = stage.scene(rng, [*sources, *(make() for make in makers[count:])])
    sources = chains.by_place(sources)
    masks = [render.mask(t, second) for t in sources]
    largest = int(np.argmax([m.sum() for m in masks]))
    points = [p for i, m in enumerate(masks) for p in _points(m, 2 if i == largest and count == 2 else 1)]
    corners = np.array([t.box(second) for t in sources])
    box = tuple(int(v) for v in (*corners[:, :2].min(0), *corners[:, 2:].max(0)))
    stem = stage.stems[0]
    view = _frame(stage, f"AVS/v1m/{stem}", (scene, second), vid=stem, uid=f"{stem}_0",
                  a_obj=",".join(sorted(t.name for t in sources)),
                  label_content=f"{chains.source(scene, *sources)} {tasks.answer('ms3', (box, points))}")
    view.mask[f"AVS/v1m/{stem}/labels_rgb/0.png"] = (tuple(sources), second)
    return view


def ref_avs(stage: Stage) -> View:
    """Ref-AVS: a description of one thing, by looks, place, sound or silence: its box, points and mask, or that it is not there.

    Nothing referred to in training has the one colour of its class that is kept for the unseen split of the test.
    """
    rng, name = stage.rng(), stage.wanted(CLASSES, "class")
    part = "train" if stage.split == "train" else stage.wanted(REF_SPLITS, "split")
    there = stage.wanted((True, True, True, False), "there") if part == "train" else part != "test_n"
    kinds = ("looks", "looks and sound") if part == "test_u" else tuple(REFERENCES)
    kept = unseen_colour(name)
    colour = kept if part == "test_u" else str(rng.choice([c for c in COLOURS if c != kept]))
    second = int(rng.integers(SECONDS))
    referred = REFERENCES[stage.wanted(kinds, f"kind in {part}")](rng, name, colour, there, (second, second + 1))
    scene = stage.scene(rng, referred.things)
    truth = NULL
    if referred.target:
        truth = referred.target.box(second), _points(render.mask(referred.target, second))
    stem = stage.stems[0]
    fields = {"idx": 0, "description": referred.words} if part == "train" else {"object": referred.words, "split": part}
    view = _frame(stage, f"media/{stem}", (scene, second), vid=stem, uid=f"{stem}_0", fid=0, **fields,
                  output=f"{referred.chain} {tasks.answer('ref_avs', truth)}")
    if referred.target:
        folder = f"{tasks.FOLDER}/ref_avs/"
        view.mask[tasks.mask_path("ref_avs", view.record).removeprefix(folder)] = ((referred.target,), second)
    return view


VIEWS = {"arig": arig, "s4": s4, "ms3": ms3, "ref_avs": ref_avs}
