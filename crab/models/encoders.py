"""What a bridge sees and hears with: frozen encoders, their preprocessing, and the projectors behind them.

A *unit* is what becomes a fixed number of tokens: a frame, or a pair of frames where the encoder reads pairs, and a
second of sound. Encoders: CLIP, SigLIP and Whisper by their names on the hub, or those of a small base of this project.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as qwen
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from crab.data.media import RATE
from crab.models import small
from crab.models.checkpoint import load_base

PAIRED = "qwen2_5_omni_vision_encoder"
OWN_EAR = "qwen2_5_omni_audio_encoder"
_CLASSES = {PAIRED: qwen.Qwen2_5OmniVisionEncoder, OWN_EAR: qwen.Qwen2_5OmniAudioEncoder, "whisper": WhisperEncoder}
QFORMER_LAYERS = 2
HEARD = 10  # tokens of a second of sound that a Q-Former attends to


def build_encoder(config) -> nn.Module:
    """An encoder of this configuration with random weights."""
    known = _CLASSES.get(config.model_type)
    return known._from_config(config) if known else AutoModel.from_config(config)


def load_encoder(sense: str, source: str) -> tuple[nn.Module, object]:
    """The encoder of ``source``, and its preprocessing.

    Args:
        sense: ``vision`` or ``audio``. source: a name on the hub, or a folder: of a CLIP, SigLIP or Whisper model, or
            of a small base. ValueError, naming the parameter, if it cannot be read or is another kind of model.
    """
    place = f"base.bridge.{sense}"
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type.startswith("qwen2_5_omni"):
            model, processor = load_base(source)
            part = model.model.visual if sense == "vision" else model.model.audio_tower
            return part, processor.video_processor if sense == "vision" else processor.feature_extractor
        if sense == "audio" and config.model_type == "whisper":
            return WhisperModel.from_pretrained(source).get_encoder(), WhisperFeatureExtractor.from_pretrained(source)
        seen = getattr(config, "vision_config", config)
        if sense == "vision" and seen.model_type in ("clip_vision_model", "siglip_vision_model"):
            return AutoModel.from_pretrained(source, config=seen), AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:  # transformers raises the latter for a model that it does not know
        problem = str(error).splitlines()[0]
        raise ValueError(
            f"{place} is {source!r}, which cannot be read ({problem}); give the folder of a base under models/, a name "
            "on the model hub, or an absolute path"
        ) from error
    fits = "CLIP or SigLIP" if sense == "vision" else "Whisper"
    raise ValueError(f"{place} is {source!r}, a {config.model_type} model; give a {fits} model, or a small base")


class Projector(nn.Module):
    """From the tokens of a frozen encoder to a fixed number of tokens per unit, as wide as the language model.

    ``ends``, float [2, hidden], are the tokens before and after the units of one item.

    Args:
        kind: ``mlp`` takes each token through two layers, once `Eye` or `Ear` has averaged those of a part; ``qformer``
            has learned queries that attend to all of them first.
        width, hidden: of the encoder's tokens, and of the language model's. tokens: of a unit.
        words: how many of these come from the same part of a unit: its tokens are averaged to ``tokens / words``, and
            each of these becomes that many. Only for ``mlp``.
        size: root mean square of the numbers given out, at the start: that of word embeddings.
    """

    def __init__(self, kind: str, width: int, hidden: int, tokens: int, size: float = 1.0, words: int = 1):
        super().__init__()
        self.words = words if kind == "mlp" else 1
        self.parts, rest = divmod(tokens, self.words)
        if rest:
            raise ValueError(f"base.bridge: {tokens} tokens cannot be {words} words of each part; give a multiple")
        self.queries = None
        if kind == "qformer":
            heads = max(1, width // 64)
            config = Blip2QFormerConfig(
                hidden_size=width, intermediate_size=2 * width, num_hidden_layers=QFORMER_LAYERS, hidden_dropout_prob=0,
                num_attention_heads=heads, encoder_hidden_size=width, attention_probs_dropout_prob=0, vocab_size=1,
            )  # fmt: skip
            self.qformer = Blip2QFormerModel(config)
            self.queries = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, self.words * hidden),
            nn.Unflatten(-1, (self.words, hidden)), nn.RMSNorm(hidden), nn.Flatten(-3, -2),
        )  # fmt: skip
        self.ends = nn.Parameter(size * torch.randn(2, hidden))
        nn.init.constant_(self.layers[-2].weight, size)

    def forward(self, units: torch.Tensor) -> torch.Tensor:
        """[units, tokens of the encoder, width] to [units, tokens, hidden]."""
        if self.queries is not None:
            mask = torch.ones(units.shape[:2], device=units.device)
            queries = self.queries.expand(len(units), -1, -1)
            units = self.qformer(queries, encoder_hidden_states=units, encoder_attention_mask=mask).last_hidden_state
        return self.layers(units)

    def items(self, items: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Tokens of whole items, each [units, tokens of the encoder, width] to [2 + units * tokens, hidden]."""
        parts = self(torch.cat(list(items))).split([len(item) for item in items])
        return [torch.cat([self.ends[:1], part.flatten(0, 1), self.ends[1:]]) for part in parts]


class Eye(nn.Module):
    """A frozen visual encoder and its projector. A unit is a frame, or a pair of frames.

    ``config`` is that of the encoder. For ``kind``, ``hidden``, ``tokens``, ``size`` and ``words`` see `Projector`.
    """

    def __init__(self, config, kind: str, hidden: int, tokens: int, size: float, words: int = 1):
        super().__init__()
        self.tower, self.paired = build_encoder(config), config.model_type == PAIRED
        self.pooled = kind == "mlp"
        self.projector = Projector(
            kind, config.out_hidden_size if self.paired else config.hidden_size, hidden, tokens, size, words
        )
        parts = self.projector.parts
        if self.pooled and math.isqrt(parts) ** 2 != parts:
            raise ValueError(
                f"base.bridge.picture_tokens is {tokens}: with {words} words for each place these are {parts} places, "
                f"which is no square; give {words} times 1, 4, 9, ..."
            )

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens of the encoder for units [U, ...]: [U, tokens, width], already averaged for a plain projector."""
        if self.paired:
            units, patches = pixels.shape[:2]
            grid = torch.tensor([[1, math.isqrt(patches), math.isqrt(patches)]] * units, device=pixels.device)
            out = self.tower(pixels.flatten(0, 1), grid_thw=grid, return_dict=True).pooler_output
            seen = (torch.cat(tuple(out)) if isinstance(out, tuple | list) else out).unflatten(0, (units, -1))
        else:
            seen = self.tower(pixel_values=pixels).last_hidden_state
            side = math.isqrt(seen.shape[1])
            seen = seen[:, seen.shape[1] - side**2 :]  # without the token of the whole picture
        if not self.pooled or seen.shape[1] == self.projector.parts:
            return seen
        side, few = math.isqrt(seen.shape[1]), math.isqrt(self.projector.parts)
        grid = seen.transpose(1, 2).unflatten(2, (side, side))
        return F.adaptive_avg_pool2d(grid, few).flatten(2).transpose(1, 2)


class Ear(nn.Module):
    """A frozen audio encoder and its projector. A unit is a second, begun or whole. Arguments as for `Eye`."""

    def __init__(self, config, kind: str, hidden: int, tokens: int, size: float, words: int = 1):
        super().__init__()
        self.tower, self.own = build_encoder(config), config.model_type == OWN_EAR
        self.pooled = kind == "mlp"
        self.projector = Projector(kind, config.output_dim if self.own else config.d_model, hidden, tokens, size, words)

    def hear(self, mel: torch.Tensor, frames: Sequence[int], seconds: Sequence[int]) -> list[torch.Tensor]:
        """Tokens of the encoder for each sound, [seconds, tokens, width].

        ``mel`` are spectrograms [B, bins, frames], ``frames`` those of each that are no padding, ``seconds`` those of
        each.
        """
        if self.own:
            flat = torch.cat([one[:, :count] for one, count in zip(mel, frames, strict=True)], 1)
            lengths = torch.tensor(list(frames), device=mel.device)
            after, out_lengths = self.tower._get_feat_extract_output_lengths(lengths)
            out = self.tower(flat, feature_lens=lengths, aftercnn_lens=after).last_hidden_state
            parts = list(out.split(out_lengths.tolist()))
        else:
            out = self.tower(mel).last_hidden_state
            parts = [one[: -(-count * out.shape[1] // mel.shape[2])] for one, count in zip(out, frames, strict=True)]
        wanted = self.projector.parts if self.pooled else HEARD
        return [
            F.adaptive_avg_pool1d(part.T[None], count * wanted)[0].T.unflatten(0, (count, wanted))
            for part, count in zip(parts, seconds, strict=True)
        ]


def pixels_of(preprocess, frames: np.ndarray) -> torch.Tensor:
    """What an `Eye` reads of frames uint8 [T, H, W, 3]: one row per unit."""
    if isinstance(preprocess, small.FrameVideoProcessor):
        patches, (count, *_) = preprocess.patchify(frames)
        return torch.from_numpy(np.ascontiguousarray(patches)).unflatten(0, (count, -1))
    return preprocess(list(frames), return_tensors="pt")["pixel_values"]


def spectrogram(preprocess, wave: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What an `Ear` reads of a sound [samples] at 16 kHz: spectrogram [bins, frames], and its mask [frames]."""
    out = preprocess(wave, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
    return out["input_features"][0], out["attention_mask"][0]


def save_preprocessing(folder: str | Path, images, sounds) -> None:
    """Write both preprocessings to a folder."""
    if isinstance(images, small.FrameVideoProcessor):
        images = small.image_processor(images.side, images.patch_size, images.merge_size)
    images.save_pretrained(Path(folder) / "pictures")
    sounds.save_pretrained(Path(folder) / "sounds")


def load_preprocessing(folder: str | Path, paired: bool) -> tuple[object, WhisperFeatureExtractor]:
    """What `save_preprocessing` wrote. ``paired``: the visual encoder is that of a small base."""
    images = AutoImageProcessor.from_pretrained(Path(folder) / "pictures")
    if paired:
        images = small.video_processor(images)
    return images, WhisperFeatureExtractor.from_pretrained(Path(folder) / "sounds")
