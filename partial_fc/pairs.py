"""The B x B matrix of cosines between the samples of the global batch, reduced row by row like the one with prototypes, for losses on pairs
and triplets. Rows are divided among ranks and computed in blocks, which backward recomputes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from partial_fc import collectives
from partial_fc.collectives import Group
from partial_fc.unit_rows import unit_rows

BLOCK_BYTES = 16 << 20  # of a block of rows; a reduction makes a few of this size

Reduction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def hardest(cosines_nB: Tensor, is_positive_nB: Tensor, is_negative_nB: Tensor) -> tuple[Tensor, Tensor]:
    """(smallest cosine with another sample of the identity, 2 if there is none; largest with another identity, -2 if none), [n] each."""
    return cosines_nB.masked_fill(~is_positive_nB, 2.0).amin(dim=1), cosines_nB.masked_fill(~is_negative_nB, -2.0).amax(dim=1)


class _Products(torch.autograd.Function):
    """The rows [start, stop) of units units^T, in the precision of the units, also if forward or backward runs within torch.autocast."""

    @staticmethod
    def forward(ctx: Any, units_BD: Tensor, start: int, stop: int) -> Tensor:
        ctx.save_for_backward(units_BD)
        ctx.span = slice(start, stop)
        with torch.autocast(units_BD.device.type, enabled=False):
            return units_BD[ctx.span] @ units_BD.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_nB,), (units_BD,) = grads, ctx.saved_tensors
        with torch.autocast(units_BD.device.type, enabled=False):
            grad_BD = grad_nB.T @ units_BD[ctx.span]
            grad_BD[ctx.span] += grad_nB @ units_BD
        return grad_BD, None, None


def pair_statistics(features_BD: Tensor, labels_B: Tensor, reduction: Reduction = hardest, *, group: Group = None) -> tuple[Tensor, ...]:
    """The result of `reduction` on every sample's cosines with all samples, [B] or [B, k] each, equal on every rank.

    features_BD  global batch (the same rows on every rank), any norm; the gradient is this rank's part, as in similarity_statistics
    labels_B     int64 global class ids
    reduction    maps (cosines [n, B], is_positive [n, B], is_negative [n, B]) of a block of n samples to float tensors [n] or [n, k], row
                 by row, in torch operations; backward calls it again. A sample is neither its own positive nor its own negative

    A rank computes B / N rows: 2 B^2 D / N operations, 6 more in backward. Communicates 1 all-gather of all results; backward 1
    reduce-scatter of the same. Memory beyond inputs: a few times a block of 16 MB."""
    units_BD, _ = unit_rows(features_BD)
    batch, ranks = len(labels_B), collectives.world_size(group)
    counts, parts = _rows(batch, units_BD.element_size(), group)

    def block(units_BD: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        is_same_nB = labels_B[start:stop, None] == labels_B
        is_self_nB = torch.arange(start, stop, device=labels_B.device)[:, None] == torch.arange(batch, device=labels_B.device)
        return reduction(_Products.apply(units_BD, start, stop), is_same_nB & ~is_self_nB, ~is_same_nB)

    blocks = [checkpoint(block, units_BD, start, stop, use_reentrant=False) for start, stop in parts]
    columns = [torch.cat([part[place] for part in blocks]) for place in range(len(blocks[0]))]
    if ranks == 1:
        return tuple(columns)
    wide = [column[:, None] if column.dim() == 1 else column for column in columns]
    # Every rank's loss sends all results the same gradient, so the reduce-scatter sums N equal ones.
    packed_BK = collectives.gather_rows(torch.cat(wide, dim=1), group, 1 / ranks, counts)
    split = packed_BK.split([part.shape[1] for part in wide], dim=1)
    return tuple(part[:, 0] if column.dim() == 1 else part for part, column in zip(split, columns, strict=True))


def _rows(batch: int, element_size: int, group: Group) -> tuple[list[int], list[tuple[int, int]]]:
    """(rows of each rank; start and stop of this rank's blocks). A rank without rows has an empty block, for the shapes."""
    share, rank = -(-batch // collectives.world_size(group)), collectives.rank(group)
    counts = [max(0, min(share, batch - other * share)) for other in range(collectives.world_size(group))]
    first, size = min(batch, rank * share), max(1, BLOCK_BYTES // max(1, batch * element_size))
    stop = first + counts[rank]
    return counts, [(start, min(start + size, stop)) for start in range(first, stop, size) or [first]]


def later_rows(is_positive_nB: Tensor, is_negative_nB: Tensor) -> Tensor:
    """bool [n, B]: whether the column's sample comes after the row's, for a reduction that counts each pair once."""
    own_n1 = (~(is_positive_nB | is_negative_nB)).byte().argmax(dim=1, keepdim=True)
    return torch.arange(is_positive_nB.shape[1], device=own_n1.device) > own_n1


@torch.no_grad()
def negative_quantiles(features_BD: Tensor, labels_B: Tensor, shares: Sequence[float], *, group: Group = None) -> Tensor:
    """Quantiles [len(shares)], each share in [0, 1], of the cosines of all pairs of samples of different identities, each pair once; 0
    without such pairs. No gradient. Linear between two cosines like torch.quantile, which takes at most 16 million numbers. Exact, in the
    memory of one block, without waiting for the device: order statistics are found digit by digit, 16 bits at a time, by counting the pairs
    by their next digit. Counts are summed over ranks, so every rank finds the same. A rank computes B^2 D / N products 2 times (float64: 4
    times), each time with 1 all-reduce of 1 MB per share."""
    units_BD, batch = unit_rows(features_BD)[0], len(labels_B)
    sorted_B, place_B = labels_B.sort().values, torch.arange(batch, device=labels_B.device)
    of_identity_B = torch.searchsorted(sorted_B, labels_B, right=True) - torch.searchsorted(sorted_B, labels_B)
    pairs = (batch * batch - of_identity_B.sum()) // 2
    places = torch.stack([share * (pairs - 1).double() for share in shares])
    wanted_K = torch.cat([places.floor(), places.ceil()]).long().clamp_(min=0)  # among the pairs that begin with the digits found so far
    start_K = torch.full_like(wanted_K, -DIGITS // 2)  # the smallest number that does; all of them, as numbers have a sign
    spare_B = DIGITS + place_B % DIGITS  # where others are counted; in a single place the additions would queue up
    for shift in range(8 * units_BD.element_size() - 16, -1, -16):
        counts_KD = start_K.new_zeros(len(start_K), 2 * DIGITS)
        for start, stop in _rows(batch, 8, group)[1]:
            is_pair_nB = (labels_B[start:stop, None] != labels_B) & (place_B[start:stop, None] < place_B)
            with torch.autocast(units_BD.device.type, enabled=False):
                numbers_nB = (_ordered(units_BD[start:stop] @ units_BD.T) >> shift).long()
            for counts_D, first in zip(counts_KD, start_K, strict=True):
                digit_nB = numbers_nB - first
                digit_nB = digit_nB.where(is_pair_nB & (digit_nB >= 0) & (digit_nB < DIGITS), spare_B).flatten()
                counts_D.scatter_add_(0, digit_nB, torch.ones_like(digit_nB))
        up_to_KD = collectives.sum_packed([counts_KD[:, :DIGITS].contiguous()], group)[0].cumsum(dim=1)
        digit_K1 = torch.searchsorted(up_to_KD, wanted_K[:, None], right=True).clamp_(max=DIGITS - 1)
        wanted_K = wanted_K - up_to_KD.gather(1, (digit_K1 - 1).clamp(min=0)).where(digit_K1 > 0, 0)[:, 0]
        start_K = (start_K + digit_K1[:, 0]) << (16 if shift else 0)
    numbers_K = start_K.to(_integers(units_BD))
    below, above = _ordered(numbers_K.view(units_BD.dtype)).view(units_BD.dtype).chunk(2)
    return torch.lerp(below, above, (places - places.floor()).to(below.dtype)).where(pairs > 0, 0)


DIGITS = 1 << 16


def _integers(x: Tensor) -> torch.dtype:
    return {4: torch.int32, 8: torch.int64}[x.element_size()]


def _ordered(x: Tensor) -> Tensor:
    """The bits of floats as integers in the same order. Applied to such integers, it gives the bits of the floats."""
    bits = x.view(_integers(x))
    return bits ^ ((bits >> (8 * x.element_size() - 1)) & torch.iinfo(bits.dtype).max)
