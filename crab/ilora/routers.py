"""Routers: they give the weights of the heads of an adapted layer."""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn


class TokenRouter(nn.Linear):
    """A softmax over the (k largest) logits of each token: x [..., in_features] -> [..., num_heads], without a bias.

    The softmax runs in float32 or wider, and so do the logits under autocast: in bfloat16 a logit near 8 is wrong by up
    to 1/32, and its weight by 3%.
    """

    def __init__(self, in_features: int, num_heads: int, temperature: float, top_k: int | None = None):
        super().__init__(in_features, num_heads, bias=False)
        self.temperature = temperature
        self.top_k = top_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.device)  # on another device only if layers of several devices share it
        if autocast_dtype(x.device.type) is None:
            return self.weigh(F.linear(x, weight))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with autocast_off(x.device.type):
            return self.weigh(F.linear(x.to(dtype), weight.to(dtype)))

    def weigh(self, logits: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Weights of the logits R x, in the same shape. The heads are along `dim`."""
        if logits.dtype != torch.float32 and logits.dtype.itemsize < 4:
            logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k is not None:
            largest = logits.topk(self.top_k, dim=dim)
            logits = torch.full_like(logits, -math.inf).scatter(dim, largest.indices, largest.values)
        return torch.softmax(logits, dim=dim)


class SharedRouter(nn.Module):
    """The router `name` among the `routers` of another layer. Only that layer counts, moves, trains and saves it.

    It is looked up in each call, because FSDP may replace it by a wrapper.
    """

    def __init__(self, routers: nn.ModuleDict, name: str):
        super().__init__()
        self.__dict__["routers"] = routers  # not a submodule
        self.name = name

    @property
    def router(self) -> nn.Module:
        return self.routers._modules[self.name]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.router(x)


class UniformRouter(nn.Module):
    """Equal weights for all heads: x [..., in_features] -> [..., num_heads], each 1 / num_heads."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.full((*x.shape[:-1], self.num_heads), 1 / self.num_heads, dtype=dtype, device=x.device)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of matrix products under autocast on this kind of device. None if autocast is off or not known."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocast_off(device_type: str):
    """A context in which matrix products keep the dtypes of their inputs."""
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)
