"""The kernel that walks over the classes in chunks, on CPU and GPU: one B x chunk tile exists at a time. Backward computes the tile again,
or on a CPU finds its weights in the memory that the gradient of prototypes is about to fill."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.kernels import Gradients, Known, Question, Rows, Slopes, Wanted
from partial_fc.kernels.entries import Apart, Entries, entry_logits
from partial_fc.kernels.kept import Kept
from partial_fc.kernels.walk import LN_2, Walk, Weights, multiply
from partial_fc.sources import Source


def forward(question: Question, source: Source, keeps: bool = False) -> Rows:
    shifts = question.reduction == "log_sum_exp" and not question.bounded
    sum_B = question.queries_BD.new_zeros(len(question.queries_BD))
    shift_B = torch.full_like(sum_B, -torch.inf) if shifts else torch.zeros_like(sum_B)
    column_S = sum_B.new_empty(source.shape[0]) if question.columns else None
    if not source.shape[0]:
        return Rows(sum_B.clone(), sum_B, shift_B, column_S)
    walk = Walk(question, source)
    # A GPU computes weights again faster than it writes and reads them.
    if keeps and sum_B.device.type == "cpu" and column_S is None:
        room = source.room()
        walk.kept = None if room is None else Kept(room, len(sum_B), question.dtype)
    wants_slope = walk.kept is not None
    hardest_B, apart_B = torch.full_like(sum_B, -torch.inf), torch.full_like(question.target_rows_B, -1)
    for chunk in walk.chunks():
        logits_Bn, _, slope_Bn = walk.tile_of(chunk, wants_slope)
        if column_S is not None:
            column_S[chunk.rows] = torch.logsumexp(logits_Bn.to(sum_B.dtype) / walk.base, dim=0)
        if shifts:
            largest_B = logits_Bn.amax(dim=1)
            larger_B = torch.maximum(shift_B, largest_B.ceil() if walk.is_rounded else largest_B)  # see Walk.weigh
            finite_B = larger_B.clamp(min=-1e30)  # -inf minus -inf would be NaN
            sum_B *= torch.exp2(shift_B - finite_B)
            shift_B = larger_B
        if walk.is_rounded:
            column_B, plain_B, slope_B = walk.take_hardest(chunk, logits_Bn)
            found_B = plain_B if question.bias_S is None else plain_B + question.bias_S[chunk.rows].index_select(0, column_B)
            is_larger_B = found_B > hardest_B
            hardest_B, apart_B = torch.maximum(found_B, hardest_B), (column_B + chunk.rows.start).where(is_larger_B, apart_B)
            if walk.kept is not None:
                if question.reduction == "softplus_sum":
                    weight_B = found_B.sigmoid()
                else:
                    weight_B = torch.exp(found_B - finite_B * LN_2) if shifts else plain_B.exp()
                walk.kept.hardest[chunk.rows.start] = column_B, weight_B if slope_B is None else weight_B * slope_B
        if question.reduction == "softplus_sum":
            sum_B += softplus(logits_Bn).sum(dim=1, dtype=sum_B.dtype)
            if walk.is_rounded:
                sum_B += softplus(found_B)
            if walk.kept is not None:
                walk.keep(chunk, logits_Bn.sigmoid_(), slope_Bn)
            continue
        if shifts:
            logits_Bn -= finite_B[:, None].to(logits_Bn.dtype)  # a number of this type already
            if walk.kept is not None:
                walk.kept.shift_B1[chunk.rows.start] = finite_B[:, None]
        exp_Bn = logits_Bn.exp2_()
        sum_B += walk.row_sums(exp_Bn, chunk.rows)
        walk.keep(chunk, exp_Bn, slope_Bn)
        if walk.is_rounded:
            sum_B += torch.exp(found_B - finite_B * LN_2 if shifts else found_B)
    target_B = Entries.of(question, source, question.target_rows_B).product_B
    return Rows(target_B, sum_B, shift_B * LN_2, column_S, apart_B if walk.is_rounded else None, walk if walk.kept is not None else None)


def backward(question: Question, source: Source, known: Known, slopes: Slopes, wanted: Wanted, walk_type: type[Walk] = Walk) -> Gradients:
    queries_BD = question.queries_BD
    grad_queries_BD = torch.zeros_like(queries_BD)
    grad_bias_S = None if question.bias_S is None else torch.zeros_like(question.bias_S)
    grad_scale_B1 = None if question.scale_B1 is None else torch.zeros_like(question.scale_B1)
    if not source.shape[0]:
        return Gradients(grad_queries_BD, source.collect().gradients() if wanted.source else (), grad_bias_S, grad_scale_B1)
    walk = walk_type(question, source) if known.kept is None else known.kept  # forward's, with its memory
    weights = Weights(walk, known, slopes)
    # Entries computed apart, from rows that are read before a collector can change them.
    targets = Entries.of(question, source, question.target_rows_B)
    apart_BD, apart_grads_BD = targets.gradients(question, slopes.target_B)
    apart = Apart(question.target_rows_B, apart_grads_BD)
    if known.apart_B is not None:
        walk.apart_rows_B = known.apart_B
        hardest = Entries.of(question, source, known.apart_B)
        logit_B, mapped_B, slope_B = entry_logits(question, hardest.product_B)
        biased_B = logit_B if question.bias_S is None else logit_B + question.bias_S[hardest.rows_B]
        weight_B = weights.of_entries(biased_B, hardest.rows_B).where(hardest.is_ours_B, 0)
        by_query_BD, by_row_BD = hardest.gradients(question, weight_B if slope_B is None else weight_B * slope_B)
        apart_BD = apart_BD + by_query_BD
        apart = Apart(torch.cat([apart.rows_n, known.apart_B]), torch.cat([apart_grads_BD, by_row_BD]))

    collector = source.collect(walk.kept.room if walk.kept is not None else None) if wanted.source else None
    factor_B1 = weights.factor_B[:, None] if question.scale_B1 is None else weights.factor_B[:, None] * question.scale_B1
    weighted_BD = (queries_BD * factor_B1).to(question.dtype)
    for chunk in walk.chunks():
        weights_Bn, tile = walk.weigh(chunk, weights)
        if grad_bias_S is not None:
            grad_bias_S[chunk.rows] = torch.mv(weights_Bn.T, weights.factor_B.to(weights_Bn.dtype))
        if grad_scale_B1 is not None and tile.mapped_Bn is not None:
            grad_scale_B1 += (weights_Bn * tile.mapped_Bn).sum(dim=1, keepdim=True)
        if tile.slope_Bn is not None:
            weights_Bn = weights_Bn * tile.slope_Bn
        weights_Bn = weights_Bn.to(question.dtype)
        if wanted.queries:
            _add_product(grad_queries_BD, weights_Bn, walk.operand(chunk))
        if collector is not None:
            collector.store(chunk.rows, walk.prototype_gradient(chunk, weights_Bn, weighted_BD, apart))
    if grad_bias_S is not None and walk.weights_S is not None:
        grad_bias_S *= walk.weights_S
    if grad_scale_B1 is not None:
        grad_scale_B1 *= weights.factor_B[:, None]
    if known.apart_B is not None:
        if grad_bias_S is not None:
            grad_bias_S.index_add_(0, hardest.rows_B, weight_B)
        if grad_scale_B1 is not None:
            grad_scale_B1 += (weight_B * mapped_B)[:, None]
    grad_queries_BD *= factor_B1
    grad_queries_BD += apart_BD
    return Gradients(grad_queries_BD, collector.gradients() if collector else (), grad_bias_S, grad_scale_B1)


def _add_product(sum_BD: Tensor, left_Bn: Tensor, right_nD: Tensor) -> None:
    if left_Bn.dtype is sum_BD.dtype:
        sum_BD.addmm_(left_Bn, right_nD)
    else:
        sum_BD += multiply(left_Bn, right_nD, torch.empty_like(sum_BD)) if sum_BD.is_cuda else left_Bn @ right_nD


def softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x, threshold=40.0)  # torch's 20 drops e^-20 = 2e-9, which float64 tests see


def top(question: Question, source: Source, k: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = len(question.queries_BD)
    best_Bk = question.queries_BD.new_full((batch, k), -torch.inf)
    rows_Bk = torch.zeros(batch, k, dtype=torch.int64, device=best_Bk.device)
    if not source.shape[0]:
        return best_Bk.new_zeros(batch), best_Bk, rows_Bk
    walk = Walk(question._replace(bounded=False), source)
    for chunk in walk.chunks():
        logits_Bn = walk.tile_of(chunk).logits_Bn
        values_Bk, columns_Bk = logits_Bn.topk(min(k, logits_Bn.shape[1]), dim=1)
        candidates = torch.cat([best_Bk, values_Bk], dim=1)
        best_Bk, places_Bk = candidates.topk(k, dim=1)
        rows_Bk = torch.cat([rows_Bk, columns_Bk + chunk.rows.start], dim=1).gather(1, places_Bk)
    target_B = Entries.of(question, source, question.target_rows_B).product_B
    return target_B, best_Bk / walk.base, rows_Bk.where(best_Bk > -torch.inf, 0)
