"""The one primitive: the B x C matrix of cosines, reduced to the few numbers per row that a loss needs, without ever storing it.
Class shards over ranks, exact gradients; a loss is a few lines on the vectors that come out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from partial_fc import collectives
from partial_fc.collectives import Group
from partial_fc.kernels import Kernel, chunked, reference

KERNELS: dict[str, Kernel] = {"reference": reference, "chunked": chunked}
LARGEST_UNSHIFTED = 64.0  # |logit| up to which float32 sums 1e8 exponentials without a maximum pass


class Statistics(NamedTuple):
    """What a loss sees, for all B samples of the global batch, equal on every rank."""

    target_B: Tensor  # cos(x_i, w_{y_i})
    non_target_B: Tensor  # log sum over j != y_i of exp(scale_i cos(x_i, w_j) + bias_j); -inf where there is no other class
    norms_B: Tensor  # |x_i|, with gradient


class _RowStatistics(torch.autograd.Function):
    """(target logits [B], log-sum-exp over all ranks' non-target classes [B]) from queries = scale x unit features."""

    @staticmethod
    def forward(
        ctx: Any, queries_BD: Tensor, prototypes_SD: Tensor, bias_S: Tensor | None, rows_B: Tensor, bounded: bool, kernel: str, group: Group
    ) -> tuple[Tensor, Tensor]:
        target_B, shift_B, sum_exp_B, ctx.kept = KERNELS[kernel].forward(queries_BD, prototypes_SD, rows_B, bias_S, bounded)
        if bounded:
            target_B, sum_exp_B = collectives.sum_packed([target_B, sum_exp_B], group)
            log_sum_B = sum_exp_B.log()
        else:
            target_NB, shift_NB, sum_exp_NB = collectives.gather_packed([target_B, shift_B, sum_exp_B], group)
            target_B = target_NB.sum(dim=0)
            log_sum_B = torch.logsumexp(shift_NB + sum_exp_NB.log(), dim=0)
        ctx.save_for_backward(queries_BD, prototypes_SD, bias_S, rows_B, log_sum_B)
        ctx.bounded, ctx.kernel = bounded, kernel
        return target_B, log_sum_B

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Every rank computes the same loss from the same vectors, so the all-reduce's backward is the identity: each rank
        # continues with its own classes, and the sum over ranks happens where the features are reduce-scattered.
        queries_BD, prototypes_SD, bias_S, rows_B, log_sum_B = ctx.saved_tensors
        queries, prototypes, bias = KERNELS[ctx.kernel].backward(
            queries_BD, prototypes_SD, rows_B, bias_S, ctx.bounded, log_sum_B, ctx.kept, *grads
        )
        return queries, prototypes, bias, None, None, None, None


def similarity_statistics(
    features_BD: Tensor,
    prototypes_SD: Tensor,
    labels_B: Tensor,
    *,
    scale: float | Tensor,
    first_class: int = 0,
    column_bias_S: Tensor | None = None,
    bias_is_bounded: bool = False,
    kernel: str = "chunked",
    group: Group = None,
) -> Statistics:
    """Target cosine and non-target log-sum-exp of every sample of the global batch against every class of all ranks.

    features_BD    global batch (the same rows on every rank), any norm; gradient is this rank's part of the sum over classes
    prototypes_SD  this rank's classes [first_class, first_class + S), any norm, normalised here; S = 0 is allowed
    labels_B       int64 global class ids
    scale          a number, or a vector [B] with gradient (feature norms)
    column_bias_S  added to the non-target logits of this rank's classes, with gradient; never to the target. -inf leaves a class out
    bias_is_bounded  promises that exp(bias), summed over the classes of all ranks, stays below 1e8, so that no maximum is needed
    kernel         "chunked", or "reference" (stores B x S; float64 oracle)

    Communicates one packed all-reduce of 2 B floats; if logits may exceed 64 (larger or vector scale, a bias), one all-gather of
    3 B floats instead. Memory beyond inputs and gradients: one tile of B x chunk (8 MB). Nothing of size B x S is kept for backward.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is unknown: choose one of {', '.join(KERNELS)}")
    if features_BD.shape[1] != prototypes_SD.shape[1]:
        raise ValueError(f"features have width {features_BD.shape[1]}, but the prototypes have width {prototypes_SD.shape[1]}")
    norms_B = torch.linalg.vector_norm(features_BD, dim=1)
    scale_B1 = scale[:, None] if isinstance(scale, Tensor) else scale
    queries_BD = features_BD / norms_B.clamp(min=chunked.EPSILON)[:, None] * scale_B1
    bounded = not isinstance(scale, Tensor) and abs(scale) <= LARGEST_UNSHIFTED and (column_bias_S is None or bias_is_bounded)
    # The rest depends on the rows alone, not on this rank's classes.
    norms_B = collectives.replicated(norms_B, group)
    scale = collectives.replicated(scale, group) if isinstance(scale, Tensor) else scale
    target_logit_B, non_target_B = _RowStatistics.apply(
        queries_BD, prototypes_SD, column_bias_S, labels_B - first_class, bounded, kernel, group
    )
    return Statistics(target_logit_B / scale, non_target_B, norms_B)


@torch.no_grad()
def hardest_non_target(
    features_BD: Tensor, prototypes_SD: Tensor, labels_B: Tensor, *, first_class: int = 0, group: Group = None
) -> tuple[Tensor, Tensor]:
    """(target cosine [B], largest non-target cosine [B]) over all ranks, without gradient: what monitoring shows.

    One product with every class and 1 all-gather of 2 B floats; -inf where there is no other class."""
    units_BD = features_BD / torch.linalg.vector_norm(features_BD, dim=1, keepdim=True).clamp(min=chunked.EPSILON)
    target_B, hardest_B, *_ = chunked.forward(units_BD, prototypes_SD, labels_B - first_class, None, bounded=False)
    target_NB, hardest_NB = collectives.gather_packed([target_B, hardest_B], group)
    return target_NB.sum(dim=0), hardest_NB.amax(dim=0)
