"""Train the two encoders on dense targets, in the language model's own embedding space.

Captions alone teach encoders too little. Here every visual token is asked what stands in its
quadrant (name, colour, motion, expression, position, box, and in which of its two frames), and
every audio token what sounds during it. The answers are scored by inner product with the language
model's word embeddings, ``logit(word) = <token, E[word]>``, so that a word and what it
names share a direction: the language model can then select a thing by its name with the attention
that also copies text.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from crab.world import render
from crab.world.scene import CLASSES, COLOURS, EMOTIONS, FACE, MOTIONS, QUADRANTS, SECONDS, SIZE, Scene
from crab.models import omni
from crab.models.base.optimize import MuonAdamW, warm_up_then_decay

NOTHING = "nothing"
NAMES = (*CLASSES, FACE, NOTHING)
SIDES = (("top", "bottom"), ("left", "right"))
BINS = tuple(str(v) for v in range(0, SIZE + 1, 8))
PAIR = 2  # seconds (frames) a temporal patch covers


def visual_targets(scene: Scene, second: int) -> dict[str, np.ndarray]:
    """What is in each quadrant during two seconds from ``second``; -100 where there is nothing to say.

    Returns:
        name, colour, motion, emotion [4]; present [4, 2]; box [4, 2, 4] in bins of 8 pixels.
    """
    out = {k: np.full(4, omni.IGNORE) for k in ("colour", "motion", "emotion")}
    out |= {"name": np.full(4, NAMES.index(NOTHING)), "present": np.zeros((4, PAIR), np.float32)}
    out["box"] = np.full((4, PAIR, 4), omni.IGNORE)
    for thing in scene.visible:
        q = QUADRANTS.index(thing.quadrant)
        at = [s for s in range(second, second + PAIR) if thing.seen_at(s)]
        if not at:
            continue
        out["name"][q] = NAMES.index(thing.name)
        out["colour"][q] = COLOURS.index(thing.colour)
        # Whether a thing moves shows only when both frames hold it.
        out["motion"][q] = MOTIONS.index(thing.motion) if len(at) == PAIR else omni.IGNORE
        out["emotion"][q] = EMOTIONS.index(thing.emotion) if thing.emotion else omni.IGNORE
        for s in at:
            out["present"][q, s - second] = 1
            out["box"][q, s - second] = np.asarray(thing.box(s)) // 8
    return out


def audio_targets(scene: Scene, tokens: int) -> dict[str, np.ndarray]:
    """Sound events a token: present [tokens, 9] for classes and the voice, emotion [tokens], second [tokens].

    Silence has its second too, so that it tells when what is seen beside it happens. Emotion is -100 where no voice sounds.
    """
    present = np.zeros((tokens, len(CLASSES) + 1), np.float32)
    emotion = np.full(tokens, omni.IGNORE)
    for thing in scene.sounding:
        first, last = (round(s * tokens / SECONDS) for s in thing.sounding)
        present[first:last, NAMES.index(thing.name)] = 1
        if thing.heard_emotion:
            emotion[first:last] = EMOTIONS.index(thing.heard_emotion)
    second = np.arange(tokens) * SECONDS // tokens
    return {"present": present, "emotion": emotion, "second": second}


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over targets that say something; 0 where none does, of which the mean would not be a number."""
    if not (target != omni.IGNORE).any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=omni.IGNORE)


class DenseHeads(nn.Module):
    """Read dense targets off tokens by inner product with word embeddings.

    Args:
        embedding: the language model's embedding. It stays as it is: random directions, nearly
            orthogonal, which sight and sound can both align to; trained along, it would drift away
            from whichever was trained first.
        word_id: maps a word to its row.
        sharpness: of edges and presence. At 1 they would take as much of a token as its words do; the
            sharper they are read, the less of it they need, and the more its name stands out.
    """

    def __init__(self, embedding: nn.Embedding, word_id, sharpness: float = 4.0):
        super().__init__()
        self.embedding = embedding
        self.ids = {
            "name": [word_id(w) for w in NAMES],
            "colour": [word_id(w) for w in COLOURS],
            "motion": [word_id(w) for w in MOTIONS],
            "emotion": [word_id(w) for w in EMOTIONS],
            "row": [word_id(w) for w in SIDES[0]],
            "column": [word_id(w) for w in SIDES[1]],
            "modality": [word_id("visible"), word_id("heard")],
            "bin": [word_id(w) for w in BINS],
            "second": [word_id(str(s)) for s in range(SECONDS)],
        }
        width = embedding.embedding_dim
        self.sharpness = sharpness
        self.edge = nn.Linear(width, PAIR * 4 * width, bias=False)
        self.present = nn.Linear(width, PAIR)
        self.sound_bias = nn.Parameter(torch.full((len(CLASSES) + 1,), -2.0))

    def logits(self, tokens: torch.Tensor, words: str) -> torch.Tensor:
        rows = self.embedding.weight[torch.tensor(self.ids[words], device=tokens.device)]
        return tokens @ rows.T

    def visual_loss(self, tokens: torch.Tensor, target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of tokens [B, side * side, width] against :func:`visual_targets` batched to [B, 4, ...]."""
        B, cells, width = tokens.shape
        side = math.isqrt(cells)
        half = torch.arange(side) * 2 // side
        quadrant = (half[:, None] * 2 + half[None, :]).reshape(-1).to(tokens.device)
        flat = tokens
        at = {k: v[:, quadrant] for k, v in target.items()}
        loss = {k: cross_entropy(self.logits(flat, k), at[k]) for k in ("name", "colour", "motion", "emotion")}
        some = at["name"] != NAMES.index(NOTHING)
        silent = torch.full_like(some, omni.IGNORE, dtype=torch.long)
        loss["row"] = cross_entropy(self.logits(flat, "row"), torch.where(some, (quadrant // 2).expand(B, -1), silent))
        loss["column"] = cross_entropy(self.logits(flat, "column"), torch.where(some, (quadrant % 2).expand(B, -1), silent))
        loss["modality"] = cross_entropy(self.logits(flat, "modality"), torch.where(some, torch.zeros_like(silent), silent))
        loss["present"] = F.binary_cross_entropy_with_logits(self.sharpness * self.present(flat), at["present"])
        seen = at["present"].bool()
        edges = self.edge(flat).view(B, cells, PAIR, 4, width)[seen]
        loss["box"] = cross_entropy(self.sharpness * self.logits(edges, "bin"), at["box"][seen])
        return loss

    def audio_loss(self, tokens: torch.Tensor, target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of tokens [B, T, width] against :func:`audio_targets` batched."""
        present = self.logits(tokens, "name")[..., :-1] + self.sound_bias
        loss = {"sound": F.binary_cross_entropy_with_logits(present, target["present"]) * 3}
        some = target["present"].any(-1)
        heard = torch.where(some, torch.ones_like(target["emotion"]), torch.full_like(target["emotion"], omni.IGNORE))
        loss["modality"] = cross_entropy(self.logits(tokens, "modality"), heard)
        loss["second"] = cross_entropy(self.logits(tokens, "second"), target["second"])
        loss["voice"] = cross_entropy(self.logits(tokens, "emotion"), target["emotion"])
        return loss


class Views(torch.utils.data.IterableDataset):
    """Endless dense training batches rendered on the fly.

    Args:
        scene_of: gives the n-th scene.
        audio: yield sound (waveforms) instead of sight (pairs of frames).
    """

    def __init__(self, scene_of, processor, count: int, batch: int, steps: int, audio: bool, seed: int):
        self.scene_of, self.processor, self.count, self.batch = scene_of, processor, count, batch
        self.steps, self.audio, self.seed = steps, audio, seed

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        rng = np.random.default_rng([self.seed, self.audio, worker])
        for _ in range(self.steps // workers + (worker < self.steps % workers)):
            scenes = [self.scene_of(int(i)) for i in rng.integers(self.count, size=self.batch)]
            yield self.sound(scenes, rng) if self.audio else self.sight(scenes, rng)

    def sight(self, scenes, rng):
        seconds = rng.integers(0, SECONDS - 1, size=len(scenes))
        # Some frames stand alone, as in the image slots: a still repeats its one frame.
        still = rng.random(len(scenes)) < 0.25
        pairs, targets = [], []
        for scene, s, alone in zip(scenes, seconds.tolist(), still, strict=True):
            first = render.frame(scene, s)
            pairs.append(np.stack([first, first if alone else render.frame(scene, s + 1)]))
            target = visual_targets(scene, s)
            if alone:
                target["motion"][:] = omni.IGNORE
                target["present"][:, 1], target["box"][:, 1] = target["present"][:, 0], target["box"][:, 0]
                for key in ("name", "colour", "emotion"):
                    nothing = NAMES.index(NOTHING) if key == "name" else omni.IGNORE
                    target[key] = np.where(target["present"][:, 0] > 0, target[key], nothing)
            targets.append(target)
        return self.processor.video_processor(pairs), stack(targets)

    def sound(self, scenes, rng):
        waves = [render.waveform(s) for s in scenes]
        if rng.random() < 0.3:  # one second alone, as the image slots hear it
            seconds = rng.integers(SECONDS, size=len(scenes))
            targets = [{k: v[s : s + 1] for k, v in audio_targets(x, SECONDS).items()} for x, s in zip(scenes, seconds)]
            for target in targets:
                target["second"][:] = omni.IGNORE  # a lone second does not tell which it is
            rate = omni.SAMPLE_RATE
            mel = log_mel(self.processor, [w[s * rate : (s + 1) * rate] for w, s in zip(waves, seconds)])
            tokens = mel.shape[-1] // 4
            return mel, stack([{k: np.repeat(v, tokens, axis=0) for k, v in t.items()} for t in targets])
        mel = log_mel(self.processor, waves)
        return mel, stack([audio_targets(s, mel.shape[-1] // 4) for s in scenes])


def log_mel(processor, waves: list[np.ndarray]) -> torch.Tensor:
    """Log-mel spectrograms of equally long waveforms, without padding: [B, bins, frames]."""
    extractor = processor.feature_extractor
    mel = extractor(waves, sampling_rate=omni.SAMPLE_RATE, return_tensors="pt")["input_features"]
    return mel[..., : len(waves[0]) // extractor.hop_length]


def stack(targets) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(np.stack([t[k] for t in targets])) for k in targets[0]}


def see(model, patches) -> torch.Tensor:
    """Visual tokens of equally large videos from the video processor: [videos, time * rows * columns, width]."""
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
    """A patch embedding as the matrix product that it is: its convolution's backward is five times slower on a CPU."""

    def __init__(self, convolution: nn.Conv3d):
        super().__init__()
        self.convolution = convolution
        self.weight = convolution.weight  # the tower asks for its dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.flatten(1), self.weight.flatten(1))


def train_encoders(model, processor, scene_of, count: int, *, visual_steps: int, audio_steps: int, batch_size: int,
                   learning_rate: float, seed: int, workers: int = 1) -> dict[str, list[dict[str, float]]]:
    """Train vision and audio tower on dense targets, word embeddings set to length 1; returns the loss curves."""
    word_id = processor.tokenizer.convert_tokens_to_ids
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight.div_(embedding.weight.norm(dim=1, keepdim=True).clamp_min(1e-6))
    heads = DenseHeads(embedding, word_id).to(model.device)
    curves = {}
    embed = model.model.visual.patch_embed
    convolution, embed.proj = embed.proj, _LinearPatches(embed.proj)
    jobs = (("visual", model.model.visual, visual_steps, False), ("audio", model.model.audio_tower, audio_steps, True))
    for label, tower, steps, audio in jobs:
        read_out = [p for p in heads.parameters() if p is not embedding.weight]
        optimizer = MuonAdamW(tower, read_out, learning_rate, warm_up_then_decay(steps, steps // 20 or 1, 0.6))
        data = Views(scene_of, processor, count, batch_size, steps, audio, seed)
        loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
        curve = []
        for inputs, target in tqdm(loader, total=steps, desc=f"{label} encoder", mininterval=5):
            target = {k: v.to(model.device) for k, v in target.items()}
            if audio:
                losses = heads.audio_loss(hear(model, inputs), target)
            else:
                losses = heads.visual_loss(see(model, inputs), target)
            optimizer.step(sum(losses.values()))
            curve.append({k: v.item() for k, v in losses.items()})
        curves[label] = curve
    embed.proj = convolution
    return curves
