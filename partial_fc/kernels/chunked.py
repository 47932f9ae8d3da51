"""The kernel in plain torch that walks over the classes in chunks, on CPU and GPU: one B x chunk tile exists at a time.
Backward recomputes the tile: at d = 512 a second product costs less than writing and reading B x S numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.kernels import Gradients, Rows

TILE_BYTES = 8 << 20  # of one logits tile: fits the last-level cache of a CPU socket and the L2 of a GPU beside its operands
EPSILON = 1e-12  # smallest norm divided by, as in torch.nn.functional.normalize


class Tile(NamedTuple):
    """Classes [first, stop) of the shard, n of them."""

    first: int
    stop: int
    units_nD: Tensor  # unit prototypes
    inverse_n1: Tensor  # 1 / |w|
    logits_Bn: Tensor  # -inf at the targets


def _tiles(
    queries_BD: Tensor, prototypes_SD: Tensor, target_rows_B: Tensor, bias_S: Tensor | None, until: int | None = None
) -> Iterator[Tile]:
    """The tiles of all classes, or of those before row `until`, a tile's first; each in the memory of the one before it."""
    (batch, width), classes = queries_BD.shape, len(prototypes_SD)
    largest = max(256, TILE_BYTES // (max(batch, 1) * queries_BD.element_size()))
    tiles = max(1, -(-classes // largest))
    size = min(classes, -(-classes // tiles // 64) * 64)  # equal tiles: a short last one would waste cores
    units, logits = queries_BD.new_empty(size, width), queries_BD.new_empty(batch * size)
    for first in range(0, classes if until is None else until, max(1, size)):
        stop = min(first + size, classes)
        prototypes_nD = prototypes_SD[first:stop]
        inverse_n1 = torch.linalg.vector_norm(prototypes_nD, dim=1, keepdim=True).clamp_(min=EPSILON).reciprocal_()
        units_nD = torch.mul(prototypes_nD, inverse_n1, out=units[: stop - first])
        logits_Bn = logits[: batch * (stop - first)].view(batch, stop - first)
        torch.mm(queries_BD, units_nD.T, out=logits_Bn)
        if bias_S is not None:
            logits_Bn += bias_S[first:stop]
        # Targets are masked before the exponential, never subtracted after it. Rows without a target here rewrite their own entry:
        # picking the others out would need the host to wait for the device.
        column_B1 = (target_rows_B - first).clamp(0, stop - first - 1)[:, None]
        is_here_B1 = ((target_rows_B >= first) & (target_rows_B < stop))[:, None]
        logits_Bn.scatter_(1, column_B1, logits_Bn.gather(1, column_B1).masked_fill_(is_here_B1, -torch.inf))
        yield Tile(first, stop, units_nD, inverse_n1, logits_Bn)


def _targets(queries_BD: Tensor, prototypes_SD: Tensor, target_rows_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row clamped into the shard, is it ours, unit prototype [B, D], inverse norm [B], <query, unit prototype> or 0) per sample."""
    is_ours_B = (target_rows_B >= 0) & (target_rows_B < len(prototypes_SD))
    rows_B = target_rows_B.clamp(0, len(prototypes_SD) - 1)
    prototypes_BD = prototypes_SD[rows_B]
    inverse_B = torch.linalg.vector_norm(prototypes_BD, dim=1).clamp_(min=EPSILON).reciprocal_()
    units_BD = prototypes_BD * inverse_B[:, None]
    target_B = (queries_BD * units_BD).sum(dim=1).masked_fill_(~is_ours_B, 0)
    return rows_B, is_ours_B, units_BD, inverse_B, target_B


def forward(queries_BD: Tensor, prototypes_SD: Tensor, target_rows_B: Tensor, bias_S: Tensor | None, bounded: bool) -> Rows:
    sum_exp_B = queries_BD.new_zeros(len(queries_BD))
    shift_B = sum_exp_B.clone() if bounded else sum_exp_B - torch.inf
    if not len(prototypes_SD):
        return Rows(sum_exp_B.clone(), shift_B, sum_exp_B)
    for tile in _tiles(queries_BD, prototypes_SD, target_rows_B, bias_S):
        if not bounded:
            larger_B = torch.maximum(shift_B, tile.logits_Bn.amax(dim=1))
            finite_B = larger_B.clamp(min=torch.finfo(larger_B.dtype).min)  # -inf minus -inf would be NaN
            sum_exp_B *= torch.exp(shift_B - finite_B)
            tile.logits_Bn.sub_(finite_B[:, None])
            shift_B = larger_B
        sum_exp_B += tile.logits_Bn.exp_().sum(dim=1)
    # The last tile still holds its exponentials: with few classes that spares backward much of its work.
    target_B = _targets(queries_BD, prototypes_SD, target_rows_B)[-1]
    return Rows(target_B, shift_B, sum_exp_B, tile if bounded else None)


def backward(
    queries_BD: Tensor,
    prototypes_SD: Tensor,
    target_rows_B: Tensor,
    bias_S: Tensor | None,
    bounded: bool,
    log_sum_B: Tensor,
    kept: Tile | None,
    grad_target_B: Tensor,
    grad_log_sum_B: Tensor,
) -> Gradients:
    grad_queries_BD = torch.zeros_like(queries_BD)
    grad_prototypes_SD = torch.empty_like(prototypes_SD)
    grad_bias_S = None if bias_S is None else torch.empty_like(bias_S)
    if not len(prototypes_SD):
        return Gradients(grad_queries_BD, grad_prototypes_SD, grad_bias_S)
    # d loss / d z_ij = factor_i exp(z_ij [- log_sum_i]). The factor goes into the operands of the products, so that the exponential
    # is the only full pass over a tile. A row without non-targets has log_sum = -inf and no gradient, rather than exp(inf) 0.
    has_others_B = torch.isfinite(log_sum_B)
    factor_B = (grad_log_sum_B * torch.exp(-log_sum_B) if bounded else grad_log_sum_B).where(has_others_B, 0)
    finite_B1 = log_sum_B.where(has_others_B, 0)[:, None]
    weighted_BD = queries_BD * factor_B[:, None]
    tiles = _tiles(queries_BD, prototypes_SD, target_rows_B, bias_S, until=kept.first if kept else None)
    exponentiated = ((tile, (tile.logits_Bn if bounded else tile.logits_Bn.sub_(finite_B1)).exp_()) for tile in tiles)
    for (first, stop, units_nD, inverse_n1, _), exp_Bn in itertools.chain([(kept, kept.logits_Bn)] if kept else [], exponentiated):
        grad_queries_BD.addmm_(exp_Bn, units_nD)
        grad_nD = torch.mm(exp_Bn.T, weighted_BD, out=grad_prototypes_SD[first:stop])
        # Through w -> w / |w|: the part along w goes, the rest is divided by |w|.
        grad_nD.sub_(units_nD * (grad_nD * units_nD).sum(dim=1, keepdim=True)).mul_(inverse_n1)
        if grad_bias_S is not None:
            torch.mv(exp_Bn.T, factor_B, out=grad_bias_S[first:stop])
    grad_queries_BD *= factor_B[:, None]
    rows_B, is_ours_B, units_BD, inverse_B, target_B = _targets(queries_BD, prototypes_SD, target_rows_B)
    weight_B1 = (grad_target_B * is_ours_B)[:, None]
    grad_queries_BD += weight_B1 * units_BD
    grad_prototypes_SD.index_add_(0, rows_B, weight_B1 * inverse_B[:, None] * (queries_BD - target_B[:, None] * units_BD))
    return Gradients(grad_queries_BD, grad_prototypes_SD, grad_bias_S)
