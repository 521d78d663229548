"""What weighs the heads of an adapted layer."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn


class TokenRouter(nn.Linear):
    """Softmax weights of the heads for each token. No bias; the softmax runs in float32 at least.

    With `top_k` the softmax is over the k largest logits and the other heads weigh 0. Under autocast the logits are
    computed in float32 too: rounded to bfloat16, a logit near 8 is off by up to 1/32 and its weight by 3 %.

    In training each logit gets normal noise of standard deviation `noise`.

    Shapes: x [..., in_features] -> [..., num_heads], rows summing to 1.
    """

    def __init__(self, in_features: int, num_heads: int, temperature: float, top_k: int | None = None, noise: float = 0.0):
        super().__init__(in_features, num_heads, bias=False)
        self.temperature = temperature
        self.top_k = top_k
        self.noise = noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.device)  # elsewhere only if the layers that share it lie on several devices
        if autocast_dtype(x.device.type) is None:
            return self.weigh(self._noisy(F.linear(x, weight)))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with autocast_off(x.device.type):
            return self.weigh(self._noisy(F.linear(x.to(dtype), weight.to(dtype))))

    def _noisy(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + self.noise * torch.randn_like(logits) if self.noise and self.training else logits

    def weigh(self, logits: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Weights of the logits R x, of the same shape, float32 or wider; the heads lie along `dim`."""
        if logits.dtype != torch.float32 and logits.dtype.itemsize < 4:
            logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k is not None:
            chosen = logits.topk(self.top_k, dim=dim)
            logits = torch.full_like(logits, -math.inf).scatter(dim, chosen.indices, chosen.values)
        return torch.softmax(logits, dim=dim)


class PrivateRouter(TokenRouter):
    """Weighs all heads but the first, which has weight 1: x [..., in_features] -> [..., num_heads], rows summing to 2."""

    def __init__(self, in_features: int, num_heads: int, *options, **named):
        super().__init__(in_features, num_heads - 1, *options, **named)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = super().forward(x)
        return torch.cat((torch.ones_like(weights[..., :1]), weights), -1)


class SharedRouter(nn.Module):
    """Stands in a layer for the router that another layer holds.

    The router is not a submodule here, so it is counted, moved, trained and saved once, by the layer that holds it. It
    is looked up there at every call, since FSDP may put a wrapper in its place.

    Args:
        held: the other layer's routers.
        name: of the adapter.
    """

    def __init__(self, held: nn.ModuleDict, name: str):
        super().__init__()
        self.__dict__["held"] = held
        self.name = name

    @property
    def router(self) -> nn.Module:
        return self.held._modules[self.name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.router(x)

    def extra_repr(self) -> str:
        return f"in_features={self.router.in_features}, out_features={self.router.out_features}"


class UniformRouter(nn.Module):
    """Equal weights for every token: x [..., in_features] -> [..., num_heads], all 1 / num_heads."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.full((*x.shape[:-1], self.num_heads), 1 / self.num_heads, dtype=dtype, device=x.device)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast makes of matrix products on this kind of device, or None where it is off or not known."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocast_off(device_type: str):
    """Context in which matrix products keep the dtypes they are given."""
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)
