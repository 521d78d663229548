"""Places in a picture: boxes, points and masks of what sounds, or of what is described."""

from __future__ import annotations

from typing import Any

import numpy as np

from crab import tasks
from crab.tasks.segmentation import Point, points_inside
from crab.world import chains, render
from crab.world.references import REFERENCES, refer, unseen_colour
from crab.world.scene import CLASSES, COLOURS, LATTICE, SECONDS, Scene, Thing
from crab.world.staging import Moment, Stage, View, cast, pick, skewed


def _points(mask: np.ndarray, count: int = 3) -> list[Point]:
    """Points on the lattice, whose numbers are in the world's vocabulary."""
    return points_inside(mask, count, LATTICE)


def _frame(stage: Stage, folder: str, moment: Moment, chain: str, truth: Any, fields: dict, last: dict | None = None):
    """A record about one frame and the second of sound around it. The clip is that one second, so this is frame 0."""
    picture, sound = f"{folder}/frames/0.jpg", f"{folder}/audio.wav"
    path = "image_path" if stage.split == "train" else "visual_path"  # AV-UIE has two names for this field
    record = {path: picture, "audio_path": sound, **fields, **stage.answer(chain, truth), **(last or {})}
    record |= {"frame_idx": 0, "scene": moment[0].id, "second": moment[1]}
    return View(record, (moment[0],), image={picture: moment}, second={sound: moment})


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
    last = {"top_left": list(box[:2]), "bottom_right": list(box[2:])}
    folder = f"AVS/v1s/arig_{stage.stems[0]}"
    return _frame(stage, folder, (scene, second), chain, box, {"a_obj": source.name}, last)


def _segment(stage: Stage, part: str, sounding: int, silent: int) -> View:
    """One box around all sources, three points with at least one on each, and their mask beside the frame."""
    scene, sources, second, chain = _sources(stage, sounding, silent)
    masks = [render.mask(t, second) for t in sources]
    largest = int(np.argmax([m.sum() for m in masks]))
    points = [p for i, m in enumerate(masks) for p in _points(m, 4 - len(masks) if i == largest else 1)]
    corners = np.array([t.box(second) for t in sources])
    box = tuple(int(v) for v in (*corners[:, :2].min(0), *corners[:, 2:].max(0)))
    stem = stage.stems[0]
    folder = f"AVS/{part}/{stem}"
    fields = {"vid": stem, "uid": f"{stem}_0", "a_obj": ",".join(sorted(t.name for t in sources))}
    view = _frame(stage, folder, (scene, second), chain, (box, points), fields)
    view.mask[f"{folder}/labels_rgb/0.png"] = (tuple(sources), second)
    return view


def s4(stage: Stage) -> View:
    """AVSBench single source: one thing sounds, with at most one silent thing."""
    return _segment(stage, "v1s", 1, stage.wanted((0, 1, 1), "silent"))


def ms3(stage: Stage) -> View:
    """AVSBench multi source: two or three things sound, among silent ones."""
    return _segment(stage, "v1m", *stage.wanted(((2, 1), (2, 2), (3, 1)), "sounding and silent"))


def ref_avs(stage: Stage) -> View:
    """Ref-AVS: a description of one thing by its looks, place, sound or silence, and its box, points and mask.

    In a quarter of the training records and in the test split ``test_n`` the thing is not there. Each class has one
    colour that no training description uses; it is kept for the test split ``test_u``.
    """
    rng, name = stage.rng(), stage.wanted(CLASSES, "class")
    train = stage.split == "train"
    part = "train" if train else stage.wanted(skewed(test_s=4, test_u=3, test_n=3), "split")
    there = stage.wanted((True, True, True, False), "there") if train else part != "test_n"
    kinds = ("looks", "looks and sound") if part == "test_u" else REFERENCES
    kept = unseen_colour(name)
    colour = kept if part == "test_u" else pick(rng, COLOURS, kept)
    second = int(rng.integers(SECONDS))
    kind = stage.wanted(kinds, f"kind in {part}")
    words, things, target, chain = refer(kind, rng, name, colour, there, (second, second + 1))
    moment = stage.scene(rng, things), second
    truth = (target.box(second), _points(render.mask(target, second))) if target else tasks.NULL
    stem = stage.stems[0]
    fields = {"vid": stem, "uid": f"{stem}_0", "fid": 0}
    fields |= {"idx": 0, "description": words} if train else {"object": words, "split": part}
    view = _frame(stage, f"media/{stem}", moment, chain, truth, fields)
    if target:
        folder = f"{tasks.FOLDER}/ref_avs/"
        view.mask[tasks.mask_path("ref_avs", view.record).removeprefix(folder)] = ((target,), second)
    return view


VIEWS = {"arig": arig, "s4": s4, "ms3": ms3, "ref_avs": ref_avs}
