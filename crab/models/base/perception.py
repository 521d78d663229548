"""Train the two encoders on dense targets, in the embedding space of the language model.

Captions alone teach encoders too little. Here each visual token is asked what stands in its quadrant (name, colour,
motion, emotion, position, box, and in which of its two frames), and each audio token what sounds during it. The
answers are scored by inner product with the word embeddings, ``logit(word) = <token, E[word]>``. So a word and what it
names share a direction, and the language model can select a thing by its name with the same attention that copies text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from crab.models import omni
from crab.models.base.optimize import MuonAdamW, warm_up_then_decay
from crab.world import render
from crab.world.scene import CLASSES, COLOURS, EMOTIONS, FACE, MOTIONS, QUADRANTS, SECONDS, SIZE, Scene

NOTHING = "nothing"
STEP = 8  # pixels per bin of a box edge
#: The words that a token can be asked for, by target.
WORDS = {
    "name": (*CLASSES, FACE, NOTHING),
    "colour": COLOURS,
    "motion": MOTIONS,
    "emotion": EMOTIONS,
    "row": ("top", "bottom"),
    "column": ("left", "right"),
    "modality": ("visible", "heard"),
    "bin": tuple(str(v) for v in range(0, SIZE + 1, STEP)),
    "second": tuple(str(v) for v in range(SECONDS)),
}
NAMES = WORDS["name"]


def visual_targets(scene: Scene, seconds: tuple[int, int]) -> dict[str, np.ndarray]:
    """What is in each quadrant of two frames; -100 where there is nothing to ask. A still is the same frame twice.

    Returns name, colour, motion, emotion [4], present [4, 2], and box [4, 2, 4] in bins of `STEP` pixels.
    """
    out = {key: np.full(4, omni.IGNORE) for key in ("colour", "motion", "emotion")}
    out |= {"name": np.full(4, NAMES.index(NOTHING)), "present": np.zeros((4, 2), np.float32)}
    out["box"] = np.full((4, 2, 4), omni.IGNORE)
    for thing in scene.visible:
        quadrant = QUADRANTS.index(thing.quadrant)
        shown = [frame for frame in (0, 1) if thing.seen_at(seconds[frame])]
        if not shown:
            continue
        moves = thing.motion if len(shown) == len(set(seconds)) == 2 else None  # one frame does not tell
        words = {"name": thing.name, "colour": thing.colour, "motion": moves, "emotion": thing.emotion}
        for key, word in words.items():
            if word is not None:
                out[key][quadrant] = WORDS[key].index(word)
        for frame in shown:
            out["present"][quadrant, frame] = 1
            out["box"][quadrant, frame] = np.asarray(thing.box(seconds[frame])) // STEP
    return out


def audio_targets(scene: Scene, tokens: int, only: int | None = None) -> dict[str, np.ndarray]:
    """What sounds during each token of the clip, or of the second ``only``; -100 where there is nothing to ask.

    Returns present [tokens, 9] for classes and the voice, emotion of the voice [tokens], and second [tokens]. Silence
    has its second too, so that it tells the time of what is seen beside it. One second alone does not tell its own.
    """
    present = np.zeros((tokens, len(CLASSES) + 1), np.float32)
    emotion = np.full(tokens, omni.IGNORE)
    for thing in scene.sounding:
        first, last = (round(s * tokens / SECONDS) for s in thing.sounding)
        if only is not None:
            first, last = 0, tokens * thing.heard_at(only)
        present[first:last, NAMES.index(thing.name)] = 1
        if thing.heard_emotion:
            emotion[first:last] = EMOTIONS.index(thing.heard_emotion)
    second = np.arange(tokens) * SECONDS // tokens if only is None else np.full(tokens, omni.IGNORE)
    return {"present": present, "emotion": emotion, "second": second}


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over the targets that are asked for; 0 if there is none, where the mean is not a number."""
    if not (target != omni.IGNORE).any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=omni.IGNORE)


class DenseHeads(nn.Module):
    """Reads dense targets from tokens by inner product with the word embeddings of the language model.

    These stay fixed: random directions, nearly orthogonal, to which video and sound both can align. If they were
    trained, they would drift away from the encoder that is trained first.
    """

    #: Factor of the logits of edges and presence. At 1 they take as much of a token as its words do. With a larger
    #: factor they need less of it, and the name stands out more.
    SHARPNESS = 4.0

    def __init__(self, embedding: nn.Embedding, word_id: Callable[[str], int]):
        super().__init__()
        self.embedding = embedding
        self.ids = {key: [word_id(word) for word in words] for key, words in WORDS.items()}
        width = embedding.embedding_dim
        self.edge = nn.Linear(width, 2 * 4 * width, bias=False)
        self.present = nn.Linear(width, 2)
        self.sound_bias = nn.Parameter(torch.full((len(CLASSES) + 1,), -2.0))

    def logits(self, tokens: torch.Tensor, key: str) -> torch.Tensor:
        """Scores of the words ``WORDS[key]``, [..., words]."""
        return tokens @ self.embedding.weight[torch.tensor(self.ids[key], device=tokens.device)].T

    def visual_loss(self, tokens: torch.Tensor, target: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of tokens [B, side * side, width] against a batch of `visual_targets`."""
        side = math.isqrt(tokens.shape[1])
        half = torch.arange(side) * 2 // side
        quadrant = (half[:, None] * 2 + half[None, :]).reshape(-1).to(tokens.device)
        at = {key: value[:, quadrant] for key, value in target.items()}
        something = at["name"] != NAMES.index(NOTHING)
        places = {"row": quadrant // 2, "column": quadrant % 2, "modality": torch.zeros_like(quadrant)}
        at |= {key: torch.where(something, value, omni.IGNORE) for key, value in places.items()}
        keys = ("name", "colour", "motion", "emotion", *places)
        loss = {key: cross_entropy(self.logits(tokens, key), at[key]) for key in keys}
        loss["present"] = F.binary_cross_entropy_with_logits(self.SHARPNESS * self.present(tokens), at["present"])
        edges = self.edge(tokens).view(*tokens.shape[:2], 2, 4, -1)[at["present"].bool()]
        loss["box"] = cross_entropy(self.SHARPNESS * self.logits(edges, "bin"), at["box"][at["present"].bool()])
        return loss

    def audio_loss(self, tokens: torch.Tensor, target: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of tokens [B, T, width] against a batch of `audio_targets`."""
        present = self.logits(tokens, "name")[..., :-1] + self.sound_bias
        heard = torch.where(target["present"].any(-1), WORDS["modality"].index("heard"), omni.IGNORE)
        return {
            "sound": F.binary_cross_entropy_with_logits(present, target["present"]) * 3,
            "modality": cross_entropy(self.logits(tokens, "modality"), heard),
            "second": cross_entropy(self.logits(tokens, "second"), target["second"]),
            "voice": cross_entropy(self.logits(tokens, "emotion"), target["emotion"]),
        }


class Batches(torch.utils.data.IterableDataset):
    """Batches that `sight` or `sound` renders when they are needed. ``scene_of`` gives the n-th of ``count`` scenes."""

    def __init__(self, render, processor, scene_of, count: int, size: int, steps: int, seeds: Sequence[int]):
        self.render, self.processor, self.scene_of, self.count = render, processor, scene_of, count
        self.size, self.steps, self.seeds = size, steps, seeds

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        rng = np.random.default_rng([*self.seeds, worker])
        for _ in range(self.steps // workers + (worker < self.steps % workers)):
            scenes = [self.scene_of(int(i)) for i in rng.integers(self.count, size=self.size)]
            inputs, targets = self.render(self.processor, scenes, rng)
            yield inputs, {key: torch.from_numpy(np.stack([target[key] for target in targets])) for key in targets[0]}


def sight(processor, scenes: list[Scene], rng: np.random.Generator):
    """Patches of two frames of each scene, and their targets. One pair in four is a still, as in the image slots."""
    seconds = rng.integers(0, SECONDS - 1, size=len(scenes))
    after = seconds + (rng.random(len(scenes)) >= 0.25)
    pairs = list(zip(seconds.tolist(), after.tolist(), strict=True))
    frames = [np.stack([render.frame(scene, s) for s in pair]) for scene, pair in zip(scenes, pairs, strict=True)]
    return processor.video_processor(frames), [visual_targets(x, pair) for x, pair in zip(scenes, pairs, strict=True)]


def sound(processor, scenes: list[Scene], rng: np.random.Generator):
    """Spectrograms of the scenes, and their targets. Three batches in ten are of one second, as in the image slots."""
    waves, only = [render.waveform(scene) for scene in scenes], [None] * len(scenes)
    if rng.random() < 0.3:
        only, rate = rng.integers(SECONDS, size=len(scenes)), omni.SAMPLE_RATE
        waves = [wave[s * rate : (s + 1) * rate] for wave, s in zip(waves, only, strict=True)]
    mel = log_mel(processor, waves)
    return mel, [audio_targets(scene, mel.shape[-1] // 4, s) for scene, s in zip(scenes, only, strict=True)]


def log_mel(processor, waves: list[np.ndarray]) -> torch.Tensor:
    """Log-mel spectrograms of waveforms of one length, without padding: [B, bins, frames]."""
    extractor = processor.feature_extractor
    mel = extractor(waves, sampling_rate=omni.SAMPLE_RATE, return_tensors="pt")["input_features"]
    return mel[..., : len(waves[0]) // extractor.hop_length]


def see(model, patches) -> torch.Tensor:
    """Visual tokens of videos of one size, from the video processor: [videos, time * rows * columns, width]."""
    pixels, grid = patches["pixel_values_videos"], patches["video_grid_thw"]
    out = model.get_video_features(pixels.to(model.device), grid.to(model.device), return_dict=True)
    return torch.stack(tuple(out.pooler_output))


def hear(model, mel: torch.Tensor) -> torch.Tensor:
    """Audio tokens of log-mel spectrograms [B, bins, frames]: [B, frames / 4, width]."""
    mel = mel.to(model.device)
    mask = torch.ones(mel.shape[0], mel.shape[2], dtype=torch.long, device=mel.device)
    out = model.get_audio_features(mel, mask, return_dict=True).last_hidden_state
    return out.view(mel.shape[0], -1, out.shape[-1])


class _LinearPatches(nn.Module):
    """A patch embedding as a matrix product: the backward of its convolution is five times slower on a CPU."""

    def __init__(self, convolution: nn.Conv3d):
        super().__init__()
        self.weight = convolution.weight  # the encoder reads its dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.flatten(1), self.weight.flatten(1))


def unit_words(model) -> nn.Embedding:
    """The embedding layer of a model, once all its words are of length 1: the space in which the encoders learn."""
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight.div_(embedding.weight.norm(dim=1, keepdim=True).clamp_min(1e-6))
    return embedding


def train_encoders(
    model, processor, scene_of: Callable[[int], Scene], count: int, plan: Mapping[str, Any], seed: int, workers: int = 1
) -> dict[str, list[dict[str, float]]]:
    """Train both encoders by ``plan`` (``base.encoders`` of params.yaml). Returns the losses of each step."""
    embedding = unit_words(model)
    heads = DenseHeads(embedding, processor.tokenizer.convert_tokens_to_ids).to(model.device)
    readers = [p for p in heads.parameters() if p is not embedding.weight]
    patches, curves = model.model.visual.patch_embed, {}
    convolution, patches.proj = patches.proj, _LinearPatches(patches.proj)
    for number, (name, encoder, draw, encode, loss) in enumerate(
        (
            ("visual", model.model.visual, sight, see, heads.visual_loss),
            ("audio", model.model.audio_tower, sound, hear, heads.audio_loss),
        )
    ):
        steps = plan[f"{name}_steps"]
        optimizer = MuonAdamW(encoder, readers, plan["learning_rate"], warm_up_then_decay(steps, steps // 20 or 1))
        batches = Batches(draw, processor, scene_of, count, plan["batch_size"], steps, (seed, number))
        ahead = 4 if workers else None
        loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=ahead)
        curves[name] = []
        for inputs, target in tqdm(loader, total=steps, desc=f"{name} encoder", mininterval=5):
            target = {key: value.to(model.device) for key, value in target.items()}
            losses = loss(encode(model, inputs), target)
            optimizer.step(sum(losses.values()))
            curves[name].append({key: value.item() for key, value in losses.items()})
    patches.proj = convolution
    return curves
