"""What a view makes: a record, its scenes and its media."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from crab import tasks
from crab.world.scene import Scene, Thing
from crab.world.staging import Stage

Moment = tuple[Scene, int]  # a scene and one of its seconds


@dataclass(frozen=True)
class View:
    """One record, its scenes, and what its files show: path below the media slot's folder -> what is rendered there."""

    record: dict
    scenes: tuple[Scene, ...]
    video: dict[str, Scene] = field(default_factory=dict)
    audio: dict[str, Scene] = field(default_factory=dict)
    image: dict[str, Moment] = field(default_factory=dict)
    second: dict[str, Moment] = field(default_factory=dict)  # one second of sound
    mask: dict[str, tuple[tuple[Thing, ...], int]] = field(default_factory=dict)  # of these things together


def answer(stage: Stage, chain: str, truth: Any) -> dict[str, str]:
    """The record's answer field: a chain, then the tagged answer."""
    text = tasks.answer(stage.slot, truth)
    return {tasks.get_slot(stage.slot).answer_field: f"{chain} {text}" if chain else text}


def clip(stage: Stage, scene: Scene, chain: str, truth: Any, *, path: str = "", form: str = "mp4", **fields) -> View:
    """A record about one video and its sound, with the answer after the other fields.

    Args:
        path: the two files without their endings; by default the stage's stem.
        form: the ending of the video.
    """
    path = path or stage.stems[0]
    record = {"video_path": f"{path}.{form}", "audio_path": f"{path}.mp3", **fields, **answer(stage, chain, truth)}
    record["scene"] = scene.id
    return View(record, (scene,), video={f"video/{path}.{form}": scene}, audio={f"audio/{path}.mp3": scene})
