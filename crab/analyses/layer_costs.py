"""What one adapted linear layer costs, in time and in memory.

Five contenders share one frozen layer: it alone, PEFT's LoRA at rank r and at rank N * r, the published formulation as
a loop over its N heads, and I-LoRA as `crab.ilora` runs it.
"""

import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from crab.analyses.timing import formats, interleaved, quartiles, ratio
from crab.ilora import ILoraConfig

BASE, LORA, WIDE, LOOP, ILORA = "frozen base", "LoRA, rank r", "LoRA, rank N·r", "loop over heads", "I-LoRA"


class HeadLoop(nn.Module):
    """The published formulation, head after head: ``W x + alpha / r * sum_i softmax(R x)_i B_i A x``.

    Shapes: x [..., in] -> [..., out].
    """

    def __init__(self, base: nn.Linear, rank: int, heads: int, alpha: float):
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        self.A = nn.Linear(base.in_features, rank, bias=False)
        self.R = nn.Linear(base.in_features, heads, bias=False)
        self.B = nn.ModuleList(nn.Linear(rank, base.out_features, bias=False) for _ in range(heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, z = self.base(x), self.A(x)
        weights = self.scaling * torch.softmax(self.R(x), dim=-1, dtype=torch.float32).to(x.dtype)
        for i, B in enumerate(self.B):
            y = y + weights[..., i : i + 1] * B(z)
        return y


def layers(point: Mapping[str, int], dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """The contenders over one frozen layer, with random weights: it alone, LoRA, wide LoRA, the loop, I-LoRA."""
    torch.manual_seed(0)
    base = nn.Linear(point["width_in"], point["width_out"], bias=False, device=device, dtype=dtype)
    base.requires_grad_(False)
    r, heads = point["rank"], point["heads"]

    def adapted_layer(config) -> nn.Module:
        return inject_adapter_in_model(config, nn.Sequential(OrderedDict(layer=base))).layer

    def lora(rank: int) -> nn.Module:
        return adapted_layer(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"], init_lora_weights=False))

    ilora = ILoraConfig(r=r, lora_alpha=2 * r, num_heads=heads, target_modules=["layer"], init_weights=False)
    loop = HeadLoop(base, r, heads, 2 * r).to(device, dtype)
    return {BASE: base, LORA: lora(r), WIDE: lora(heads * r), LOOP: loop, ILORA: adapted_layer(ilora)}


def kept_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a layer keeps from forward to backward, without its own weights. A storage counts once."""
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)  # alive until the sum is made; otherwise its storages are handed out again
    assert y.requires_grad
    return sum(kept.values())


def peak_bytes(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> int:
    """Most bytes that one forward and backward hold at a time, beyond what was there before. Gradients count.

    On the CPU it is the sum of torch's own allocations, as the profiler sees them; scratch space inside the matrix
    library is mostly not seen.
    """
    if x.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layer(x).backward(grad)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            layer(x).backward(grad)
        events = record.profiler.kineto_results.events()  # in order of time; freed memory counts negative
        peak = int(np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"]).max())
    _forget(layer, x)
    return peak


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what native code writes to standard error: the profiler announces itself there, in the notebook's page."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w", encoding="utf-8") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _forget(layer: nn.Module, x: torch.Tensor) -> None:
    x.grad = None
    layer.zero_grad(set_to_none=True)


def layer_costs(points: Sequence[Mapping[str, Any]], dtypes: Sequence[str], seconds: float) -> pd.DataFrame:
    """Time and memory of the contenders at each point, on the CPU and, if there is one, on the GPU.

    Args:
        points: dicts of ``varied`` (what the point belongs to: shape, heads, rank or tokens), ``width_in``,
            ``width_out``, ``rank``, ``tokens`` and ``heads``.

    Returns:
        One row per point, number format and contender: seconds of forward and backward with quartiles; ``over_lora``
        and ``over_base``, ratios of times with 95% intervals; ``kept_bytes`` and ``peak_bytes``.
    """
    rows = []
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for dtype in formats(dtypes, device):
            for point in points:
                rows += _layer_rows(point, getattr(torch, dtype), device, seconds)
    return pd.DataFrame(rows)


def _layer_rows(point: Mapping[str, Any], dtype: torch.dtype, device: str, seconds: float) -> list[dict]:
    contenders = layers(point, dtype, device)
    x = torch.randn(point["tokens"], point["width_in"], device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(point["tokens"], point["width_out"], device=device, dtype=dtype)

    def step(layer: nn.Module, _: int) -> Iterator[None]:
        layer(x).backward(grad)
        yield
        _forget(layer, x)

    times = interleaved({name: partial(step, layer) for name, layer in contenders.items()}, seconds, device)
    times = {name: parts[0] for name, parts in times.items()}
    rows = []
    for name, layer in contenders.items():
        row = {"device": device, "dtype": str(dtype).removeprefix("torch."), **point, "contender": name}
        row |= quartiles(times[name])
        for column, other in (("over_lora", LORA), ("over_base", BASE)):
            value, low, high = ratio(times[name], times[other]).values()
            row |= {column: value, f"{column}_low": low, f"{column}_high": high}
        rows.append(row | {"kept_bytes": kept_bytes(layer, x), "peak_bytes": peak_bytes(layer, x, grad)})
    return rows
