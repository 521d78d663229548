"""What one training process takes: parameters, GPU memory and operations, from the configuration of the base alone.

The model is built on the meta device, without weights. What autograd keeps for backward is counted operation by
operation; tests compare it with what small models keep.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig

from crab import tasks
from crab.core.files import read_json
from crab.models import checkpoint
from crab.models.protocol import AudioVisualModel, model_of
from crab.study.train import adapted
from crab.tasks.registry import MEDIA

GIB = 2**30
SIDE = 224  # of the pictures that a published base sees, pixels
CONTEXT = 1.5 * GIB  # per process: the CUDA context, communication buffers, and gaps between blocks of memory
TOWERS = ("language_model", "visual", "audio_tower")
_BLOCK = re.compile(rf"({'|'.join(TOWERS)})\.(?:model\.)?(?:layers|blocks)\.0\.(.+)\.i?lora_A\.")


class Tower(NamedTuple):
    """A stack of alike blocks. Widths are in numbers per token. ``weights`` are the parameters of all blocks."""

    layers: int
    width: int
    keys: int  # of the keys, and of the values
    wide: int  # inside the MLP
    gated: bool  # whether the MLP has a gate
    weights: int


def towers_of(model) -> dict[str, Tower]:
    """The towers of a model, by name."""
    text, sight, sound = model.config.get_text_config(), model.config.vision_config, model.config.audio_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sizes = {
        "language_model": (text.hidden_size, head * text.num_key_value_heads, text.intermediate_size),
        "visual": (sight.hidden_size, sight.hidden_size, sight.intermediate_size),
        "audio_tower": (sound.d_model, sound.d_model, sound.encoder_ffn_dim),
    }
    towers = {}
    for name, (width, keys, wide) in sizes.items():
        blocks = next(
            part for path, part in model.named_modules()
            if isinstance(part, nn.ModuleList) and name in path.split(".") and path.endswith(("layers", "blocks"))
        )  # fmt: skip
        gated = any(path.endswith("gate_proj") for path, _ in blocks[0].named_modules())
        towers[name] = Tower(len(blocks), width, keys, wide, gated, _count(blocks))
    return towers


def _count(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())


class Adapter(NamedTuple):
    """An adapter on the base: its parameters, PEFT's config, and by tower the width of each input in one block."""

    parameters: int
    config: Any
    inputs: dict[str, dict[str, int]]


@dataclass(frozen=True, eq=False)
class Base:
    """The configuration of a base. ``side``: of its pictures, pixels. ``size``: bytes of a weight on the GPU."""

    config: PreTrainedConfig
    side: int = SIDE
    size: int = 4
    note: str = ""

    @cached_property
    def _module(self) -> AudioVisualModel:
        return model_of(self.config)

    @cached_property
    def _model(self) -> nn.Module:
        with torch.device("meta"):
            return self._module.build(self.config)

    @cached_property
    def parameters(self) -> int:
        return _count(self._model)

    @property
    def width(self) -> int:
        """Of its features."""
        return self.config.get_text_config().hidden_size

    @cached_property
    def towers(self) -> dict[str, Tower]:
        return towers_of(self._model)

    def adapter(self, method: str, options: Mapping[str, Any]) -> Adapter:
        """What `crab.study.train.adapted` adds to this base. ValueError on an option that the method does not have."""
        return _adapter(self, method, json.dumps(options, sort_keys=True))

    def media_tokens(self, slot: str, seconds: float) -> tuple[int, int]:
        """Tokens of the pictures and of the sounds in the prompt of a sample; ``seconds`` are those of one sound."""
        return self._module.media_tokens(self.config, self.side, *_media(slot), seconds)

    def encoder_tokens(self, slot: str, seconds: float) -> tuple[int, int]:
        """Tokens that the layers of the visual and of the audio encoder read for a sample."""
        return self._module.encoder_tokens(self.config, self.side, *_media(slot), seconds)


def _media(slot: str) -> tuple[list[str], int]:
    """The kinds of the media of a sample, and how many frames a video has."""
    entry = tasks.get_slot(slot)
    return [kind for kind, _ in MEDIA[entry.media]], entry.frames


@cache
def _adapter(base: Base, method: str, options: str) -> Adapter:
    with torch.device("meta"):
        model = adapted(base._module.build(base.config), method, json.loads(options))
    inputs: dict[str, dict[str, int]] = {name: {} for name in base.towers}
    for name, parameter in model.named_parameters():
        if match := _BLOCK.search(name):
            inputs[match[1]][match[2]] = parameter.shape[1]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Adapter(trained, model.peft_config["default"], inputs)


def read_base(path: str | Path) -> Base:
    """The configuration of a base: a folder, or a checkpoint by its name. Nothing else is read.

    ValueError if it cannot be read.
    """
    published = checkpoint.resolve(path) or (None if Path(path).is_dir() else str(path))
    try:
        config, note = model_of(path).read_config(published or str(path))
    except OSError as error:
        problem = str(error).splitlines()[0]
        raise ValueError(
            f"base: the configuration of {path} cannot be read ({problem}); run the base stage, or set "
            "base.checkpoint to a name or folder that can be read"
        ) from None
    if note:
        return Base(config, SIDE, 2, note)
    folders = Path(published or path), Path(path) / "pictures"  # a bridge has a folder for them
    files = (each for folder in folders if (each := folder / "preprocessor_config.json").is_file())
    largest = next((read_json(file).get("size", {}).get("longest_edge") for file in files), None)
    return Base(config, min(SIDE, math.isqrt(largest or SIDE**2)), 2 if published else 4)


def block_bytes(tower: Tower, adapter: Adapter, name: str, samples: int, length: int, product: int, weight: int,
                modules: bool = False) -> float:  # fmt: skip
    """Bytes that autograd keeps of one block for backward, on ``samples`` of ``length`` tokens.

    Args:
        name: of the tower. product, weight: bytes of a number in matrix products, and of a weight.
        modules: I-LoRA runs as modules, not as one function, as it does where weights are sharded.
    """
    config, inputs, b = adapter.config, adapter.inputs[name], product
    heads = getattr(config, "num_heads", 0)  # none in LoRA
    modules = bool(heads) and (modules or config.router_input != "token")
    masked = name == "language_model" and samples > 1  # several samples are padded; then keys are repeated by head
    kept = 2 * 4 * tower.width  # the inputs of both norms, in float32
    kept += b * 2 * (tower.width + (tower.width if masked else tower.keys))  # attention: q, k, v and its output
    kept += b * tower.wide * (3 if tower.gated else 1)  # gate, silu(gate) and up, or the input of gelu
    if b == 2 and (weight == 4 or modules or not heads) or config.lora_dropout and not heads:
        kept += sum(inputs.values()) * (b + 4 * (modules and b == 2))  # each layer casts or drops its input for itself
    else:  # layers share the tensor that they read; that of o_proj is kept by attention
        kept += b * sum({
            key if key.endswith("down_proj") else key.rpartition(".")[0]: size
            for key, size in inputs.items() if not key.endswith("o_proj")
        }.values())  # fmt: skip
    kept += sum(inputs.values()) * (config.lora_dropout > 0)  # a mask, one byte each
    wide = heads * config.r
    kept += len(inputs) * (b * (config.r if not heads or config.shared_A else wide) + 4 * heads + b * wide * modules)
    copies = 2 * tower.weights / tower.layers if weight == 4 and b == 2 else 0  # weights, cast
    return samples * length * kept + b * samples * length**2 * masked + copies


def memory(
    base: Base, adapter: Adapter, samples: int, length: int, answer: int, encoded: tuple[int, int] = (0, 0), *,
    precision: str, checkpointing: bool, processes: int = 1, stage: int = 0,
) -> dict[str, float]:  # fmt: skip
    """GPU memory of one process in training at its peak, in bytes, by what takes it.

    Args:
        samples: that a process takes at once. length: tokens of the longest one, ``answer`` of its answer, and
            ``encoded`` those that the encoders read (`Base.encoder_tokens`), which count if these are adapted.
        precision, checkpointing: of params.yaml. processes: that train together. stage: what ZeRO spreads over
            them: with 1 the moments of AdamW, with 2 gradients too, with 3 (and FSDP) weights too; 0 for DDP.
    """
    text, vocabulary = base.towers["language_model"], base.config.get_text_config().vocab_size
    b = 2 if precision == "bf16" else base.size
    kept, again = 4.0 * samples * length * text.width, 0.0  # the input of the last norm
    for (name, tower), tokens in zip(base.towers.items(), (length, *encoded), strict=True):
        if adapter.inputs[name]:
            block = block_bytes(tower, adapter, name, samples, tokens, b, base.size, processes > 1 and stage == 3)
            # in backward: gradients of two tensors inside the MLP, or the float32 ones of a norm
            work = samples * tokens * max(2 * b * tower.wide, 5 * 4 * tower.width)
            if checkpointing:  # keeps the input of each block; one block at a time is computed again
                kept += tower.layers * samples * tokens * tower.width * base.size
                work += block
            else:
                kept += tower.layers * block
            again = max(again, work)
    share = [processes if stage >= level else 1 for level in (1, 2, 3)]  # of moments, gradients, weights
    size = 4 * adapter.parameters  # in float32
    weights = base.size * base.parameters
    if share[2] > 1:  # the embeddings, the head and two blocks are gathered at a time
        weights = weights / processes + base.size * 2 * (text.width * vocabulary + text.weights / text.layers)
    loss = max(3 * 4 * samples * answer * vocabulary - again, 0)  # log-probabilities and two gradients, in float32
    # The step of AdamW takes its size once more, but when activations are free.
    step = max(size / share[0] - kept - again - loss, 0)
    return {
        "weights": weights,
        "adapter": size / share[2],
        "gradients": size / share[1] + size * (processes > 1 and stage == 0),  # DDP adds them up in buckets
        "optimizer": 2 * size / share[0] + step,
        "activations": kept + again,
        "logits": loss,
        "context": CONTEXT,
    }


def flops(
    base: Base, adapter: Adapter, length: float, answer: float, encoded: tuple[float, float] = (0, 0), *,
    checkpointing: bool,
) -> float:  # fmt: skip
    """Operations of one training sample. The arguments are those of `memory`; ``encoded`` if the encoders run.

    A frozen weight takes 4 per token (forward, gradient of its input), a trained one 6; checkpointing adds 2.
    """
    text = base.towers["language_model"]
    again = 2 * checkpointing
    attention = (12 + 2 * again) * text.layers * text.width * length
    total = length * ((4 + again) * text.weights + (6 + again) * adapter.parameters + attention)
    total += 4 * answer * text.width * base.config.get_text_config().vocab_size
    seen, heard = ((4 if adapter.inputs[name] else 2) * base.towers[name].weights for name in TOWERS[1:])
    return total + seen * encoded[0] + heard * encoded[1]
