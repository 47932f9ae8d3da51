"""The collectives of one classifier step. Each docstring counts calls and the bytes a rank sends on a ring of N ranks.
Without an initialised process group every one of them is the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

# torch 2.13 renames these two; 2.11 has the old names only.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def world_size(group: Group = None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_bD: Tensor, group: Group, gradient_factor: float) -> Tensor:
        ctx.group, ctx.gradient_factor = group, gradient_factor
        return x_bD.view_as(x_bD) if world_size(group) == 1 else gather_constant(x_bD, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_BD,) = grads
        ranks = world_size(ctx.group)
        if ranks == 1:
            return grad_BD * ctx.gradient_factor, None, None
        grad_bD = grad_BD.new_empty(grad_BD.shape[0] // ranks, *grad_BD.shape[1:])
        _reduce_scatter(grad_bD, grad_BD.contiguous(), group=ctx.group)
        return grad_bD.mul_(ctx.gradient_factor), None, None


def gather_rows(x_bD: Tensor, group: Group = None, gradient_factor: float = 1.0) -> Tensor:
    """All ranks' rows [B, D] in rank order, B = N b; every rank must bring the same b.

    Backward gives each rank the *sum over ranks* of its rows' gradients, times `gradient_factor`.
    Forward: 1 all-gather, (N-1)/N of B D elements. Backward: 1 reduce-scatter, the same.
    """
    return _GatherRows.apply(x_bD, group, gradient_factor)


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.ranks, None


def replicated(x: Tensor, group: Group = None) -> Tensor:
    """x itself, for a value that every rank computes alike from gathered rows. Each rank's loss sends it the whole gradient, and the
    reduce-scatter behind `gather_rows` adds N of them, so backward passes on a share of 1/N."""
    return _Replicated.apply(x, world_size(group))


def gather_constant(x_b: Tensor, group: Group = None) -> Tensor:
    """All ranks' rows [B, ...] in rank order, without gradient. 1 all-gather, (N-1)/N of B elements."""
    ranks = world_size(group)
    if ranks == 1:
        return x_b.detach()
    gathered_B = x_b.new_empty(x_b.shape[0] * ranks, *x_b.shape[1:])
    _all_gather(gathered_B, x_b.detach().contiguous(), group=group)
    return gathered_B


def sum_packed(vectors: list[Tensor], group: Group = None) -> list[Tensor]:
    """The sums over ranks of several equally shaped tensors. 1 all-reduce, 2 (N-1)/N of their elements."""
    if world_size(group) == 1:
        return vectors
    packed = torch.stack(vectors)
    dist.all_reduce(packed, group=group)
    return list(packed.unbind())


def gather_packed(vectors: list[Tensor], group: Group = None) -> list[Tensor]:
    """Every rank's version of several equally shaped tensors: each [...] becomes [N, ...]. 1 all-gather, N-1 times their elements."""
    packed = torch.stack(vectors)[None]
    return list(gather_constant(packed, group).unbind(dim=1))
