"""What a view makes: a record, its scenes and the media it names."""

from __future__ import annotations

from dataclasses import dataclass, field

from crab.world.staging import Stage
from crab.world.scene import Scene, Thing

Moment = tuple[Scene, int]  # a scene and one of its seconds


@dataclass(frozen=True)
class View:
    """One record, its scenes, and the media it names: path below the media slot's folder -> what to render there."""

    record: dict
    scenes: tuple[Scene, ...]
    video: dict[str, Scene] = field(default_factory=dict)
    audio: dict[str, Scene] = field(default_factory=dict)
    image: dict[str, Moment] = field(default_factory=dict)
    second: dict[str, Moment] = field(default_factory=dict)  # one second of sound
    mask: dict[str, tuple[tuple[Thing, ...], int]] = field(default_factory=dict)  # of these things together


def clip(stage: Stage, scene: Scene, path: str = "", form: str = "mp4", /, **fields) -> View:
    """A record about one video and its sound, two files called `path` (by default the stage's stem), one of this form."""
    path = path or stage.stems[0]
    record = {"video_path": f"{path}.{form}", "audio_path": f"{path}.mp3", **fields, "scene": scene.id}
    return View(record, (scene,), video={f"video/{path}.{form}": scene}, audio={f"audio/{path}.mp3": scene})
