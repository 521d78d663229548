"""What one adapted linear layer costs: time, memory kept for backward, and the roofline of both.

Five variants work on one and the same frozen base: it alone, PEFT's LoRA at rank r and at rank N * r, the published
formulation as a loop over its N heads, and I-LoRA as `crab.ilora` runs it.
"""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from crab.ilora import ILoraConfig
from crab.study.benchmark import RATIO, estimate, formats, interleaved, quartiles, quotient, quotient_without

BASE, LORA, WIDE, LOOP, ILORA = "frozen base", "LoRA, rank r", "LoRA, rank N·r", "loop over heads", "I-LoRA"
VARIANTS = (BASE, LORA, WIDE, LOOP, ILORA)
_COPY = "copy"  # of a tensor as large as the output: the memory's speed at this size

RATIOS = {
    "ilora_over_lora": quotient(ILORA, LORA),
    "ilora_over_wide_lora": quotient(ILORA, WIDE),
    "loop_over_lora": quotient(LOOP, LORA),
    "loop_over_ilora_alone": quotient_without(BASE, LOOP, ILORA),
}


class Point(NamedTuple):
    """Sizes at which the variants are compared. `sweep` is what is being varied: shape, heads, rank or tokens."""

    sweep: str
    width_in: int
    width_out: int
    rank: int
    tokens: int
    heads: int

    @property
    def where(self) -> str:
        return f"{self.width_in} to {self.width_out}, {self.tokens} tokens, r {self.rank}, N {self.heads}"


def points(shapes: Sequence[Sequence[int]], sweep: Mapping[str, Any], heads: int = 3) -> list[Point]:
    """All points: each shape [in, out, rank, tokens] with `heads`, and from ``sweep["at"]`` one size varied at a time."""
    found = [Point("shape", *shape, heads) for shape in shapes]
    start = Point("", *sweep["at"], heads)
    for name, field in (("heads", "heads"), ("rank", "rank"), ("tokens", "tokens")):
        found += [start._replace(sweep=name, **{field: value}) for value in sweep[name]]
    return found


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


def variants(point: Point, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """The five layers over one base, all weights of `dtype`, random also where training would start from zero."""
    torch.manual_seed(0)
    base = nn.Linear(point.width_in, point.width_out, bias=False, device=device, dtype=dtype).requires_grad_(False)

    def adapted(config) -> nn.Module:
        return inject_adapter_in_model(config, nn.Sequential(OrderedDict(layer=base))).layer

    def lora(rank: int) -> nn.Module:
        return adapted(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"], init_lora_weights=False))

    r, heads = point.rank, point.heads
    ilora = ILoraConfig(r=r, lora_alpha=2 * r, num_heads=heads, target_modules=["layer"], init_weights=False)
    loop = HeadLoop(base, r, heads, 2 * r).to(device, dtype)
    return {BASE: base, LORA: lora(r), WIDE: lora(heads * r), LOOP: loop, ILORA: adapted(ilora)}


def kept_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes that the layer keeps from forward to backward, its own weights left out; a storage counts once."""
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)  # alive until the sum is made, or its storages would be handed out again
    assert y.requires_grad
    return sum(kept.values())


def peak_bytes(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> int:
    """Most bytes that one forward and backward hold at a time beyond what was there before; gradients count.

    On the CPU it is summed over torch's own allocations, as the profiler saw them; what a library takes for itself
    (a matrix product's packed copies, say) is not among them, but where it takes it from torch: oneDNN does, for bfloat16
    on processors that have that.
    """
    if x.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layer(x).backward(grad)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            layer(x).backward(grad)
        events = seen.profiler.kineto_results.events()  # in the order of time; what was freed counts negative
        held = np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"])
        peak = int(held.max())
    _forget(layer, x)
    return peak


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what native code writes to standard error: the profiler announces itself there, into a notebook's page."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _forget(layer: nn.Module, x: torch.Tensor) -> None:
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None


def operations(variant: str, point: Point) -> list[tuple[float, float]]:
    """(FLOPs, numbers read and written) of each operation of forward and backward, as the variant carries them out.

    A matrix product [m, k] [k, n] takes 2 m k n FLOPs and moves m k + k n + m n numbers; other operations only move.
    Backward gives the gradients of the input and of the adapter. What is only [tokens, heads] large is left out.
    """
    _, i, o, r, T, N = point

    def product(m: int, k: int, n: int) -> tuple[float, float]:
        return 2 * m * k * n, m * k + k * n + m * n

    def move(count: int) -> tuple[float, float]:
        return 0, count

    def low_rank(rank: int, out: int) -> list:  # x A^T or z B^T, and the gradients of both factors
        return [product(T, rank, out), product(rank, T, out), product(T, out, rank)]

    base = [product(T, i, o), product(T, o, i)]
    if variant == BASE:
        return base
    if variant in (LORA, WIDE):
        rank = r if variant == LORA else N * r
        # y + scaling * (B A x): scaled, then added; backward scales the gradient, and adds that of the input
        return base + low_rank(rank, i) + low_rank(rank, o) + [move(2 * T * o), move(3 * T * o), move(2 * T * o), move(3 * T * i)]
    if variant == LOOP:
        # a head: w_i * (B_i z), its sum with y; backward d B_i z, d w_i (a product, then its sum), and the sum of d z
        head = low_rank(r, o) + [move(2 * T * o), move(3 * T * o), move(2 * T * o), move(4 * T * o), move(3 * T * r)]
        return base + N * head + low_rank(r, i) + low_rank(N, i) + 2 * [move(3 * T * i)]
    if variant == ILORA:
        # [A; R] x; the routed z, made twice; products that add into y and into the input's gradient, which they read
        routed = [move(T * r + T * N * r)]
        gates = [move(4 * T * N * r)]  # d w and d z out of the gradient of the routed z
        return base + low_rank(r + N, i) + low_rank(N * r, o) + 2 * routed + gates + [move(T * o), move(T * i)]
    raise ValueError(f"variant {variant!r} is unknown; use one of {', '.join(VARIANTS)}")


def rooflines(point: Point, itemsize: int, rate: float, bandwidth: float) -> dict[str, float]:
    """Seconds of forward and backward by variant, if each operation took the longer of computing and moving.

    Args:
        itemsize: bytes a number. rate: FLOP/s. bandwidth: bytes/s.
    """
    return {v: sum(max(flops / rate, moved * itemsize / bandwidth) for flops, moved in operations(v, point)) for v in VARIANTS}


def measure(point: Point, dtype: torch.dtype, device: str, seconds: float) -> tuple[list[dict], list[dict]]:
    """One point: rows of costs, a variant and pass each, and rows of ratios."""
    layers = variants(point, dtype, device)
    x = torch.randn(point.tokens, point.width_in, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(point.tokens, point.width_out, device=device, dtype=dtype)
    target = torch.empty_like(grad)

    def both(layer: nn.Module):
        def step(_: int):
            y = layer(x)
            yield
            y.backward(grad)
            yield
            _forget(layer, x)

        return step

    def copy(_: int):
        target.copy_(grad)
        yield

    times = interleaved({**{name: both(layer) for name, layer in layers.items()}, _COPY: copy}, seconds, device)
    kept = {name: kept_bytes(layer, x) for name, layer in layers.items()}
    peak = {name: peak_bytes(layer, x, grad) for name, layer in layers.items()}
    total = {name: times[name].sum(0) for name in VARIANTS}
    forward = {name: times[name][0] for name in VARIANTS}
    rate = 4 * point.tokens * point.width_in * point.width_out / np.median(total[BASE])
    bandwidth = 2 * grad.nbytes / np.median(times[_COPY])
    bound = rooflines(point, dtype.itemsize, rate, bandwidth)

    about = {"device": device, "dtype": str(dtype).removeprefix("torch."), **point._asdict()}
    costs = [
        {
            **about,
            "variant": name,
            "pass": label,
            **quartiles(part[name]),
            **dict(zip(("over_base", "over_base_q1", "over_base_q3"), np.quantile(part[name] / part[BASE], [0.5, 0.25, 0.75]))),
            "roofline_seconds": bound[name] if part is total else np.nan,
            "kept_bytes": kept[name],
            "peak_bytes": peak[name],
            "gflops": rate / 1e9,
            "gbytes": bandwidth / 1e9,
        }
        for label, part in (("forward", forward), ("forward + backward", total))
        for name in VARIANTS
    ]
    # I-LoRA at its roofline, or with plain LoRA's time, the others as they are
    best, plain = {**total, ILORA: np.full_like(total[ILORA], bound[ILORA])}, {**total, ILORA: total[LORA]}
    ratios = [
        {"ratio": name, **estimate(of, total), "roofline": float(of(best)), "plain": float(of(plain))} for name, of in RATIOS.items()
    ]
    ratios.append({"ratio": "forward_ilora_over_lora", **estimate(RATIOS["ilora_over_lora"], forward)})
    for name, variant in (("saved_ilora_over_lora", ILORA), ("saved_loop_over_lora", LOOP)):
        exact = kept[variant] / kept[LORA]
        ratios.append({"ratio": name, "value": exact, "low": exact, "high": exact})
    return costs, [{"part": "layer", "where": point.where, **about, **row} for row in ratios]


def layer(chosen: Sequence[Point], dtypes: Iterable[str], seconds: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure all points in each number format that the device has, on the CPU and on the GPU where there is one.

    Returns:
        Costs, a row a point, variant and pass, with medians and quartiles; and ratios, as `crab.study.benchmark.RATIO`.
    """
    costs, ratios = [], []
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for dtype in formats(dtypes, device):
            for point in chosen:
                more, others = measure(point, getattr(torch, dtype), device, seconds)
                costs += more
                ratios += others
    return pd.DataFrame(costs), pd.DataFrame(ratios)[[*RATIO, *Point._fields]]


def rates(costs: pd.DataFrame) -> pd.DataFrame:
    """Best rates of matrix products (as the base reached them) and of memory, over all points, a row a number format."""
    return costs.groupby(["device", "dtype"], sort=False)[["gflops", "gbytes"]].max().reset_index()
