"""Telling routers that read the mean-pooled instruction which tokens it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .layer import ILoraLayer


class _Instruction:
    """Which tokens are the instruction, and the weights each layer drew from them, for the passes of `generate`."""

    def __init__(self, mask: torch.Tensor):
        self.mask = mask
        self._kept: dict[tuple[int, str], torch.Tensor] = {}

    def weights(self, layer: ILoraLayer, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Routing weights [batch, 1, heads] for the layer's input x [batch, tokens, in]."""
        key = (id(layer), adapter_name)
        if x.dim() == 3 and x.shape[:2] == self.mask.shape:
            # sums over a long instruction are beyond float16, and its length has more digits than bfloat16
            wide = torch.promote_types(x.dtype, torch.float32)
            mask = self.mask.to(x.device, wide).unsqueeze(-1)
            mean = (x.to(wide) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            weights = layer.ilora_router[adapter_name](mean.to(x.dtype))
            if not torch.is_grad_enabled():
                self._kept[key] = weights
            return weights
        if x.dim() == 3 and x.shape[1] == 1 and not torch.is_grad_enabled() and key in self._kept:
            if self._kept[key].shape[0] == x.shape[0]:
                return self._kept[key]
        raise ValueError(f"instruction_tokens: a layer was given an input {list(x.shape)}, but the mask is for [batch, "
                         f"tokens] = {list(self.mask.shape)}. Give the mask of this very batch (repeated for each beam), "
                         "and target only modules that see the whole sequence, not the encoders. Generation must use the "
                         "cache and read one new token a pass: not use_cache=False, prompt_lookup_num_tokens or an assistant "
                         "model.")


@contextmanager
def instruction_tokens(model: nn.Module, mask: torch.Tensor) -> Iterator[None]:
    """Tell routers with router_input='instruction' which tokens of the batch to read while the block runs.

    Under `generate` the weights found for the prompt serve the new tokens too, as long as each later pass reads one token
    against the cache: `use_cache=False`, `prompt_lookup_num_tokens` and assistant models raise. Under gradient
    checkpointing run the backward pass inside the block as well, since it computes the layers again. Routers that read
    each token are not affected.

    Args:
        model: a PEFT model, or any module holding I-LoRA layers.
        mask: bool [batch, tokens], True on the instruction; at least one token a sample, at least two columns.

    Raises:
        ValueError: the mask is not so, or (inside the block) does not fit the batch.
    """
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] < 2:
        raise ValueError("instruction_tokens: `mask` must be bool [batch, tokens] with at least two tokens, got "
                         f"{mask.dtype} {list(mask.shape)}.")
    if not mask.any(1).all():
        raise ValueError("instruction_tokens: each sample needs at least one instruction token; samples "
                         f"{(~mask.any(1)).nonzero().flatten().tolist()} have none.")
    layers = [module for module in model.modules() if isinstance(module, ILoraLayer)]
    before = [layer.instruction for layer in layers]
    instruction = _Instruction(mask)
    try:
        for layer in layers:
            layer.instruction = instruction
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.instruction = value
