"""Scenes encoded once by the frozen encoders, for the language model to be asked about again and again."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from crab.data import media
from crab.world import render
from crab.world.scene import SECONDS, Scene
from crab.models import omni
from crab.models.base import perception


class Bank:
    """Scenes encoded once: ``video`` [N, V, width], ``audio`` [N, A, width], and for one second of
    each (``seconds`` [N]; ``sources`` [N]: how many things are then seen and heard) ``image`` [N, I, width] and
    ``second`` (its sound) [N, S, width], in half precision.

    Args:
        through_files: write each clip as mp4, jpg and sound and read it back, as the data's samples are.
    """

    def __init__(
        self, model, processor, scenes: list[Scene], seed: int, workers: int = 0, batch: int = 16, through_files: bool = False
    ):
        self.scenes = scenes
        sources = _sources(scenes)
        self.seconds = _moments(sources, np.random.default_rng(seed))
        self.sources = np.take_along_axis(sources, self.seconds[:, None], 1)[:, 0]
        views = _SceneMedia(processor, scenes, self.seconds, through_files)
        loader = torch.utils.data.DataLoader(views, batch, num_workers=workers, collate_fn=_join)
        parts: dict[str, list[torch.Tensor]] = {k: [] for k in ("video", "audio", "image", "second")}
        model.eval()
        with torch.no_grad():
            for patches, index, mel, window in tqdm(loader, desc="encoding scenes", mininterval=5):
                tokens = perception.see(model, patches).half()[index]  # [B, pairs + 1, cells, width]
                parts["video"].append(tokens[:, :-1].flatten(1, 2))
                parts["image"].append(tokens[:, -1])
                parts["audio"].append(perception.hear(model, mel).half())
                parts["second"].append(perception.hear(model, window).half())
        self.tokens = {k: torch.cat(v) for k, v in parts.items()}


def _sources(scenes: list[Scene]) -> np.ndarray:
    """How many things are both seen and heard in each second, [N, seconds]."""
    return np.array([[sum(t.seen_at(s) and t.heard_at(s) for t in scene.things) for s in range(SECONDS)] for scene in scenes])


def _moments(sources: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One second of each scene: any, or one time in two that of which stills have most to ask, [N]."""
    any_second = rng.integers(SECONDS, size=len(sources))
    return np.where(rng.random(len(sources)) < 0.5, any_second, sources.argmax(1))


class _SceneMedia(torch.utils.data.Dataset):
    """What the encoders take of each scene; equal pairs of frames are prepared once."""

    def __init__(self, processor, scenes, seconds, through_files):
        self.processor, self.scenes, self.seconds, self.through_files = processor, scenes, seconds, through_files

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i: int):
        scene, second, rate = self.scenes[i], int(self.seconds[i]), omni.SAMPLE_RATE
        pairs = [(s, s + 1) for s in range(0, SECONDS, 2)] + [(second, second)]
        if self.through_files:
            clip, still, wave = _round_trip(scene, second)
            look = list(range(len(pairs)))
            clips = [*(clip[[a, b]] for a, b in pairs[:-1]), np.stack([still, still])]
        else:
            looks = [tuple((t.seen_at(s), s % 2) for t in scene.things for s in pair) for pair in pairs]
            unique = sorted(set(looks))
            look = [unique.index(v) for v in looks]
            clips = [np.stack([render.frame(scene, s) for s in pairs[looks.index(u)]]) for u in unique]
            wave = render.waveform(scene)
        mel = perception.log_mel(self.processor, [wave])
        window = perception.log_mel(self.processor, [wave[second * rate : (second + 1) * rate]])
        return self.processor.video_processor(clips), look, mel, window


def _round_trip(scene: Scene, second: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ten frames, one still and the sound of a scene as the data's files give them back."""
    with tempfile.TemporaryDirectory() as folder:
        video, image, sound = (Path(folder) / name for name in ("clip.mp4", "still.jpg", "sound.mp3"))
        media.write_video(video, render.frames(scene), render.FPS)
        media.write_image(image, render.frame(scene, second))
        media.write_audio(sound, render.waveform(scene))
        return media.read_video(video, SECONDS)[0], media.read_image(image), media.read_audio(sound)


def _join(items):
    patches, index, mel, window = zip(*items, strict=True)
    counts = np.cumsum([0, *(len(p["video_grid_thw"]) for p in patches)])
    index = torch.tensor([[first + i for i in own] for first, own in zip(counts, index)])
    joined = {k: torch.cat([p[k] for p in patches]) for k in patches[0]}
    return joined, index, torch.cat(mel), torch.cat(window)
