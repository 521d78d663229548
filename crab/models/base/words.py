"""Fit the projectors of a bridge to words, before its language model reads them.

What stands in a scene is known. So the tokens of a part of a picture are first fitted to the embeddings of the words
for what stands there, such as *red swaying bell*, and those of a part of a sound to *bell drum 3*: what sounds then,
and in which second. No language model runs, so it takes a minute. Alignment starts from there, not from noise.

One word for each token is best: a language model that was never trained on such tokens reads a row of words, but not
their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from crab.models.base.perception import NAMES, NOTHING, WORDS, audio_targets, visual_targets
from crab.models.protocol import IGNORE
from crab.world.scene import QUADRANTS, SECONDS, Scene

VOCABULARY = tuple(word for key in ("name", "colour", "motion", "emotion", "second") for word in WORDS[key])
BATCH, RATE = 64, 2e-3  # units per step; the highest learning rate


def picture_words(scene: Scene, seconds: tuple[int, int], parts: int, words: int) -> torch.Tensor:
    """The share of each word of `VOCABULARY` in each token of a unit that shows two frames.

    Returns float [parts * words, vocabulary]. In a square of parts each has its place in the picture; other numbers of
    parts, such as queries, share the quadrants in order.
    """
    at = visual_targets(scene, seconds)
    word = lambda key, i: WORDS[key][at[key][i]] if at[key][i] != IGNORE else None  # noqa: E731
    cells = torch.stack([
        _shares([[word("colour", i)], [word("emotion", i) or word("motion", i)], [word("name", i)]], words)
        for i in range(len(QUADRANTS))
    ])  # fmt: skip
    side, flat = math.isqrt(parts), cells.flatten(1).T
    if side**2 == parts:
        flat = F.adaptive_avg_pool2d(flat.unflatten(1, (2, 2)), side).flatten(1)
    else:
        flat = F.adaptive_avg_pool1d(flat, parts)
    return flat.T.unflatten(1, (words, -1)).flatten(0, 1)


def sound_words(scene: Scene, seconds: int, parts: int, words: int, only: int | None = None) -> torch.Tensor:
    """As `picture_words`, for the sound of a clip, or of its second ``only``: [seconds, parts * words, vocabulary]."""
    at, tokens = audio_targets(scene, seconds * parts, only), []
    for present, emotion, second in zip(at["present"], at["emotion"], at["second"], strict=True):
        names = [NAMES[i] for i in np.flatnonzero(present)] or [NOTHING]
        felt = [WORDS["emotion"][emotion]] if emotion != IGNORE else []
        first, *others = [*names, *felt]
        tokens.append(_shares([[first], others, [WORDS["second"][second]] if second != IGNORE else []], words))
    return torch.stack(tokens).unflatten(0, (seconds, parts)).flatten(1, 2)


def _shares(facts: Sequence[Sequence[str | None]], words: int) -> torch.Tensor:
    """Facts in as many tokens, float [words, vocabulary]. A fact that is not there is *nothing* if it is all of one."""
    shares = torch.zeros(words, len(VOCABULARY))
    for token, group in zip(shares, np.array_split(np.arange(len(facts)), words), strict=True):
        for word in [word for i in group for word in facts[i] if word] or [NOTHING]:
            token[VOCABULARY.index(word)] = 1
    return shares / shares.sum(1, keepdim=True)


def words_of(model, bank) -> dict[str, torch.Tensor]:
    """The shares of words in all tokens of a bank, by kind of media: float [N, units, tokens, vocabulary]."""
    seen, heard = ((part.projector.parts, part.projector.words) for part in (model.visual, model.audio_tower))
    step = SECONDS // bank.tokens["video"].shape[1]  # seconds of a unit
    shares: dict[str, list[torch.Tensor]] = {kind: [] for kind in bank.tokens}
    for scene, second in zip(bank.scenes, map(int, bank.seconds), strict=True):
        pairs = [(first, first + step - 1) for first in range(0, SECONDS, step)]
        shares["video"].append(torch.stack([picture_words(scene, pair, *seen) for pair in pairs]))
        shares["image"].append(picture_words(scene, (second, second), *seen)[None])
        shares["audio"].append(sound_words(scene, SECONDS, *heard))
        shares["second"].append(sound_words(scene, 1, *heard, second))
    return {kind: torch.stack(values) for kind, values in shares.items()}


def table(model, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """The centre of all embeddings [hidden], and by how much each word of `VOCABULARY` differs from it.

    A word of several tokens is their mean.
    """
    weight = model.get_input_embeddings().weight.detach().float()
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in VOCABULARY]
    centre = weight.mean(0)
    return centre, torch.stack([weight[one].mean(0) for one in ids]) - centre


def fit(model, tokenizer, bank, steps: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Fit both projectors to the words of the scenes of a bank, by AdamW.

    Returns the loss of each step, by projector: the mean squared error over the mean square of an embedding.
    """
    (centre, words), shares, curves = table(model, tokenizer), words_of(model, bank), {}
    size = model.get_input_embeddings().weight.detach().float().pow(2).mean()
    senses = {"visual": (model.visual, ("video", "image")), "audio": (model.audio_tower, ("audio", "second"))}
    for name, (part, kinds) in senses.items():
        units = torch.cat([bank.tokens[kind].flatten(0, 1) for kind in kinds])
        targets = torch.cat([shares[kind].flatten(0, 1) for kind in kinds]).to(words)
        optimizer = torch.optim.AdamW(part.projector.requires_grad_(True).parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        generator, losses = torch.Generator().manual_seed(seed), []
        for _ in range(steps):
            chosen = torch.randint(len(units), (BATCH,), generator=generator)
            loss = (part.projector(units[chosen].to(words)) - centre - targets[chosen] @ words).pow(2).mean() / size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        curves[name] = {"words": losses}
    return curves


@torch.no_grad()
def accuracy(model, tokenizer, bank) -> dict[str, dict[str, float | None]]:
    """How often a token is nearest to the word that it should be, of all words, by sense.

    Tokens that should be *nothing*, or several words at once, are not asked; a sense without others has no entry.
    Numbers as of `crab.models.base.curriculum.probe_accuracy`.
    """
    (centre, words), shares, gates = table(model, tokenizer), words_of(model, bank), {}
    senses = {"words seen": (model.visual, "video"), "words heard": (model.audio_tower, "audio")}
    for name, (part, kind) in senses.items():
        projected = part.projector(bank.tokens[kind].flatten(0, 1).to(words)).flatten(0, 1) - centre
        targets = shares[kind].flatten(0, 2)
        asked = (targets.max(1).values == 1) & (targets[:, VOCABULARY.index(NOTHING)] == 0)
        if not asked.any():
            continue
        truth = targets[asked].argmax(1)
        nearest = (F.normalize(projected[asked], dim=1) @ F.normalize(words, dim=1).T).argmax(1).cpu()
        right, most = (nearest == truth).float().mean().item(), truth.bincount().max().item() / len(truth)
        gates[name] = {"accuracy": right, "majority": most, "picker": None, "n": len(truth)}
    return gates
