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
    """Of the tokens `t`: the heads, which of them exist, highest score, exp(score - highest) of each head, sum of these."""
    head = tl.arange(0, HEADS)[:, None].to(tl.int64)
    inside = (head < N) & (t < tokens)
    scores = tl.load(logits + head * tokens + t, inside, other=float("-inf")).to(tl.float32) / temperature
    highest = tl.max(scores, 0)[None, :]
    powers = tl.exp(scores - highest)
    return head, inside, highest, powers, tl.sum(powers, 0)[None, :]


@triton.jit(do_not_specialize=["tokens", "pitch"], do_not_specialize_on_alignment=["z", "logits", "routed", "weights"])
def _forward(
    z,
    logits,
    routed,
    weights,
    tokens,
    pitch,
    temperature,
    N: tl.constexpr,
    RANK: tl.constexpr,
    SHARED: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
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
    z,
    logits,
    routed_grad,
    routed,
    small_grad,
    tokens,
    pitch,
    temperature,
    scaling,
    N: tl.constexpr,
    RANK: tl.constexpr,
    SHARED: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
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
    """Softmax weights of the logits, and A x multiplied by them.

    Args:
        z: A x^T [r or num_heads * r, T], logits: R x^T [num_heads, T], both contiguous, T at least 1.
        columns: number of columns of B, num_heads * r.

    Returns:
        The input of B, [num_heads * r, T] in the dtype of z, and the weights [num_heads, 1, T] in float32.
    """
    heads, tokens = logits.shape
    routed = z.new_empty((columns, _pitch(tokens)))
    weights = logits.new_empty((heads, 1, tokens), dtype=torch.float32)
    grid = (-(-tokens // 64), -(-columns // 16), 1)
    constants, _ = _constants(heads, columns, z.shape[0])
    _launch(_forward, grid, constants, z, logits, routed, weights, tokens, routed.shape[1], float(temperature))
    return _columns(routed, tokens), weights


def route_backward(z, logits, routed_grad, temperature: float, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The scaled routed projections again, and the gradients of z and of the logits.

    Args:
        z, logits: the inputs of `route`.
        routed_grad: gradient of `scaling` times the first output of `route`, [num_heads * r, T], contiguous, like z.

    Returns:
        `scaling` times the first output of `route`, and both gradients in one tensor, [rows of z + num_heads, T]. Both
        have the dtype of z.
    """
    heads, tokens = logits.shape
    pitch, columns = _pitch(tokens), routed_grad.shape[0]
    routed, small_grad = z.new_empty((columns, pitch)), z.new_empty((z.shape[0] + heads, pitch))
    _, constants = _constants(heads, columns, z.shape[0])
    numbers = tokens, pitch, float(temperature), float(scaling)
    _launch(_backward, (-(-tokens // 32), 1, 1), constants, z, logits, routed_grad, routed, small_grad, *numbers)
    return _columns(routed, tokens), _columns(small_grad, tokens)


def _pitch(tokens: int) -> int:
    return tokens + -tokens % ALIGNED


def _columns(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    return tensor if tensor.shape[1] == tokens else tensor[:, :tokens]


@cache
def _constants(heads: int, columns: int, rows: int) -> tuple[tuple, tuple]:
    """N, RANK, SHARED, HEADS, ROWS and COLUMNS of the two kernels, if z has `rows` rows."""
    rank = columns // heads
    shape = heads, rank, rows == rank, triton.next_power_of_2(heads)
    return (*shape, 16, 64), (*shape, min(64, triton.next_power_of_2(rank)), 32)


def _launch(kernel, grid: tuple[int, int, int], constants: tuple, z, logits, *others) -> None:
    """Start the programs of `grid`. Compiled kernels are stored here: Triton's own look-up takes longer than a launch."""
    device = z.device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        key = id(kernel), device, z.dtype, logits.dtype, constants
        program = _compiled.get(key)
        launched = (kernel if program is None else program)[grid](z, logits, *others, *constants)
        if program is None:
            _compiled[key] = launched
