"""Fit the projectors of a bridge to words, before its language model reads them.

What stands in a scene is known. So a token of a picture is first fitted to the mean embedding of the words for what
stands in its part of the picture, and a token of sound to that of the words for what sounds then, and when. It takes
seconds, since no language model runs. Alignment starts from there, not from noise.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from crab.models.base.perception import NAMES, NOTHING, WORDS, audio_targets, visual_targets
from crab.models.protocol import IGNORE
from crab.world.scene import SECONDS, Scene

KEYS = ("name", "colour", "motion", "emotion", "second")
VOCABULARY = tuple(word for key in KEYS for word in WORDS[key])
FIRST = {key: VOCABULARY.index(WORDS[key][0]) for key in KEYS}
BATCH, RATE = 64, 2e-3  # units per step; the highest learning rate
SAMPLE = 4096  # units from which the size of a target is measured


def picture_words(scene: Scene, seconds: tuple[int, int], tokens: int) -> torch.Tensor:
    """The share of each word of `VOCABULARY` in the tokens of a unit that shows two frames, float [tokens, words]."""
    at, cells = visual_targets(scene, seconds), torch.zeros(4, len(VOCABULARY))
    for key in KEYS[:4]:
        _mark(cells, key, at[key])
    cells /= cells.sum(1, keepdim=True)
    side = math.isqrt(tokens)
    if side**2 != tokens:  # queries have no place in the picture: each takes a part of the four quadrants
        return F.adaptive_avg_pool1d(cells.T, tokens).T
    return F.adaptive_avg_pool2d(cells.T.unflatten(1, (2, 2)), side).flatten(1).T


def sound_words(scene: Scene, seconds: int, tokens: int, only: int | None = None) -> torch.Tensor:
    """As `picture_words`, for the sound of a clip, or of its second ``only``: float [seconds, tokens, words]."""
    at, parts = audio_targets(scene, seconds * tokens, only), torch.zeros(seconds * tokens, len(VOCABULARY))
    present = torch.from_numpy(at["present"])
    parts[:, FIRST["name"] : FIRST["name"] + present.shape[1]] = present
    parts[~present.any(1), FIRST["name"] + NAMES.index(NOTHING)] = 1
    for key in ("emotion", "second"):
        _mark(parts, key, at[key])
    return (parts / parts.sum(1, keepdim=True)).unflatten(0, (seconds, tokens))


def _mark(shares: torch.Tensor, key: str, target: np.ndarray) -> None:
    """Put a 1 at the word of ``key`` in each row that has one."""
    rows = np.flatnonzero(target != IGNORE)
    shares[rows, FIRST[key] + target[rows]] = 1


def words_of(bank) -> dict[str, torch.Tensor]:
    """The shares of words in all tokens of a bank, by kind of media: float [N, units, tokens, words]."""
    tokens = {kind: values.shape[1:3] for kind, values in bank.tokens.items()}  # units, and tokens of a unit
    step = SECONDS // tokens["video"][0]
    shares: dict[str, list[torch.Tensor]] = {kind: [] for kind in tokens}
    for scene, second in zip(bank.scenes, map(int, bank.seconds), strict=True):
        pairs = [(first, first + step - 1) for first in range(0, SECONDS, step)]
        shares["video"].append(torch.stack([picture_words(scene, pair, tokens["video"][1]) for pair in pairs]))
        shares["image"].append(picture_words(scene, (second, second), tokens["image"][1])[None])
        shares["audio"].append(sound_words(scene, SECONDS, tokens["audio"][1]))
        shares["second"].append(sound_words(scene, 1, tokens["second"][1], second))
    return {kind: torch.stack(values) for kind, values in shares.items()}


def fit(model, tokenizer, bank, steps: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Fit both projectors to the words of the scenes of a bank, by AdamW.

    A target is the mean embedding of its words, with its distance from the centre of all embeddings scaled to their
    size: means lie closer to the centre than the embeddings that the language model knows.

    Returns the loss of each step, by projector: the mean squared error over the mean square of an embedding.
    """
    weight = model.get_input_embeddings().weight.detach().float()
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in VOCABULARY]
    centre, size = weight.mean(0), weight.pow(2).mean()
    table = torch.stack([weight[one].mean(0) for one in ids]) - centre
    shares, curves = words_of(bank), {}
    for name, part, kinds in (
        ("visual", model.visual, ("video", "image")),
        ("audio", model.audio_tower, ("audio", "second")),
    ):
        units = torch.cat([bank.tokens[kind].flatten(0, 1) for kind in kinds])
        words = torch.cat([shares[kind].flatten(0, 1) for kind in kinds]).to(table)
        scale = (size / (words[:SAMPLE] @ table).pow(2).mean()).sqrt()
        optimizer = torch.optim.AdamW(part.projector.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        generator, losses = torch.Generator().manual_seed(seed), []
        for _ in range(steps):
            chosen = torch.randint(len(units), (BATCH,), generator=generator)
            target = centre + scale * (words[chosen] @ table)
            loss = (part.projector(units[chosen].to(table)) - target).pow(2).mean() / size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        curves[name] = {"words": losses}
    return curves
