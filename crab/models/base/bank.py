"""Scenes that the frozen encoders have seen once, so that the language model can be asked about them many times."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from crab.data import media
from crab.models import omni
from crab.models.base import perception
from crab.world import render
from crab.world.scene import SECONDS, Scene


class Bank:
    """Encoded scenes. ``through_files`` writes each clip as mp4, jpg and mp3 and reads it back, as samples are.

    Attributes:
        tokens: features by kind, float16 [N, tokens, width]: ``video`` and ``audio`` of the whole clip, ``image`` and
            ``second`` (its sound) of one second.
        seconds, sources: which second that is, and how many things are both seen and heard in it, [N].
    """

    def __init__(self, model, processor, scenes: list[Scene], seed: int, workers: int = 0, through_files: bool = False):
        self.scenes = scenes
        both = lambda scene, s: sum(t.seen_at(s) and t.heard_at(s) for t in scene.things)  # noqa: E731
        sources = np.array([[both(scene, s) for s in range(SECONDS)] for scene in scenes])
        rng = np.random.default_rng(seed)
        any_second = rng.integers(SECONDS, size=len(scenes))
        self.seconds = np.where(rng.random(len(scenes)) < 0.5, any_second, sources.argmax(1))  # the most to ask about
        self.sources = np.take_along_axis(sources, self.seconds[:, None], 1)[:, 0]
        model.eval()
        with torch.no_grad():
            self.tokens = self._encoded(model, processor, through_files, workers)

    def _encoded(self, model, processor, through_files: bool, workers: int) -> dict[str, torch.Tensor]:
        clips = Clips(processor, self.scenes, self.seconds, through_files)
        loader = torch.utils.data.DataLoader(clips, batch_size=16, num_workers=workers, collate_fn=_join)
        parts: dict[str, list[torch.Tensor]] = {k: [] for k in ("video", "audio", "image", "second")}
        for patches, index, mel, mel_of_second in tqdm(loader, desc="encoding scenes", mininterval=5):
            tokens = perception.see(model, patches).half()[index]  # [B, pairs + 1, cells, width]
            parts["video"].append(tokens[:, :-1].flatten(1, 2))
            parts["image"].append(tokens[:, -1])
            parts["audio"].append(perception.hear(model, mel).half())
            parts["second"].append(perception.hear(model, mel_of_second).half())
        return {kind: torch.cat(values) for kind, values in parts.items()}


class Clips(torch.utils.data.Dataset):
    """What the encoders read of each scene: pairs of frames, which pair stands where, and two spectrograms."""

    def __init__(self, processor, scenes, seconds, through_files):
        self.processor, self.scenes, self.seconds, self.through_files = processor, scenes, seconds, through_files

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i: int):
        scene, second, rate = self.scenes[i], int(self.seconds[i]), omni.SAMPLE_RATE
        pairs = [(s, s + 1) for s in range(0, SECONDS, 2)] + [(second, second)]
        if self.through_files:
            clip, still, wave = round_trip(scene, second)
            index = list(range(len(pairs)))
            clips = [*(clip[[a, b]] for a, b in pairs[:-1]), np.stack([still, still])]
        else:  # pairs of frames that look the same are rendered once
            looks = [tuple((t.seen_at(s), s % 2) for t in scene.things for s in pair) for pair in pairs]
            unique = sorted(set(looks))
            index = [unique.index(look) for look in looks]
            clips = [np.stack([render.frame(scene, s) for s in pairs[looks.index(look)]]) for look in unique]
            wave = render.waveform(scene)
        mel = perception.log_mel(self.processor, [wave])
        mel_of_second = perception.log_mel(self.processor, [wave[second * rate : (second + 1) * rate]])
        return self.processor.video_processor(clips), index, mel, mel_of_second


def round_trip(scene: Scene, second: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ten frames, one still and the sound of a scene, written to files and read back."""
    with tempfile.TemporaryDirectory() as folder:
        video, image, sound = (Path(folder) / name for name in ("clip.mp4", "still.jpg", "sound.mp3"))
        media.write_video(video, render.frames(scene), render.FPS)
        media.write_image(image, render.frame(scene, second))
        media.write_audio(sound, render.waveform(scene))
        return media.read_video(video, SECONDS)[0], media.read_image(image), media.read_audio(sound)


def _join(items):
    patches, index, mel, mel_of_second = zip(*items, strict=True)
    first = np.cumsum([0, *(len(p["video_grid_thw"]) for p in patches[:-1])])
    joined = {name: torch.cat([p[name] for p in patches]) for name in patches[0]}
    return joined, torch.tensor(index) + torch.tensor(first)[:, None], torch.cat(mel), torch.cat(mel_of_second)
