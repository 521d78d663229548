"""Base and adapter of one layer as a single autograd function."""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .routers import TokenRouter, autocast_off

#: Columns of B from which on its gradient is computed as it is stored. Of fewer, a CPU takes less time for the transpose and
#: its copy, which is then small: at 24 columns two thirds, at 48 about as much, at 384 half as much again, in bfloat16 more.
MANY_ROWS = 128


class Setting(NamedTuple):
    """What `FusedLinear` needs to know beside its tensors.

    Attributes:
        router: turns logits into weights; its weight is passed as R.
        scaling: factor of the adapter.
        dropout: probability that an element of A's input is dropped; 0 outside training.
        dtype: in which A and B are multiplied: their own, or under autocast as a rule autocast's.
        router_dtype: in which R is multiplied: its own, or float32 under autocast.
        kernels: `crab.ilora.kernels` where it does what lies between the products; None leaves that to torch.
    """

    router: TokenRouter
    scaling: float
    dropout: float
    dtype: torch.dtype
    router_dtype: torch.dtype
    kernels: ModuleType | None


@cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """`crab.ilora.kernels` if its kernels run on this device; None without Triton, and where one cannot be built."""
    try:
        from . import kernels

        for _ in range(2):  # the second launch is of a kernel already built
            kernels.route(torch.ones(1, 2, device=device), torch.ones(1, 2, device=device), 1, 1)
    except ImportError:
        return None
    except Exception as error:  # no C compiler, say; what is slower still works
        warnings.warn(f"I-LoRA: Triton builds no kernel for {device}, so a layer makes more launches: {error}", stacklevel=2)
        return None
    return kernels


class FusedLinear(torch.autograd.Function):
    """What the tokens cost here is three matrix products forward: the base's, [A; R] x and B's.

    Against the same formula left to autograd it keeps only x and the small products A x and R x for backward (the
    routed projections, num_heads times as wide, are made again; of dropout it keeps one byte an element), adds into
    the base's output and into the input's gradient inside the matrix products, and so makes no further tensor of the
    size of either. The small tensors lie with the tokens last: a few rows as long as there are tokens are what CPUs
    multiply and add fastest.

    Call it with autocast off; x, weight and bias are in the dtype the base computes in, A, R and B as they are stored.

    Shapes: x [T, in], weight [out, in], bias [out] or None, A [r or num_heads * r, in], R [num_heads, in],
    B [out, num_heads * r]; `read` is x before autocast rounded it, or None where it did not. Returns y [T, out] and,
    without gradient, the routing weights [num_heads, 1, T].
    """

    @staticmethod
    def forward(ctx, x, read, weight, bias, A, R, B, setting):
        y, z, logits, weights, mask = project(x, read, weight, bias, A, R, B, setting)
        ctx.save_for_backward(x, weight, A, R, B, z, logits, mask)
        ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)  # or backward would be handed zeros for the weights
        ctx.setting = setting
        return y, weights

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 8
        with autocast_off(grad.device.type):  # some call backward inside the block
            # create_graph=True: _backward writes in place, but the formula can be derived again
            grads = (_differentiable_backward if torch.is_grad_enabled() else _backward)(ctx, grad, *ctx.saved_tensors)
        grad_x, *grads = (None if g is None else _cast(g, dtype) for g, dtype in grads)
        return grad_x, None, None, None, *grads, None


def project(x, read, weight, bias, A, R, B, setting):
    """Forward: y [T, out]; A x^T [rows of A, T], R x^T [num_heads, T] and the weights made of it, [num_heads, 1, T]; and,
    with dropout, 1 for each element kept.
    """
    y = F.linear(x, weight, bias)
    dtype, mask = setting.dtype, None
    columns = _cast(x if x.dtype == dtype or read is None else read, dtype).t()
    if not setting.dropout and setting.router_dtype == dtype and x.shape[0] > A.shape[0]:
        small = torch.mm(torch.cat((A, R)), columns)
        z, logits = small[:A.shape[0]], small[A.shape[0]:]
    else:  # also for few tokens, as in decoding: reading A and R is the cost there, so do not copy them first
        read = x if read is None else read
        logits = _cast(R, setting.router_dtype) @ _cast(read, setting.router_dtype).t()
        if setting.dropout:  # the draws of F.dropout on a CPU; bytes, since they multiply faster than bools
            mask = torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - setting.dropout)
            columns = columns * mask.to(dtype).t()
        z = _cast(A, dtype) @ columns
        if setting.dropout:
            z = z / (1 - setting.dropout)
    routed, weights = _route(z, logits, R, B, setting)
    _accumulate(y, routed.t(), _cast(B, dtype).t(), setting.scaling)
    return y, z, logits, weights, mask


def project_few(x, weight, bias, A, R, B, setting):
    """`project` for so few tokens that calls cost more than arithmetic, all in one dtype and without gradient.

    x [..., in] -> y [..., out], and the weights [num_heads, 1, T].
    """
    y, columns = F.linear(x, weight, bias), x.reshape(-1, x.shape[-1]).t()
    # one by one: to stack A and R is to copy what is to be read once
    logits, z = torch.mm(R, columns), torch.mm(A, columns)
    routed, weights = _route(z, logits, R, B, setting)
    y.view(-1, y.shape[-1]).addmm_(routed.t(), B.t(), alpha=setting.scaling)
    return y, weights


def _route(z, logits, R, B, setting):
    """What B multiplies, [num_heads * r, T], and the routing weights [num_heads, 1, T]."""
    if setting.kernels:
        return setting.kernels.route(z, logits, B.shape[1], setting.router.temperature)
    weights = _weigh(logits, setting.router)
    return (_cast(weights, z.dtype) * _by_head(z, R, B)).flatten(0, 1), weights


def _weigh(logits, router):
    """Weights [num_heads, 1, T] of the logits [num_heads, T]."""
    return router.weigh(logits, 0).unsqueeze(1)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, which for a tensor that is of it already costs as much as multiplying a few tokens."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _backward(ctx, grad, x, weight, A, R, B, z, logits, mask):
    """(gradient or None, dtype it must have) for x, A, R and B."""
    need_x, _, _, _, need_A, need_R, need_B, _ = ctx.needs_input_grad
    router, scaling, dropout, dtype, _, kernels = ctx.setting
    stored = A.dtype, B.dtype
    A, R, B, up_grad = _cast(A, dtype), _cast(R, dtype), _cast(B, dtype), _cast(grad, dtype)
    grad_x = grad_A = grad_R = grad_B = None
    if kernels:
        routed, small_grad = kernels.route_backward(z, logits, torch.mm(B.t(), up_grad.t()), router.temperature, scaling)
        if need_B:  # as B lies in memory, see below
            grad_B = torch.mm(up_grad.t(), routed.t())
    else:
        weights = _weigh(logits, router)  # made again: z and logits are one storage, the weights would be a second
        by_head, factor = _by_head(z, R, B), weights * scaling
        scaled = _cast(factor, dtype)
        if need_B:
            routed = (scaled * by_head).flatten(0, 1)
            if len(routed) < MANY_ROWS:
                grad_B = torch.mm(routed, up_grad).t()
            else:  # as B lies in memory: autograd would copy the transpose of a product into place, which is as much again
                grad_B = torch.mm(up_grad.t(), routed.t())
        if need_x or need_A or need_R:
            routed_grad = _by_head(torch.mm(B.t(), up_grad.t()), R, B)
            # softmax: d logit_i = w_i (d w_i - sum_j w_j d w_j); a head left out by top_k has w_i = 0
            logits_grad = _cast((routed_grad * by_head).sum(1, keepdim=True), factor.dtype) * factor
            logits_grad -= weights * logits_grad.sum(0, keepdim=True)
            if router.temperature != 1:
                logits_grad /= router.temperature
            logits_grad = _cast(logits_grad.squeeze(1), dtype)
            z_grad = scaled * routed_grad
            z_grad = z_grad.sum(0) if len(by_head) == 1 else z_grad.flatten(0, 1)
            small_grad = torch.cat((z_grad, logits_grad))
    if need_x:
        grad_x = torch.mm(grad, weight)
    rows = A.shape[0], R.shape[0]
    if mask is None:
        if need_A or need_R:  # stored in one dtype, so that one cast serves both
            grad_A, grad_R = _cast(torch.mm(small_grad, _cast(x, dtype)), stored[0]).split(rows)
        if need_x:
            _accumulate(grad_x, small_grad.t(), torch.cat((A, R)))
    elif need_x or need_A or need_R:
        z_grad, logits_grad = small_grad.split(rows)
        kept, z_grad = mask.to(dtype), z_grad / (1 - dropout)
        if need_A:
            grad_A = z_grad @ (x.to(dtype) * kept)
        if need_R:
            grad_R = logits_grad @ x.to(dtype)
        if need_x:
            _accumulate(grad_x, logits_grad.t(), R)
            grad_x += (z_grad.t() @ A).mul_(kept)
    return (grad_x, x.dtype), (grad_A, stored[0]), (grad_R, stored[0]), (grad_B, stored[1])


def _differentiable_backward(ctx, grad, x, weight, A, R, B, z, logits, mask):
    router, scaling, dropout, dtype, router_dtype, _ = ctx.setting
    # views, so that a path from one of them to another outside this layer is not counted here
    given = [t.view_as(t) for t in (x, A, R, B)]
    x, A, R, B = given
    columns = x.to(dtype).t()
    if mask is not None:
        columns = columns * mask.to(dtype).t() / (1 - dropout)
    by_head = _by_head(A.to(dtype) @ columns, R, B)
    weights = _weigh(R.to(router_dtype) @ x.to(router_dtype).t(), router)
    routed = ((weights * scaling).to(dtype) * by_head).flatten(0, 1).t()
    y = F.linear(x, weight) + F.linear(routed, B.to(dtype))
    wanted = [need for i, need in enumerate(ctx.needs_input_grad) if i in (0, 4, 5, 6)]
    found = iter(torch.autograd.grad(y, [t for t, need in zip(given, wanted, strict=True) if need],
                                     grad.to(y.dtype), create_graph=True, materialize_grads=True))
    return [(next(found) if need else None, t.dtype) for t, need in zip(given, wanted, strict=True)]


def _by_head(z, R, B):
    """[r or num_heads * r, T] as [1 or num_heads, r, T]."""
    heads, columns = R.shape[0], B.shape[1]
    return z.view(z.shape[0] * heads // columns, columns // heads, z.shape[1])


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float = 1) -> None:
    """total += factor * left @ right in place; of a wider dtype than `total` it is rounded once, after the sum."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=factor)
    else:
        total.add_(left @ right, alpha=factor)
