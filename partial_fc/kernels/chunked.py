"""The kernel in chunks of columns, on CPU and GPU: one B x chunk tile at a time, which backward recomputes unless its weights were kept."""

import torch
from torch import Tensor

from partial_fc.device_policy import policy_of
from partial_fc.kernels import ForwardResult, Gradients, NeededGradients, Problem, ShardStatistics, Slopes
from partial_fc.kernels.exact_entries import ExactEntries, ExactGradients, entry_logits, target_products
from partial_fc.kernels.tiles import TileLoop, multiply
from partial_fc.kernels.weight_cache import CachingLoop, loop_for


def forward(problem: Problem, needed: NeededGradients) -> ShardStatistics:
    statistic, queries_BD = problem.statistic, problem.queries_BD
    sum_B = queries_BD.new_zeros(len(queries_BD))
    largest_B = torch.full_like(sum_B, -torch.inf) if problem.shifts else torch.zeros_like(sum_B)
    if not problem.columns.size:
        return ShardStatistics(sum_B.clone(), sum_B, largest_B)
    loop = loop_for(problem, needed)
    cache = loop if isinstance(loop, CachingLoop) else None
    hardest_B, exact_columns_B = torch.full_like(sum_B, -torch.inf), torch.full_like(problem.columns.targets_B, -1)
    for chunk in loop.chunks():
        tile = loop.tile_of(chunk, wants_slope=cache is not None)
        shift_B = hardest = None
        if problem.shifts:
            of_tile_B = tile.logits_Bn.amax(dim=1)
            if loop.is_rounded:
                of_tile_B = of_tile_B.ceil()  # whole numbers cost the few digits of the tile nothing
            new_largest_B = torch.maximum(largest_B, of_tile_B)
            shift_B = new_largest_B.clamp(min=-1e30)  # -inf minus -inf would be NaN
            sum_B *= torch.exp2(largest_B - shift_B)
            largest_B = new_largest_B
        if loop.is_rounded:
            hardest = loop.take_hardest(chunk, tile.logits_Bn)
            is_larger_B = hardest.logit_B > hardest_B
            hardest_B = torch.maximum(hardest.logit_B, hardest_B)
            exact_columns_B = (hardest.place_B + chunk.span.start).where(is_larger_B, exact_columns_B)
        if shift_B is not None:
            tile.logits_Bn.sub_(shift_B[:, None].to(tile.logits_Bn.dtype))  # exact in this dtype
        terms_Bn = statistic.terms_(tile.logits_Bn)
        sum_B += loop.row_sums(terms_Bn, chunk.span)
        if hardest is not None:
            sum_B += statistic.term(hardest.logit_B, 0.0 if shift_B is None else shift_B / loop.base)
        if cache is not None:
            cache.keep(chunk, tile, terms_Bn, hardest, shift_B)
    return ShardStatistics(target_products(problem), sum_B, largest_B / loop.base, exact_columns_B if loop.is_rounded else None, cache)


def backward(problem: Problem, result: ForwardResult, slopes: Slopes, needed: NeededGradients) -> Gradients:
    queries_BD, columns, statistic = problem.queries_BD, problem.columns, problem.statistic
    grad_queries_BD = torch.zeros_like(queries_BD)
    grad_bias_n = None if columns.bias_n is None else torch.zeros_like(columns.bias_n)
    grad_scale_B1 = None if problem.scale_B1 is None else torch.zeros_like(problem.scale_B1)
    if not columns.size:
        return Gradients(grad_queries_BD, columns.source.collector().gradients() if needed.source else (), grad_bias_n, grad_scale_B1)
    cache: CachingLoop | None = result.cache  # a loop with memory for the gradient: forward's, or that of another kernel
    loop = TileLoop(problem) if cache is None else cache
    row_factor_B, shift_B1 = statistic.row_factors(slopes.value_B, result.value_B, problem.shifts, loop.is_rounded)
    # Exact entries come from rows that are read before a collector can change them.
    targets = ExactEntries.of(queries_BD, columns, columns.targets_B)
    exact_BD, of_targets_BD = targets.gradients(queries_BD, slopes.target_B)
    exact = ExactGradients(columns.targets_B, of_targets_BD)
    if result.exact_columns_B is not None:
        loop.exact_columns_B = result.exact_columns_B
        hardest = ExactEntries.of(queries_BD, columns, result.exact_columns_B)
        logit_B, mapped_B, slope_B = entry_logits(problem, hardest.product_B)
        biased_B = logit_B if columns.bias_n is None else logit_B + columns.bias_n[hardest.columns_B]
        weight_B = (slopes.value_B * statistic.weight(biased_B, result.value_B)).where(hardest.is_ours_B, 0)
        by_query_BD, by_column_BD = hardest.gradients(queries_BD, weight_B if slope_B is None else weight_B * slope_B)
        exact_BD = exact_BD + by_query_BD
        exact = ExactGradients(torch.cat([exact.columns_m, result.exact_columns_B]), torch.cat([of_targets_BD, by_column_BD]))

    collector = columns.source.collector(None if cache is None else cache.gradient_SD) if needed.source else None
    factor_B1 = row_factor_B[:, None] if problem.scale_B1 is None else row_factor_B[:, None] * problem.scale_B1
    weighted_BD = (queries_BD * factor_B1).to(problem.dtype)
    for chunk in loop.chunks():
        weights_Bn, tile = loop.weigh(chunk, shift_B1)
        if grad_bias_n is not None:
            grad_bias_n[chunk.span] = torch.mv(weights_Bn.T, row_factor_B.to(weights_Bn.dtype))
        if grad_scale_B1 is not None and tile.mapped_Bn is not None:
            grad_scale_B1 += (weights_Bn * tile.mapped_Bn).sum(dim=1, keepdim=True)
        if tile.slope_Bn is not None:
            weights_Bn = weights_Bn * tile.slope_Bn
        weights_Bn = weights_Bn.to(problem.dtype)
        if needed.queries:
            _add_product(grad_queries_BD, weights_Bn, loop.operand(chunk))
        if collector is not None:
            collector.store(chunk.span, loop.column_gradient(chunk, weights_Bn, weighted_BD, exact))
    if grad_bias_n is not None and loop.weights_n is not None:
        grad_bias_n *= loop.weights_n
    if grad_scale_B1 is not None:
        grad_scale_B1 *= row_factor_B[:, None]
    if result.exact_columns_B is not None:
        if grad_bias_n is not None:
            grad_bias_n.index_add_(0, hardest.columns_B, weight_B)
        if grad_scale_B1 is not None:
            grad_scale_B1 += (weight_B * mapped_B)[:, None]
    grad_queries_BD *= factor_B1
    grad_queries_BD += exact_BD
    return Gradients(grad_queries_BD, collector.gradients() if collector else (), grad_bias_n, grad_scale_B1)


def _add_product(sum_BD: Tensor, left_Bn: Tensor, right_nD: Tensor) -> None:
    if left_Bn.dtype is sum_BD.dtype:
        sum_BD.addmm_(left_Bn, right_nD)
    else:
        is_wide = policy_of(sum_BD.device).has_wide_products
        sum_BD += multiply(left_Bn, right_nD, torch.empty_like(sum_BD)) if is_wide else left_Bn @ right_nD


def top(problem: Problem, k: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = len(problem.queries_BD)
    best_Bk = problem.queries_BD.new_full((batch, k), -torch.inf)
    columns_Bk = torch.zeros(batch, k, dtype=torch.int64, device=best_Bk.device)
    if not problem.columns.size:
        return best_Bk.new_zeros(batch), best_Bk, columns_Bk
    loop = TileLoop(problem)
    for chunk in loop.chunks():
        logits_Bn = loop.tile_of(chunk).logits_Bn
        values_Bk, places_Bk = logits_Bn.topk(min(k, logits_Bn.shape[1]), dim=1)
        candidates = torch.cat([best_Bk, values_Bk], dim=1)
        best_Bk, chosen_Bk = candidates.topk(k, dim=1)
        columns_Bk = torch.cat([columns_Bk, places_Bk + chunk.span.start], dim=1).gather(1, chosen_Bk)
    return target_products(problem), best_Bk / loop.base, columns_Bk.where(best_Bk > -torch.inf, 0)
