"""The work between the matrix products of the fused layer, as one Triton kernel forward and one backward.

On a GPU a small layer waits for launches, not for arithmetic. This module needs Triton; `crab.ilora.fused.kernels_for`
says on which devices it runs. Softmax and sums are in float32, and each stored number is rounded once.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
import triton
import triton.language as tl

ALIGNED = 8  # elements: matrix products are slow if rows of 2-byte numbers do not start at multiples of 16 bytes
_compiled: dict[tuple, object] = {}


@triton.jit
def _softmax(logits, t, tokens, temperature, N: tl.constexpr, HEADS: tl.constexpr):
    """For the tokens `t`: heads, which of them exist, highest score, exp(score - highest) of each, and their sum."""
    head = tl.arange(0, HEADS)[:, None].to(tl.int64)
    inside = (head < N) & (t < tokens)
    scores = tl.load(logits + head * tokens + t, inside, other=float("-inf")).to(tl.float32) / temperature
    highest = tl.max(scores, 0)[None, :]
    powers = tl.exp(scores - highest)
    return head, inside, highest, powers, tl.sum(powers, 0)[None, :]


@triton.jit(do_not_specialize=["tokens", "pitch"], do_not_specialize_on_alignment=["z", "logits", "routed", "weights"])
def _forward(
    z, logits, routed, weights, tokens, pitch, temperature, N: tl.constexpr, RANK: tl.constexpr, SHARED: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS tokens, ROWS of the N * RANK rows of `routed`. HEADS is N rounded up to a power of 2."""
    t = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    head, inside, highest, powers, total = _softmax(logits, t, tokens, temperature, N, HEADS)
    if tl.program_id(1) == 0:
        tl.store(weights + head * tokens + t, powers / total, inside)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = (row < N * RANK) & (t < tokens)
    own = tl.load(logits + (row // RANK).to(tl.int64) * tokens + t, inside, other=0).to(tl.float32) / temperature
    below = (row % RANK if SHARED else row).to(tl.int64)
    projected = tl.load(z + below * tokens + t, inside, other=0).to(tl.float32)
    tl.store(routed + row.to(tl.int64) * pitch + t, tl.exp(own - highest) / total * projected, inside)


@triton.jit(
    do_not_specialize=["tokens", "pitch"],
    do_not_specialize_on_alignment=["z", "logits", "routed_grad", "routed", "small_grad"],
)
def _backward(
    z, logits, routed_grad, routed, small_grad, tokens, pitch, temperature, scaling, N: tl.constexpr,
    RANK: tl.constexpr, SHARED: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS tokens, all rows, ROWS of each head at a time. HEADS is N rounded up to a power of 2."""
    t = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    head, inside, highest, powers, total = _softmax(logits, t, tokens, temperature, N, HEADS)
    dots = tl.zeros((HEADS, COLUMNS), tl.float32)  # per head, of z with the gradient of the routed projections
    for start in range(0, RANK, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None].to(tl.int64)
        within = (row < RANK) & (t < tokens)
        z_grad = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(N):
            wide = row + i * RANK
            own = tl.load(logits + i * tokens + t, t < tokens, other=0).to(tl.float32) / temperature
            factor = scaling * tl.exp(own - highest) / total
            projected = tl.load(z + (row if SHARED else wide) * tokens + t, within, other=0).to(tl.float32)
            grad = tl.load(routed_grad + wide * tokens + t, within, other=0).to(tl.float32)
            tl.store(routed + wide * pitch + t, factor * projected, within)
            dots = tl.where(head == i, dots + tl.sum(projected * grad, 0)[None, :], dots)
            if SHARED:
                z_grad += factor * grad
            else:
                tl.store(small_grad + wide * pitch + t, factor * grad, within)
        if SHARED:
            tl.store(small_grad + row * pitch + t, z_grad, within)
    # softmax: d logit_i = w_i (d w_i - sum_j w_j d w_j)
    weights, weights_grad = powers / total, scaling * dots
    logits_grad = weights * (weights_grad - tl.sum(weights * weights_grad, 0)[None, :]) / temperature
    below = RANK if SHARED else N * RANK
    tl.store(small_grad + (below + head) * pitch + t, logits_grad, inside)


def route(z: torch.Tensor, logits: torch.Tensor, columns: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of B, [num_heads * r, T] in the dtype of z, and the routing weights [num_heads, 1, T] in float32.

    z is A x^T [r or num_heads * r, T], logits are R x^T [num_heads, T], both contiguous; columns is num_heads * r.
    """
    heads, tokens = logits.shape
    routed = z.new_empty((columns, tokens + -tokens % ALIGNED))
    weights = logits.new_empty((heads, 1, tokens), dtype=torch.float32)
    grid = (-(-tokens // 64), -(-columns // 16), 1)
    constants, _ = _constants(heads, columns, z.shape[0])
    _launch(_forward, grid, constants, z, logits, routed, weights, tokens, routed.shape[1], float(temperature))
    return _cut(routed, tokens), weights


def route_backward(z, logits, routed_grad, temperature: float, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`scaling` times the first output of `route`, and the gradients of z and logits [rows of z + num_heads, T].

    `routed_grad` is the gradient of the former, [num_heads * r, T], contiguous. All have the dtype of z.
    """
    heads, tokens = logits.shape
    pitch = tokens + -tokens % ALIGNED
    routed, small_grad = z.new_empty((len(routed_grad), pitch)), z.new_empty((len(z) + heads, pitch))
    _, constants = _constants(heads, len(routed_grad), len(z))
    numbers = tokens, pitch, float(temperature), float(scaling)
    _launch(_backward, (-(-tokens // 32), 1, 1), constants, z, logits, routed_grad, routed, small_grad, *numbers)
    return _cut(routed, tokens), _cut(small_grad, tokens)


def _cut(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    return tensor if tensor.shape[1] == tokens else tensor[:, :tokens]


@cache
def _constants(heads: int, columns: int, rows: int) -> tuple[tuple, tuple]:
    """N, RANK, SHARED, HEADS, ROWS and COLUMNS of the two kernels, if z has `rows` rows."""
    rank = columns // heads
    shape = heads, rank, rows == rank, triton.next_power_of_2(heads)
    return (*shape, 16, 64), (*shape, min(64, triton.next_power_of_2(rank)), 32)


def _launch(kernel, grid: tuple[int, int, int], constants: tuple, z, logits, *others) -> None:
    """Start the programs of `grid`. Compiled kernels are stored: Triton's own look-up takes longer than a launch."""
    device = z.device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        key = id(kernel), device, z.dtype, logits.dtype, constants
        program = _compiled.get(key)
        launched = (kernel if program is None else program)[grid](z, logits, *others, *constants)
        if program is None:
            _compiled[key] = launched
