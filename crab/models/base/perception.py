"""Train the two encoders on dense targets, in the embedding space of the language model.

Captions alone teach encoders too little. Here each visual token is asked what stands in its quadrant (name, colour,
motion, emotion, position, box, and in which of its two frames), and each audio token what sounds during it. The
answers are scored by inner product with the word embeddings, ``logit(word) = <token, E[word]>``. So a word and what it
names share a direction, and the language model can select a thing by its name with the same attention that copies text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

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
PAIR = 2  # seconds (frames) that a temporal patch covers
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


def visual_targets(scene: Scene, second: int) -> dict[str, np.ndarray]:
    """What is in each quadrant during the two seconds from ``second``; -100 where there is nothing to ask.

    Returns:
        name, colour, motion, emotion [4]; present [4, 2]; box [4, 2, 4] in bins of `STEP` pixels.
    """
    out = {key: np.full(4, omni.IGNORE) for key in ("colour", "motion", "emotion")}
    out |= {"name": np.full(4, NAMES.index(NOTHING)), "present": np.zeros((4, PAIR), np.float32)}
    out["box"] = np.full((4, PAIR, 4), omni.IGNORE)
    for thing in scene.visible:
        quadrant = QUADRANTS.index(thing.quadrant)
        shown = [s for s in range(second, second + PAIR) if thing.seen_at(s)]
        if not shown:
            continue
        motion = thing.motion if len(shown) == PAIR else None  # one frame does not tell whether a thing moves
        words = {"name": thing.name, "colour": thing.colour, "motion": motion, "emotion": thing.emotion}
        for key, word in words.items():
            if word is not None:
                out[key][quadrant] = WORDS[key].index(word)
        for s in shown:
            out["present"][quadrant, s - second] = 1
            out["box"][quadrant, s - second] = np.asarray(thing.box(s)) // STEP
    return out


def audio_targets(scene: Scene, tokens: int) -> dict[str, np.ndarray]:
    """What sounds during each token: present [tokens, 9] for classes and the voice, emotion [tokens], second [tokens].

    Silence has its second too, so that it tells the time of what is seen beside it. Emotion is -100 without a voice.
    """
    present = np.zeros((tokens, len(CLASSES) + 1), np.float32)
    emotion = np.full(tokens, omni.IGNORE)
    for thing in scene.sounding:
        first, last = (round(s * tokens / SECONDS) for s in thing.sounding)
        present[first:last, NAMES.index(thing.name)] = 1
        if thing.heard_emotion:
            emotion[first:last] = EMOTIONS.index(thing.heard_emotion)
    return {"present": present, "emotion": emotion, "second": np.arange(tokens) * SECONDS // tokens}


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over the targets that are asked for; 0 if there is none, where the mean is not a number."""
    if not (target != omni.IGNORE).any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=omni.IGNORE)


class DenseHeads(nn.Module):
    """Reads dense targets from tokens by inner product with word embeddings.

    Args:
        embedding: of the language model. It stays fixed: random directions, nearly orthogonal, to which both video and
            sound can align. If it were trained, it would drift away from the encoder that is trained first.
        word_id: word -> row of the embedding.
        sharpness: factor of the logits of edges and presence. At 1 they would take as much of a token as its words do.
            With a larger factor they need less of it, and the name stands out more.
    """

    def __init__(self, embedding: nn.Embedding, word_id, sharpness: float = 4.0):
        super().__init__()
        self.embedding = embedding
        self.ids = {key: [word_id(word) for word in words] for key, words in WORDS.items()}
        width = embedding.embedding_dim
        self.sharpness = sharpness
        self.edge = nn.Linear(width, PAIR * 4 * width, bias=False)
        self.present = nn.Linear(width, PAIR)
        self.sound_bias = nn.Parameter(torch.full((len(CLASSES) + 1,), -2.0))

    def logits(self, tokens: torch.Tensor, key: str) -> torch.Tensor:
        """Scores of the words ``WORDS[key]``, [..., words]."""
        return tokens @ self.embedding.weight[torch.tensor(self.ids[key], device=tokens.device)].T

    def visual_loss(self, tokens: torch.Tensor, target: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of tokens [B, side * side, width] against a batch of `visual_targets` [B, 4, ...]."""
        cells, width = tokens.shape[1:]
        side = math.isqrt(cells)
        half = torch.arange(side) * 2 // side
        quadrant = (half[:, None] * 2 + half[None, :]).reshape(-1).to(tokens.device)
        at = {key: value[:, quadrant] for key, value in target.items()}
        something = at["name"] != NAMES.index(NOTHING)
        places = {"row": quadrant // 2, "column": quadrant % 2, "modality": torch.zeros_like(quadrant)}
        at |= {key: torch.where(something, value, omni.IGNORE) for key, value in places.items()}
        keys = ("name", "colour", "motion", "emotion", *places)
        loss = {key: cross_entropy(self.logits(tokens, key), at[key]) for key in keys}
        loss["present"] = F.binary_cross_entropy_with_logits(self.sharpness * self.present(tokens), at["present"])
        seen = at["present"].bool()
        edges = self.edge(tokens).view(*tokens.shape[:2], PAIR, 4, width)[seen]
        loss["box"] = cross_entropy(self.sharpness * self.logits(edges, "bin"), at["box"][seen])
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


class Views(torch.utils.data.IterableDataset):
    """Batches of dense training, rendered when they are needed.

    Args:
        scene_of: gives the n-th of ``count`` scenes.
        audio: yield spectrograms instead of pairs of frames.
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
        stills = rng.random(len(scenes)) < 0.25  # as in the image slots: a still repeats its only frame
        pairs, targets = [], []
        for scene, second, still in zip(scenes, seconds.tolist(), stills, strict=True):
            first = render.frame(scene, second)
            pairs.append(np.stack([first, first if still else render.frame(scene, second + 1)]))
            target = visual_targets(scene, second)
            if still:
                target["motion"][:] = omni.IGNORE
                target["present"][:, 1], target["box"][:, 1] = target["present"][:, 0], target["box"][:, 0]
                for key, nothing in (("name", NAMES.index(NOTHING)), ("colour", omni.IGNORE), ("emotion", omni.IGNORE)):
                    target[key] = np.where(target["present"][:, 0] > 0, target[key], nothing)
            targets.append(target)
        return self.processor.video_processor(pairs), _stack(targets)

    def sound(self, scenes, rng):
        waves = [render.waveform(scene) for scene in scenes]
        if rng.random() >= 0.3:
            mel = log_mel(self.processor, waves)
            return mel, _stack([audio_targets(scene, mel.shape[-1] // 4) for scene in scenes])
        # one second alone, as in the image slots; it does not tell which second it is
        seconds, rate = rng.integers(SECONDS, size=len(scenes)), omni.SAMPLE_RATE
        mel = log_mel(self.processor, [w[s * rate : (s + 1) * rate] for w, s in zip(waves, seconds, strict=True)])
        targets = []
        for scene, second in zip(scenes, seconds, strict=True):
            target = {key: value[[second]] for key, value in audio_targets(scene, SECONDS).items()}
            target["second"][:] = omni.IGNORE
            targets.append({key: np.repeat(value, mel.shape[-1] // 4, axis=0) for key, value in target.items()})
        return mel, _stack(targets)


def log_mel(processor, waves: list[np.ndarray]) -> torch.Tensor:
    """Log-mel spectrograms of waveforms of one length, without padding: [B, bins, frames]."""
    extractor = processor.feature_extractor
    mel = extractor(waves, sampling_rate=omni.SAMPLE_RATE, return_tensors="pt")["input_features"]
    return mel[..., : len(waves[0]) // extractor.hop_length]


def _stack(targets) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.stack([target[key] for target in targets])) for key in targets[0]}


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


def train_encoders(
    model,
    processor,
    scene_of,
    count: int,
    *,
    visual_steps: int,
    audio_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    workers: int = 1,
) -> dict[str, list[dict[str, float]]]:
    """Train both encoders on dense targets; word embeddings get length 1. Returns the losses of each step."""
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight.div_(embedding.weight.norm(dim=1, keepdim=True).clamp_min(1e-6))
    heads = DenseHeads(embedding, processor.tokenizer.convert_tokens_to_ids).to(model.device)
    curves = {}
    patches = model.model.visual.patch_embed
    convolution, patches.proj = patches.proj, _LinearPatches(patches.proj)
    for name, encoder, steps in (
        ("visual", model.model.visual, visual_steps),
        ("audio", model.model.audio_tower, audio_steps),
    ):
        readers = [p for p in heads.parameters() if p is not embedding.weight]
        optimizer = MuonAdamW(encoder, readers, learning_rate, warm_up_then_decay(steps, steps // 20 or 1))
        views = Views(scene_of, processor, count, batch_size, steps, name == "audio", seed)
        loader = torch.utils.data.DataLoader(
            views, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
        )
        curves[name] = []
        for inputs, target in tqdm(loader, total=steps, desc=f"{name} encoder", mininterval=5):
            target = {key: value.to(model.device) for key, value in target.items()}
            if name == "audio":
                losses = heads.audio_loss(hear(model, inputs), target)
            else:
                losses = heads.visual_loss(see(model, inputs), target)
            optimizer.step(sum(losses.values()))
            curves[name].append({key: value.item() for key, value in losses.items()})
    patches.proj = convolution
    return curves
