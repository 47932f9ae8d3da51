"""The collectives of one classifier step. Each docstring counts calls and the bytes that a rank sends on a ring of N ranks. Without an
initialised process group each of them is the identity."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc.renamed import refuse

Group = dist.ProcessGroup | None

# torch 2.13 renames these two; 2.11 has the old names only.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def world_size(group: Group = None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


class SharedGroup:
    """Holds a process group for a module, whose copies share it. A pickle leaves it out, because a group exists only in its process."""

    def __init__(self, group: Group = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> "SharedGroup":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedGroup, ()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_bD: Tensor, group: Group, gradient_factor: float, counts: list[int] | None, dtype: torch.dtype | None
    ) -> Tensor:
        ctx.group, ctx.gradient_factor, ctx.counts, ctx.rows = group, gradient_factor, counts, len(x_bD)
        # A single process rounds too, so that results do not depend on the number of ranks.
        gathered_BD = gather_constant(x_bD.to(dtype or x_bD.dtype), group, counts).to(x_bD.dtype)
        return gathered_BD.view_as(gathered_BD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BD,) = grads
        ranks = world_size(ctx.group)
        if ranks == 1:
            return grad_BD * ctx.gradient_factor, None, None, None, None
        if _differ(ctx.counts):
            grad_BD = _padded(grad_BD.split(ctx.counts), max(ctx.counts))
        grad_bD = grad_BD.new_empty(grad_BD.shape[0] // ranks, *grad_BD.shape[1:])
        _reduce_scatter(grad_bD, grad_BD.contiguous(), group=ctx.group)
        return grad_bD[: ctx.rows].mul_(ctx.gradient_factor), None, None, None, None


def gather_rows(
    x_bD: Tensor, group: Group = None, gradient_factor: float = 1.0, counts: list[int] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """All ranks' rows [B, D] in rank order. Every rank brings the same b, or as many as `counts` says (0 is allowed).

    Values travel as `dtype`, rounded once, and come back in their own dtype. Backward gives each rank the *sum over ranks* of its rows'
    gradients, times `gradient_factor`; gradients travel in the dtype of x, because a sum over ranks in bfloat16 would round at every
    addition. Forward: 1 all-gather, (N-1)/N of B D elements of `dtype`. Backward: 1 reduce-scatter of as many elements of x's dtype. If
    counts differ, rows travel padded to the largest count m, and B is N m in these figures."""
    return _GatherRows.apply(x_bD, group, gradient_factor, counts, dtype)


def _differ(counts: list[int] | None) -> bool:
    return counts is not None and min(counts) < max(counts)


def _padded(parts: Sequence[Tensor], rows: int) -> Tensor:
    """The parts in a row, each padded with zeros to `rows`."""
    padded = parts[0].new_zeros(len(parts), rows, *parts[0].shape[1:])
    for place, part in zip(padded, parts, strict=True):
        place[: len(part)] = part
    return padded.flatten(0, 1)


class _Apply(torch.autograd.Function):
    """forward(x), whose gradient is backward(its gradient)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.backward_of = backward
        return forward(x).view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_of(grads[0]), None, None


def divide_gradient(x: Tensor, group: Group = None) -> Tensor:
    """x itself, for a value that every rank computes alike from gathered rows. Each rank's loss sends it the whole gradient, and the
    reduce-scatter behind `gather_rows` adds N of them, so backward passes on 1/N."""
    ranks = world_size(group)
    return _Apply.apply(x, lambda x: x, lambda gradient: gradient / ranks)


def sum_gradient(x: Tensor, group: Group = None) -> Tensor:
    """x itself, for a parameter that is equal on every rank and that each rank applies to its own columns: backward sums the ranks' parts
    of the gradient. Backward: 1 all-reduce, 2 (N-1)/N of its elements."""
    return _Apply.apply(x, lambda x: x, lambda gradient: sum_packed([gradient.contiguous()], group)[0])


def sum_values(x: Tensor, group: Group = None) -> Tensor:
    """The sum over ranks. 1 all-reduce, 2 (N-1)/N of its elements. Every rank computes the same loss from the sum, so each rank's part has
    the gradient of the sum: backward communicates nothing."""
    return _Apply.apply(x, lambda x: sum_packed([x], group)[0], lambda gradient: gradient)


def gather_constant(x_b: Tensor, group: Group = None, counts: list[int] | None = None) -> Tensor:
    """All ranks' rows [B, ...] in rank order, without gradient; `counts` as in `gather_rows`. 1 all-gather, (N-1)/N of B elements."""
    ranks = world_size(group)
    mine_b = x_b.detach()
    if ranks == 1:
        return mine_b
    if counts is not None and _differ(counts):
        mine_b = _padded([mine_b], max(counts))
    gathered_B = mine_b.new_empty(len(mine_b) * ranks, *mine_b.shape[1:])
    _all_gather(gathered_B, mine_b.contiguous(), group=group)
    if counts is not None and _differ(counts):
        return torch.cat([part[:rows] for part, rows in zip(gathered_B.split(len(mine_b)), counts, strict=True)])
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


def exchange(x: Tensor, sent: list[int], received: list[int], group: Group = None) -> Tensor:
    """Sends the first sent[0] rows to rank 0, the next sent[1] to rank 1 and so on; returns received[r] rows from each rank r, in rank
    order. 1 all-to-all; a rank sends the rows that are for others."""
    if world_size(group) == 1:
        return x
    arrived = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(arrived, x.contiguous(), received, sent, group=group)
    return arrived


if not TYPE_CHECKING:  # a type checker would then accept any name

    def __getattr__(name: str) -> Any:
        refuse(__name__, name, {"replicated": "divide_gradient", "shared": "sum_gradient", "summed": "sum_values"})
