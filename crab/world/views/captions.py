"""Captions of scenes staged for no task."""

from __future__ import annotations

from crab import tasks
from crab.world import chains
from crab.world.staging import Stage, scene_id
from crab.world.views.view import View, clip
from crab.world.scene import sample_scene


def avcap(stage: Stage) -> View:
    """VALOR: all that is seen and heard, where and when, of a scene staged for no task."""
    scene = sample_scene(scene_id(stage.slot, stage.split, stage.scenes[0]), stage.seed)
    return clip(stage, scene, video_id=stage.stems[0], label_content=tasks.answer("avcap", chains.caption(scene)))


VIEWS = {"avcap": avcap}
