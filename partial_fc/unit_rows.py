"""Directions of rows: x / |x| and 1 / |x|, with one rule for rows too short to have a direction."""

from typing import Any

import torch
from torch import Tensor

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
    """(x / |x| [B, D], |x| [B]), with gradient; a row without a direction gives zeros and has no gradient."""
    return _UnitRows.apply(x_BD)
