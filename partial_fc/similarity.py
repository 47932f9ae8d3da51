"""The one primitive: the B x C matrix of cosines, reduced to the few numbers per row that a loss needs, without ever storing it.
Class shards over ranks, exact gradients; a loss is a few lines on the vectors that come out."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from partial_fc import collectives
from partial_fc.collectives import Group
from partial_fc.kernels import Kernel, Known, Question, Slopes, Wanted, chunked, fused, reference
from partial_fc.kernels.entries import Entries, add_rows, unit_rows
from partial_fc.kernels.walk import TILE_BYTES
from partial_fc.maps import Map
from partial_fc.sources import Matrix, Source

KERNELS: dict[str, Kernel] = {"reference": reference, "chunked": chunked, "triton": fused}
LARGEST_UNSHIFTED = 64.0  # |logit| up to which float32 sums 1e8 exponentials without a maximum pass: e^64 x 1e8 < 3e38
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Statistics(NamedTuple):
    """What a loss sees, for all B samples of the global batch, equal on every rank."""

    target_B: Tensor  # cos(x_i, w_{y_i})
    non_target_B: Tensor  # the reduction over all j != y_i; -inf for a log-sum-exp of nothing. [B, k] for top_k, as ranked
    norms_B: Tensor  # |x_i|, with gradient
    classes_Bk: Tensor | None = None  # of top_k: int64 global class ids (-1 where there are fewer classes)
    column_S: Tensor | None = None  # log-sum-exp over the samples of other classes, for each class of this rank


def similarity_statistics(
    features_BD: Tensor,
    prototypes: Tensor | Source,
    labels_B: Tensor,
    *,
    scale: float | Tensor,
    reduction: Literal["log_sum_exp", "softplus_sum", "top_k"] = "log_sum_exp",
    k: int = 1,
    threshold: Tensor | None = None,
    column_bias_S: Tensor | None = None,
    bias_is_bounded: bool = False,
    included_S: Tensor | None = None,
    map: Map | None = None,
    map_parameter_B: Tensor | None = None,
    first_class: int = 0,
    classes_S: Tensor | None = None,
    column_labels_S: Tensor | None = None,
    target_columns_B: Tensor | None = None,
    masked_columns_B: Tensor | None = None,
    normalize_prototypes: bool = True,
    column_statistics: bool = False,
    dtype: str = "float32",
    kernel: str = "auto",
    group: Group = None,
) -> Statistics:
    """Target cosine and non-target statistic of every sample of the global batch against every class of all ranks.

    features_BD    global batch (the same rows on every rank), any norm; the gradient is this rank's part of the sum over classes.
                   A row without direction (norm 0) has cosines 0 and no gradient; a prototype likewise
    prototypes     this rank's classes [first_class, first_class + S): a matrix [S, D] or a Source; any norm, normalised here unless
                   normalize_prototypes is off; S = 0 is allowed
    labels_B       int64 global class ids
    scale          s, a number, or a vector [B] with gradient (feature norms)
    reduction      of the logits z_ij = s_i cos_ij + bias_j over the non-targets j of row i:
                   "log_sum_exp"   log sum_j exp(z_ij)                      gradient dense
                   "softplus_sum"  sum_j log(1 + exp(z_ij - threshold))     gradient dense; to threshold too
                   "top_k"         the k largest cosines (bias only ranks them; -2 where there are fewer), with their classes; gradient
                                   to these alone
    threshold      scalar with gradient, complete on every rank
    column_bias_S  added to the non-target logits of this rank's classes, with gradient; never to the target
    bias_is_bounded  promises that exp(bias), summed over all classes, lies between 1e-8 and 1e8, so that no maximum is needed
    included_S     bool: False leaves a class out of all rows' non-targets
    map            replaces non-target cosines element by element (partial_fc.maps), with a parameter per row, [B], without gradient
    classes_S, target_columns_B  where columns are not the classes from first_class on: the class of each column, and the column of each
                   row's target on this rank (-1: elsewhere)
    masked_columns_B  where it is not the target's: the column of each row on this rank that is none of its non-targets (-1: elsewhere)
    column_labels_S  where several columns may have a row's label: the label of each. No column of its label is a row's non-target
    column_statistics  also return log sum_i exp(z_ij) over the samples i of other classes, per class of this rank, with gradient
    dtype          of the products with prototypes: "float32" (float64 for float64 features), or "bfloat16" with sums in float32 and
                   target entries from float32 rows
    kernel         "auto" (triton for bfloat16 on a GPU, else chunked); "chunked"; "triton" (GPU; no map, no column statistics);
                   "reference" (stores B x S; the float64 oracle)

    Communicates 1 packed all-reduce of 2 B floats. If logits may exceed 64 (larger or vector scale, bias, map), 1 all-gather of 3 B
    floats instead; for top_k 1 of (3 k + 1) B; backward 1 all-reduce of a scalar for a threshold. Memory beyond inputs and
    gradients: one tile of B x chunk (8 MB) and chunks of prototypes. On a CPU forward already takes the memory of the
    prototypes' gradient, and keeps in it what it can of what backward would compute again.
    """
    source: Source = Matrix(prototypes) if isinstance(prototypes, Tensor) else prototypes
    _check(features_BD, source, reduction, k, map, column_statistics, dtype, threshold)
    features_BD, norms_B = unit_rows(features_BD)
    scale_B1 = scale[:, None] if isinstance(scale, Tensor) else None
    if threshold is not None:
        minus_S = -collectives.shared(threshold, group).expand(source.shape[0])
        column_bias_S = minus_S if column_bias_S is None else column_bias_S + minus_S
    bound = float("inf") if isinstance(scale, Tensor) else abs(scale) * (map.bound if map is not None else 1.0)
    if map is not None and not isinstance(scale, Tensor):
        scale_B1 = features_BD.new_full((len(features_BD), 1), scale)
    question = Question(
        queries_BD=features_BD if map is not None or reduction == "top_k" else features_BD * (scale if scale_B1 is None else scale_B1),
        target_rows_B=labels_B - first_class if target_columns_B is None else target_columns_B,
        masked_rows_B=masked_columns_B,
        reduction="softplus_sum" if reduction == "softplus_sum" else "log_sum_exp",
        bounded=normalize_prototypes and bound <= LARGEST_UNSHIFTED and (column_bias_S is None or bias_is_bounded),
        bias_S=column_bias_S,
        included_S=included_S,
        masks=None if column_labels_S is None else (labels_B, column_labels_S),
        map=map,
        scale_B1=scale_B1 if map is not None else None,
        parameter_B1=None if map_parameter_B is None else map_parameter_B.detach()[:, None],
        normalizes=normalize_prototypes,
        columns=column_statistics,
        dtype=features_BD.dtype if dtype == "float32" else DTYPES[dtype],
    )
    chosen = _choose(kernel, question)
    # The rest depends on the rows alone, not on this rank's classes.
    norms_B = collectives.replicated(norms_B, group)
    if reduction == "top_k":
        if classes_S is None:
            classes_S = torch.arange(first_class, first_class + source.shape[0], device=features_BD.device)
        target_B, values_Bk, classes_Bk = _Top.apply(question.queries_BD, question, source, k, classes_S, chosen, group, *source.tensors)
        return Statistics(target_B, values_Bk, norms_B, classes_Bk)
    keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in source.tensors)
    if question.scale_B1 is not None and question.scale_B1.requires_grad:
        keeps = False  # its gradient needs the mapped cosines
    if (map is not None and map.slope == "exact") or (reduction == "log_sum_exp" and not question.bounded):
        # For the gradient of the bias what is kept has the map's slope too much, or in bfloat16 too few digits where logits are large.
        keeps = keeps and not (question.bias_S is not None and question.bias_S.requires_grad)
    target_B, reduced_B, column_S = _Sums.apply(
        question.queries_BD, question.bias_S, question.scale_B1, question, source, chosen, group, keeps, *source.tensors
    )
    if map is None:
        target_B = target_B / (collectives.replicated(scale, group) if isinstance(scale, Tensor) else scale)
    return Statistics(target_B, reduced_B, norms_B, None, column_S)


def _check(
    features_BD: Tensor, source: Source, reduction: str, k: int, map: Map | None, columns: bool, dtype: str, threshold: Tensor | None
) -> None:
    if features_BD.shape[1] != source.shape[1]:
        raise ValueError(f"features have width {features_BD.shape[1]}, but the prototypes have width {source.shape[1]}")
    if reduction not in ("log_sum_exp", "softplus_sum", "top_k"):
        raise ValueError(f"reduction {reduction!r} is unknown: choose log_sum_exp, softplus_sum or top_k")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    if reduction == "top_k" and (k < 1 or map is not None or columns):
        raise ValueError(f"top_k takes k >= 1 and neither map nor column_statistics, but got k = {k}")
    if threshold is not None and reduction != "softplus_sum":
        raise ValueError(f"a threshold belongs to softplus_sum, but the reduction is {reduction}: use column_bias_S")


def _choose(kernel: str, question: Question) -> Kernel:
    """Of its own accord "triton" for bfloat16 on a GPU, where it can; the products of float32 are faster in cuBLAS."""
    if kernel == "auto":
        is_faster = question.queries_BD.is_cuda and question.dtype is torch.bfloat16
        return fused if is_faster and fused.refusal(question) is None else chunked
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is unknown: choose one of auto, {', '.join(KERNELS)}")
    if kernel == "triton" and (refusal := fused.refusal(question)) is not None:
        raise ValueError(f"kernel 'triton' {refusal}")
    return KERNELS[kernel]


def _no_autocast(x: Tensor) -> torch.autocast:
    """Products here have the precision that was asked for, also inside a region of mixed precision."""
    return torch.autocast(x.device.type, enabled=False)


class _Sums(torch.autograd.Function):
    """(target product [B], log-sum-exp or softplus sum over all ranks' non-targets [B], column log-sum-exp [S] or None)."""

    @staticmethod
    def forward(
        ctx: Any,
        queries_BD: Tensor,
        bias_S: Tensor | None,
        scale_B1: Tensor | None,
        question: Question,
        source: Source,
        kernel: Kernel,
        group: Group,
        keeps: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # Without their history: the arguments beside them are what autograd follows.
        question = question._replace(
            queries_BD=queries_BD.detach(),
            bias_S=None if bias_S is None else bias_S.detach(),
            scale_B1=None if scale_B1 is None else scale_B1.detach(),
        )
        with _no_autocast(queries_BD):
            rows = kernel.forward(question, source, keeps)
        if question.bounded or question.reduction == "softplus_sum":
            target_B, sum_B = collectives.sum_packed([rows.target_B, rows.sum_B], group)
            log_sum_B = sum_B.log()
        else:
            target_NB, shift_NB, sum_NB = collectives.gather_packed([rows.target_B, rows.shift_B, rows.sum_B], group)
            target_B = target_NB.sum(dim=0)
            log_sum_B = torch.logsumexp(shift_NB + sum_NB.log(), dim=0)
        reduced_B, column_S = (sum_B if question.reduction == "softplus_sum" else log_sum_B), rows.column_S
        ctx.save_for_backward(*tensors)  # for torch to notice if they change before backward
        ctx.question, ctx.source, ctx.kernel, ctx.log_sum_B = question, source, kernel, log_sum_B.detach()
        # An output kept as it is would keep this node, and itself, alive.
        ctx.column_S, ctx.apart_B, ctx.kept = None if column_S is None else column_S.detach(), rows.apart_B, rows.kept
        return target_B, reduced_B, column_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Every rank computes the same loss from the same vectors, so the all-reduce's backward is the identity: each rank
        # continues with its own classes, and the sum over ranks happens where the features are reduce-scattered.
        queries, _, _, _, _, _, _, _, *tensors = ctx.needs_input_grad
        wanted = Wanted(queries, any(tensors))
        known, ctx.kept = Known(ctx.log_sum_B, ctx.column_S, ctx.apart_B, ctx.kept), None  # to be used once
        assert len(ctx.saved_tensors) == len(tensors)
        with _no_autocast(ctx.log_sum_B):
            gradients = ctx.kernel.backward(ctx.question, ctx.source, known, Slopes(*grads), wanted)
        of_source = gradients.source if wanted.source else (None,) * len(tensors)
        return gradients.queries_BD, gradients.bias_S, gradients.scale_B1, None, None, None, None, None, *of_source


class _Top(torch.autograd.Function):
    """(target cosine [B], the k largest non-target cosines over all ranks [B, k], their classes [B, k])."""

    @staticmethod
    def forward(
        ctx: Any,
        queries_BD: Tensor,
        question: Question,
        source: Source,
        k: int,
        classes_S: Tensor,
        kernel: Kernel,
        group: Group,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        question = question._replace(queries_BD=queries_BD.detach())
        with _no_autocast(queries_BD):
            target_B, ranking_Bk, rows_Bk = kernel.top(question, source, k)
        cosines_Bk, ids_Bk = torch.zeros_like(ranking_Bk), torch.zeros_like(rows_Bk)
        if source.shape[0]:
            ids_Bk = classes_S[rows_Bk]
            for place in range(k):  # what ranked them may be rounded and holds the bias: the values come from float32 rows
                cosines_Bk[:, place] = Entries.of(question, source, rows_Bk[:, place]).product_B
        bits = {4: torch.int32, 8: torch.int64}[ranking_Bk.element_size()]  # class ids travel as the bits of floats
        partials = torch.cat([target_B[:, None], ranking_Bk, cosines_Bk, ids_Bk.to(bits).view(ranking_Bk.dtype)], dim=1)
        (packed_NBx,) = collectives.gather_packed([partials], group)
        target_NB1, *of_ranks = packed_NBx.split([1, k, k, k], dim=2)
        ranking_BK, cosines_BK, ids_BK = (x_NBk.transpose(0, 1).reshape(len(target_B), -1) for x_NBk in of_ranks)
        ranking_Bk, places_Bk = ranking_BK.topk(k, dim=1)
        is_there_Bk = ranking_Bk > -torch.inf
        chosen_Bk = ids_BK.view(bits).to(torch.int64).gather(1, places_Bk).where(is_there_Bk, -1)
        is_ours_Bk = is_there_Bk & (places_Bk // k == collectives.rank(group))
        ctx.question, ctx.source, ctx.rows_Bk = question, source, rows_Bk.gather(1, places_Bk % k).where(is_ours_Bk, -1)
        ctx.mark_non_differentiable(chosen_Bk)
        ctx.save_for_backward(*tensors)
        return target_NB1[..., 0].sum(dim=0), cosines_BK.gather(1, places_Bk).where(is_there_Bk, -2.0), chosen_Bk

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        question, source, _ = ctx.question, ctx.source, ctx.saved_tensors
        rows_BK = torch.cat([question.target_rows_B[:, None], ctx.rows_Bk], dim=1)
        slopes_BK = torch.cat([grads[0][:, None], grads[1]], dim=1)
        grad_queries_BD = torch.zeros_like(question.queries_BD)
        of_source: tuple[Tensor | None, ...] = (None,) * len(source.tensors)
        if source.shape[0]:
            entries = []
            for rows_B, slope_B in zip(rows_BK.unbind(1), slopes_BK.unbind(1), strict=True):
                by_query_BD, by_row_BD = Entries.of(question, source, rows_B).gradients(question, slope_B)
                grad_queries_BD += by_query_BD
                entries.append(by_row_BD)
            if any(ctx.needs_input_grad[7:]):
                of_source = _store_entries(source, rows_BK.T.flatten(), torch.cat(entries))
        elif any(ctx.needs_input_grad[7:]):
            of_source = source.collect().gradients()
        return grad_queries_BD, None, None, None, None, None, None, *of_source


def _store_entries(source: Source, rows_n: Tensor, gradient_nD: Tensor) -> tuple[Tensor | None, ...]:
    """A gradient that is zero but for these rows, which may repeat; rows outside the source are others'."""
    collector, (classes, width) = source.collect(), source.shape
    size = max(1, TILE_BYTES // (4 * width))
    for first in range(0, classes, size):
        rows = slice(first, min(first + size, classes))
        chunk_nD = gradient_nD.new_zeros(rows.stop - first + 1, width)
        add_rows(chunk_nD, len(chunk_nD) - 1, rows_n - first, gradient_nD)
        collector.store(rows, chunk_nD[:-1])
    return collector.gradients()


@torch.no_grad()
def hardest_non_target(
    features_BD: Tensor, prototypes_SD: Tensor, labels_B: Tensor, *, first_class: int = 0, group: Group = None
) -> tuple[Tensor, Tensor]:
    """(target cosine [B], largest non-target cosine [B]) over all ranks, without gradient: what monitoring shows.

    One product with every class and 1 all-gather of 4 B floats; -2 where there is no other class."""
    statistics = similarity_statistics(
        features_BD, prototypes_SD, labels_B, scale=1.0, reduction="top_k", first_class=first_class, group=group
    )
    return statistics.target_B, statistics.non_target_B[:, 0]
