"""The B x B matrix of cosines between the samples of the global batch, reduced row by row like the one with prototypes: for losses on
triplets and pairs. Rows are shared out over ranks, and computed in blocks that backward computes again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from partial_fc import collectives
from partial_fc.collectives import Group
from partial_fc.kernels.entries import unit_rows

BLOCK_BYTES = 16 << 20  # of one block of rows; a reduction makes a few of this size

Reduction = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def hardest(cosines_nB: Tensor, is_positive_nB: Tensor, is_negative_nB: Tensor) -> tuple[Tensor, Tensor]:
    """(smallest cosine with another sample of the same identity, 2 if there is none; largest with another identity, -2 if none), [n]."""
    return cosines_nB.masked_fill(~is_positive_nB, 2.0).amin(dim=1), cosines_nB.masked_fill(~is_negative_nB, -2.0).amax(dim=1)


def pair_statistics(features_BD: Tensor, labels_B: Tensor, reduction: Reduction = hardest, *, group: Group = None) -> tuple[Tensor, ...]:
    """What `reduction` makes of every sample's cosines with all samples, [B] or [B, k] each, equal on every rank.

    features_BD  global batch (the same rows on every rank), any norm; the gradient is this rank's part, as in similarity_statistics
    labels_B     int64 global class ids
    reduction    maps (cosines [n, B], is_positive [n, B], is_negative [n, B]) of a block of n samples to float tensors [n] or [n, k], in
                 torch operations, row by row; it is called again in backward. A sample is neither its own positive nor its negative

    A rank computes B / N rows: 2 B^2 D / N operations, 6 more in backward. Communicates 1 all-gather of all results; backward 1
    reduce-scatter of the same. Memory beyond inputs: a block of 16 MB, a few times.
    """
    units_BD, _ = unit_rows(features_BD)
    batch, ranks = len(labels_B), collectives.world_size(group)
    share = -(-batch // ranks)
    counts = [max(0, min(share, batch - rank * share)) for rank in range(ranks)]
    first = min(batch, collectives.rank(group) * share)
    size = max(1, BLOCK_BYTES // max(1, batch * units_BD.element_size()))

    def block(units_BD: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        is_same_nB = labels_B[start:stop, None] == labels_B
        is_self_nB = torch.arange(start, stop, device=labels_B.device)[:, None] == torch.arange(batch, device=labels_B.device)
        with torch.autocast(units_BD.device.type, enabled=False):
            cosines_nB = units_BD[start:stop] @ units_BD.T
        return reduction(cosines_nB, is_same_nB & ~is_self_nB, ~is_same_nB)

    # A rank without rows reduces none of them, for the shapes.
    starts = range(first, first + counts[collectives.rank(group)], size) or [first]
    stop = first + counts[collectives.rank(group)]
    blocks = [checkpoint(block, units_BD, start, min(start + size, stop), use_reentrant=False) for start in starts]
    columns = [torch.cat([part[place] for part in blocks]) for place in range(len(blocks[0]))]
    if ranks == 1:
        return tuple(columns)
    wide = [column[:, None] if column.dim() == 1 else column for column in columns]
    # Every rank's loss sends all results the same gradient; of N such, the reduce-scatter's sum is N times one.
    packed_BK = collectives.gather_rows(torch.cat(wide, dim=1), group, 1 / ranks, counts)
    parts = packed_BK.split([part.shape[1] for part in wide], dim=1)
    return tuple(part[:, 0] if column.dim() == 1 else part for part, column in zip(parts, columns, strict=True))
