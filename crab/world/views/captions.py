"""Captions of scenes that are staged for no task."""

from crab.world import chains
from crab.world.scene import sample_scene
from crab.world.staging import Stage, View


def avcap(stage: Stage) -> View:
    """VALOR: all that is seen and heard, where and when."""
    scene = sample_scene(stage.scene_id(), stage.seed)
    return stage.clip(scene, "", chains.caption(scene), video_id=stage.stems[0])


VIEWS = {"avcap": avcap}
