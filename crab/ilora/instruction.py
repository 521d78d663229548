"""Routers that read the mean of the instruction: which tokens are the instruction."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .adapters import ilora_layers, replaced
from .layer import ILoraLayer


class _Instruction:
    """The mask, and the weights of each layer, which later passes of `generate` use again."""

    def __init__(self, mask: torch.Tensor):
        self.mask = mask
        self._prompt: dict[tuple[int, str], torch.Tensor] = {}

    def weights(self, layer: ILoraLayer, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Routing weights [batch, 1, heads] for the input x [batch, tokens, in] of the layer."""
        key = (id(layer), adapter_name)
        if x.dim() == 3 and x.shape[:2] == self.mask.shape:
            # a sum over a long instruction overflows float16, and bfloat16 cannot hold its length
            wide = torch.promote_types(x.dtype, torch.float32)
            mask = self.mask.to(x.device, wide).unsqueeze(-1)
            mean = (x.to(wide) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            weights = layer.ilora_router[adapter_name](mean.to(x.dtype))
            if not torch.is_grad_enabled():
                self._prompt[key] = weights
            return weights
        if x.dim() == 3 and x.shape[1] == 1 and not torch.is_grad_enabled() and key in self._prompt:
            if self._prompt[key].shape[0] == x.shape[0]:
                return self._prompt[key]
        raise ValueError(
            f"instruction_tokens: a layer reads {list(x.shape)}, but `mask` is {list(self.mask.shape)}. Give the mask "
            "of this batch (repeated for each beam), and do not adapt the encoders. generate must read one new token "
            "per pass: not use_cache=False, prompt_lookup_num_tokens or an assistant model."
        )


@contextmanager
def instruction_tokens(model: nn.Module, mask: torch.Tensor) -> Iterator[None]:
    """Tell routers with router_input='instruction' which tokens to read, while the block runs.

    `mask` is bool [batch, tokens], True on the instruction; ValueError if it is not, or does not fit the batch. Under
    `generate` the weights of the prompt serve the new tokens too. With gradient checkpointing, run the backward pass in
    the block too, since it computes the layers again.
    """
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] < 2:
        kind = f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"instruction_tokens: `mask` must be bool [batch, tokens], at least two tokens, got {kind}.")
    if not mask.any(1).all():
        empty = (~mask.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"instruction_tokens: `mask` has no token of the samples {empty}; mark at least one of each.")
    with replaced("instruction", dict.fromkeys(ilora_layers(model).values(), _Instruction(mask))):
        yield
