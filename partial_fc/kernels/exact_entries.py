"""Single entries of the matrix, one per row, from float32 rows: targets and, with rounded tiles, the largest non-target of each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.columns import Columns
from partial_fc.device_policy import policy_of
from partial_fc.kernels import Problem
from partial_fc.unit_rows import inverse_norms


class ExactEntries(NamedTuple):
    """One entry of each row."""

    is_ours_B: Tensor
    columns_B: Tensor  # clamped into those of this rank
    units_BD: Tensor
    inverse_B1: Tensor | None  # None if columns are not normalised
    product_B: Tensor  # <query, unit column>; 0 if another rank has it

    @classmethod
    def of(cls, queries_BD: Tensor, columns: Columns, columns_B: Tensor) -> ExactEntries:
        is_ours_B = (columns_B >= 0) & (columns_B < columns.size)
        columns_B = columns_B.clamp(0, columns.size - 1)
        units_BD = columns.source.load(columns_B)
        inverse_B1 = inverse_norms(units_BD) if columns.normalize else None
        if inverse_B1 is not None:
            units_BD = units_BD * inverse_B1
        product_B = (queries_BD * units_BD).sum(dim=1).masked_fill_(~is_ours_B, 0)
        return cls(is_ours_B, columns_B, units_BD, inverse_B1, product_B)

    def gradients(self, queries_BD: Tensor, slope_B: Tensor) -> tuple[Tensor, Tensor]:
        """(of the queries, of the entries' columns), both [B, D], from d loss / d product."""
        slope_B1 = slope_B.where(self.is_ours_B, 0)[:, None]
        if self.inverse_B1 is None:
            return slope_B1 * self.units_BD, slope_B1 * queries_BD
        across_BD = self.inverse_B1 * (queries_BD - self.product_B[:, None] * self.units_BD)
        return slope_B1 * self.units_BD, slope_B1 * across_BD


class ExactGradients(NamedTuple):
    """Gradients [m, D] of columns that were computed separately, and these columns, which may repeat; -1 stands for other ranks'."""

    columns_m: Tensor
    gradients_mD: Tensor


def entry_logits(problem: Problem, product_B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logit without bias, mapped cosine, slope of the logit by the product or None for 1) of one entry per row, each [B]."""
    if problem.map is None or problem.scale_B1 is None:
        return product_B, product_B, None
    mapped_B1, slope_B1 = problem.map.with_slope(product_B[:, None])
    scaled_B1 = problem.scale_B1 if slope_B1 is None else problem.scale_B1 * slope_B1
    return (problem.scale_B1 * mapped_B1)[:, 0], mapped_B1[:, 0], scaled_B1[:, 0]


def add_rows(sum_nD: Tensor, count: int, place_m: Tensor, rows_mD: Tensor) -> None:
    """Adds each row at its place among the first `count`; places may repeat, and rows with another place are left out. Where the host
    does not look, one extra row takes those."""
    is_here_m = (place_m >= 0) & (place_m < count)
    if policy_of(sum_nD.device).host_looks:
        sum_nD.index_add_(0, place_m[is_here_m], rows_mD[is_here_m].to(sum_nD.dtype))
    else:
        sum_nD.index_add_(0, place_m.where(is_here_m, count), rows_mD)


def target_products(problem: Problem) -> Tensor:
    """<query_i, unit_target> [B]; 0 if another rank has it."""
    if not problem.columns.size:
        return torch.zeros_like(problem.queries_BD[:, 0])
    return ExactEntries.of(problem.queries_BD, problem.columns, problem.columns.targets_B).product_B
