"""Single entries of the similarity matrix, one per row, computed from float32 rows apart from the tiles: targets, and where tiles are
rounded, each row's largest non-target."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from partial_fc.kernels import Question
from partial_fc.sources import Source

EPSILON = 1e-12  # a shorter row has no direction: its cosines and its gradient are 0


def inverse_norms(x_nD: Tensor) -> Tensor:
    """1 / |x| [n, 1]; 0 for rows without a direction."""
    norms_n1 = torch.linalg.vector_norm(x_nD, dim=1, keepdim=True)
    return norms_n1.reciprocal().masked_fill_(norms_n1 < EPSILON, 0)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        inverse_B1 = inverse_norms(x_BD)
        units_BD = x_BD * inverse_B1
        ctx.save_for_backward(units_BD, inverse_B1)
        return units_BD, torch.linalg.vector_norm(x_BD, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (units_BD, inverse_B1), (grad_BD, grad_norms_B) = ctx.saved_tensors, grads
        along_B1 = (grad_BD * units_BD).sum(dim=1, keepdim=True)
        return (grad_BD - units_BD * along_B1) * inverse_B1 + units_BD * grad_norms_B[:, None]


def unit_rows(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(x / |x| [B, D], |x| [B]), with gradient; a row without direction gives zeros and has no gradient."""
    return _UnitRows.apply(x_BD)


class Entries(NamedTuple):
    """One entry of each row, computed from float32 rows: its target; and where tiles are rounded, its largest non-target."""

    is_ours_B: Tensor
    rows_B: Tensor  # clamped into the shard
    units_BD: Tensor
    inverse_B1: Tensor
    product_B: Tensor  # <query, unit prototype>; 0 where another rank has it

    @classmethod
    def of(cls, question: Question, source: Source, rows_B: Tensor) -> Entries:
        is_ours_B = (rows_B >= 0) & (rows_B < source.shape[0])
        rows_B = rows_B.clamp(0, source.shape[0] - 1)
        prototypes_BD = source.load(rows_B)
        inverse_B1 = inverse_norms(prototypes_BD) if question.normalizes else torch.ones_like(prototypes_BD[:, :1])
        units_BD = prototypes_BD * inverse_B1
        product_B = (question.queries_BD * units_BD).sum(dim=1).masked_fill_(~is_ours_B, 0)
        return cls(is_ours_B, rows_B, units_BD, inverse_B1, product_B)

    def gradients(self, question: Question, slope_B: Tensor) -> tuple[Tensor, Tensor]:
        """(of the queries, of the entries' prototypes), both [B, D], from d loss / d product."""
        slope_B1 = slope_B.where(self.is_ours_B, 0)[:, None]
        across_BD = question.queries_BD
        if question.normalizes:
            across_BD = self.inverse_B1 * (across_BD - self.product_B[:, None] * self.units_BD)
        return slope_B1 * self.units_BD, slope_B1 * across_BD


class Apart(NamedTuple):
    """Gradients [n, D] of prototypes computed apart, and their rows, which may repeat; rows outside the shard are others'."""

    rows_n: Tensor
    gradients_nD: Tensor


def entry_logits(question: Question, product_B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logit without bias, mapped cosine, slope of the logit by the product or None for 1) of one entry per row, each [B]."""
    if question.map is None or question.scale_B1 is None:
        return product_B, product_B, None
    mapped_B1, slope_B1 = question.map.with_slope(product_B[:, None], question.parameter_B1)
    scaled_B1 = question.scale_B1 if slope_B1 is None else question.scale_B1 * slope_B1
    return (question.scale_B1 * mapped_B1)[:, 0], mapped_B1[:, 0], scaled_B1[:, 0]


def add_rows(sum_nD: Tensor, count: int, place_B: Tensor, rows_BD: Tensor) -> None:
    """Adds each row at its place among the first `count`, which may repeat; rows with another place are left out. On a GPU one row more
    takes those: picking them out would need the host to wait for the device."""
    is_here_B = (place_B >= 0) & (place_B < count)
    if sum_nD.device.type == "cpu":
        sum_nD.index_add_(0, place_B[is_here_B], rows_BD[is_here_B].to(sum_nD.dtype))
    else:
        sum_nD.index_add_(0, place_B.where(is_here_B, count), rows_BD)
