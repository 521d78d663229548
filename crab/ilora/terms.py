"""What may be asked of routers and heads beside the task's own loss.

A term is not added to the loss, which is the trainer's: its gradient is let in where the layer gives its output, as if it had
been. Any trainer then works as it is, with gradient checkpointing too, and the loss it reports stays that of the task.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Terms(NamedTuple):
    """Factors of the terms of one adapter; see the fields of these names of `ILoraConfig`."""

    balance_weight: float
    orthogonality_weight: float


class _WithTerm(torch.autograd.Function):
    """result, term [] -> result, whose backward gives the term the gradient it would have as part of the loss: 1."""

    @staticmethod
    def forward(ctx, result, term):
        ctx.of_term = term.new_ones(())
        return result.view_as(result)

    @staticmethod
    def backward(ctx, grad):
        return grad, ctx.of_term


def with_terms(result: torch.Tensor, weights: torch.Tensor, B: torch.Tensor, terms: Terms,
               shared_head: bool = False) -> torch.Tensor:
    """The layer's output, through which the terms reach its router and heads in backward.

    Args:
        result: output, of any shape. weights: routing weights [..., num_heads]. B: stacked heads [out, num_heads * r].
        shared_head: the first head is not routed.
    """
    total = 0
    if terms.balance_weight:
        total = total + terms.balance_weight * imbalance(weights[..., 1:] if shared_head else weights)
    if terms.orthogonality_weight:
        total = total + terms.orthogonality_weight * overlap(B, weights.shape[-1])
    return _WithTerm.apply(result, total)


def imbalance(weights: torch.Tensor) -> torch.Tensor:
    """N sum_i m_i^2 - 1 of the heads' mean weights m_i over all tokens: 0 where they are equal, N - 1 where one head has all.

    For weights that sum to 1 this is the squared coefficient of variation of the heads' importance (Shazeer et al.,
    arXiv 1701.06538).
    """
    means = weights.float().flatten(0, -2).mean(0)
    return len(means) * means.square().sum() - 1


def overlap(B: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Mean over pairs of heads of ||B_i^T B_j||^2 / (||B_i||^2 ||B_j||^2), Frobenius norms: 0 where no two share a direction.

    It is at most 1, reached where both have rank one and the same column space. Heads that are still zero overlap with none.
    """
    heads = B.float().unflatten(1, (num_heads, -1)).transpose(0, 1)  # [N, out, r]
    products = torch.einsum("iar,jas->ijrs", heads, heads).square().sum((2, 3))
    norms = heads.square().sum((1, 2))
    shares = products / (norms[:, None] * norms + torch.finfo(products.dtype).tiny)
    return shares.triu(1).sum() / (num_heads * (num_heads - 1) / 2)
