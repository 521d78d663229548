"""Base and adapter of one layer as one autograd function."""

import warnings
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .routers import TokenRouter, autocast_off

#: From this number of columns of B on, its gradient is computed in the layout of B. Below, a CPU is faster with the
#: transpose and a copy: 2/3 of the time at 24 columns, the same at 48, 3/2 at 384, and more in bfloat16.
MANY_ROWS = 128


class Setting(NamedTuple):
    """What `FusedLinear` needs in addition to its tensors."""

    router: TokenRouter  # turns logits into weights; its own weight is passed as R
    scaling: float
    dropout: float  # on the input of A; 0 outside training
    dtype: torch.dtype  # of the products with A and B: their own, or usually that of autocast
    router_dtype: torch.dtype  # of the product with R: its own, or float32 under autocast
    kernels: ModuleType | None  # `crab.ilora.kernels`, or None to use torch between the products


@cache
def kernels_for(device: torch.device) -> ModuleType | None:
    """`crab.ilora.kernels` if they run on this device. None without Triton, or if Triton cannot build them."""
    try:
        from . import kernels

        for _ in range(2):  # the second launch uses a compiled kernel
            kernels.route(torch.ones(1, 2, device=device), torch.ones(1, 2, device=device), 1, 1)
    except ImportError:
        return None
    except Exception as error:  # for example no C compiler; torch does the same, slower
        warnings.warn(f"I-LoRA: Triton builds no kernel for {device}, so layers are slower: {error}", stacklevel=2)
        return None
    return kernels


class FusedLinear(torch.autograd.Function):
    """One layer in three matrix products forward: those of the base, of [A; R] and of B. Call it with autocast off.

    For backward it keeps only x, A x and R x (with dropout also one byte per element), and computes the routed
    projections again. Matrix products add directly into the output of the base and into the gradient of the input, so
    no second tensor of that size is made. Small tensors have the tokens last: CPUs are fastest with few long rows.

    Shapes: x [T, in], weight [out, in], bias [out] or None, A [r or num_heads * r, in], R [num_heads, in],
    B [out, num_heads * r]. `read` is x before autocast rounded it, or None. Returns y [T, out] and the routing weights
    [num_heads, 1, T], which have no gradient.
    """

    @staticmethod
    def forward(ctx, x, read, weight, bias, A, R, B, setting):
        y, z, logits, weights, mask = project(x, read, weight, bias, A, R, B, setting)
        ctx.save_for_backward(x, weight, A, R, B, z, logits, mask)
        ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)  # otherwise backward gets zeros for the weights
        ctx.setting = setting
        return y, weights

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 8
        if torch.is_grad_enabled():
            raise RuntimeError("I-LoRA: set ILoraLayer.fused = False for second derivatives (create_graph=True).")
        with autocast_off(grad.device.type):  # backward may run inside the autocast block
            grad_x, *grads = _backward(ctx, grad, *ctx.saved_tensors)
        return grad_x, None, None, None, *grads, None


def project(x, read, weight, bias, A, R, B, setting):
    """Forward: y [T, out], A x^T [rows of A, T], R x^T [num_heads, T], the routing weights [num_heads, 1, T], and with
    dropout a mask, 1 for each element that is kept.
    """
    y = F.linear(x, weight, bias)
    dtype, mask = setting.dtype, None
    columns = _cast(x if x.dtype == dtype or read is None else read, dtype).t()
    if not setting.dropout and setting.router_dtype == dtype and x.shape[0] > A.shape[0]:
        small = torch.mm(torch.cat((A, R)), columns)
        z, logits = small[: A.shape[0]], small[A.shape[0] :]
    else:  # for few tokens too, as in decoding: reading A and R is the cost, so do not copy them
        read = x if read is None else read
        logits = _cast(R, setting.router_dtype) @ _cast(read, setting.router_dtype).t()
        if setting.dropout:  # the random numbers of F.dropout on a CPU; bytes multiply faster than bools
            mask = torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - setting.dropout)
            columns = columns * mask.to(dtype).t()
        z = _cast(A, dtype) @ columns
        if setting.dropout:
            z = z / (1 - setting.dropout)
    routed, weights = _route(z, logits, R, B, setting)
    _accumulate(y, routed.t(), _cast(B, dtype).t(), setting.scaling)
    return y, z, logits, weights, mask


def project_few(x, weight, bias, A, R, B, setting):
    """`project` for so few tokens that calls take longer than arithmetic. One dtype, no gradient.

    x [..., in] -> y [..., out] and the weights [num_heads, 1, T].
    """
    y, columns = F.linear(x, weight, bias), x.reshape(-1, x.shape[-1]).t()
    logits, z = torch.mm(R, columns), torch.mm(A, columns)  # not stacked, which would copy A and R
    routed, weights = _route(z, logits, R, B, setting)
    y.view(-1, y.shape[-1]).addmm_(routed.t(), B.t(), alpha=setting.scaling)
    return y, weights


def _route(z, logits, R, B, setting):
    """The input of B, [num_heads * r, T], and the routing weights [num_heads, 1, T]."""
    if setting.kernels:
        return setting.kernels.route(z, logits, B.shape[1], setting.router.temperature)
    weights = setting.router.weigh(logits, 0).unsqueeze(1)
    return (_cast(weights, z.dtype) * _by_head(z, R, B)).flatten(0, 1), weights


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, without the call if nothing changes: it takes as long as a product with few tokens."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _backward(ctx, grad, x, weight, A, R, B, z, logits, mask):
    """The gradients (or None) of x, A, R and B, in their dtypes."""
    need_x, _, _, _, need_A, need_R, need_B, _ = ctx.needs_input_grad
    router, scaling, dropout, dtype, _, kernels = ctx.setting
    stored = A.dtype, B.dtype
    A, R, B, up_grad = _cast(A, dtype), _cast(R, dtype), _cast(B, dtype), _cast(grad, dtype)
    grad_x = grad_A = grad_R = grad_B = None
    if kernels:
        routed_grad = torch.mm(B.t(), up_grad.t())
        routed, small_grad = kernels.route_backward(z, logits, routed_grad, router.temperature, scaling)
    else:
        weights = router.weigh(logits, 0).unsqueeze(1)  # again: to store them would need more memory
        by_head, factor = _by_head(z, R, B), weights * scaling
        scaled = _cast(factor, dtype)
        routed = (scaled * by_head).flatten(0, 1) if need_B else None
        if need_x or need_A or need_R:
            routed_grad = _by_head(torch.mm(B.t(), up_grad.t()), R, B)
            # softmax: d logit_i = w_i (d w_i - sum_j w_j d w_j), and w_i = 0 for a head that top_k leaves out
            logits_grad = _cast((routed_grad * by_head).sum(1, keepdim=True), factor.dtype) * factor
            logits_grad -= weights * logits_grad.sum(0, keepdim=True)
            if router.temperature != 1:
                logits_grad /= router.temperature
            logits_grad = _cast(logits_grad.squeeze(1), dtype)
            z_grad = scaled * routed_grad
            z_grad = z_grad.sum(0) if len(by_head) == 1 else z_grad.flatten(0, 1)
            small_grad = torch.cat((z_grad, logits_grad))
    if need_B:  # in the layout of B if that is large: autograd would copy the transpose of a product
        transposed = not kernels and len(routed) < MANY_ROWS
        grad_B = torch.mm(routed, up_grad).t() if transposed else torch.mm(up_grad.t(), routed.t())
    if need_x:
        grad_x = torch.mm(grad, weight)
    rows = A.shape[0], R.shape[0]
    if mask is None:
        if need_A or need_R:  # they are stored in one dtype, so one cast serves both
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
    grads = (grad_x, x.dtype), (grad_A, stored[0]), (grad_R, stored[0]), (grad_B, stored[1])
    return [None if gradient is None else _cast(gradient, dtype) for gradient, dtype in grads]


def _by_head(z, R, B):
    """[r or num_heads * r, T] as [1 or num_heads, r, T]."""
    heads, columns = R.shape[0], B.shape[1]
    return z.view(z.shape[0] * heads // columns, columns // heads, z.shape[1])


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float = 1) -> None:
    """total += factor * left @ right in place. If the product is wider than `total`, the sum is rounded once."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=factor)
    else:
        total.add_(left @ right, alpha=factor)
