"""The dense kernel: the B x S matrix in a few lines of torch, in the dtype of its inputs (float64 for the oracle).
It says what the other kernels must compute; autograd derives its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.kernels import Gradients, Rows


def _logits(queries_BD: Tensor, prototypes_SD: Tensor, target_rows_B: Tensor, bias_S: Tensor | None) -> tuple[Tensor, Tensor]:
    """(target [B], non-target logits [B, S] with -inf at the targets)."""
    cosines_BS = queries_BD @ torch.nn.functional.normalize(prototypes_SD, dim=1).T
    is_target_BS = target_rows_B[:, None] == torch.arange(len(prototypes_SD), device=target_rows_B.device)
    target_B = torch.where(is_target_BS, cosines_BS, 0).sum(dim=1)
    logits_BS = cosines_BS if bias_S is None else cosines_BS + bias_S
    return target_B, logits_BS.masked_fill(is_target_BS, -torch.inf)


def forward(queries_BD: Tensor, prototypes_SD: Tensor, target_rows_B: Tensor, bias_S: Tensor | None, bounded: bool) -> Rows:
    target_B, logits_BS = _logits(queries_BD, prototypes_SD, target_rows_B, bias_S)
    shift_B = torch.zeros_like(target_B)
    if not bounded:
        shift_B = logits_BS.amax(dim=1) if len(prototypes_SD) else shift_B - torch.inf
    sum_exp_B = (logits_BS - shift_B.clamp(min=torch.finfo(shift_B.dtype).min)[:, None]).exp().sum(dim=1)
    return Rows(target_B, shift_B, sum_exp_B)


def backward(
    queries_BD: Tensor,
    prototypes_SD: Tensor,
    target_rows_B: Tensor,
    bias_S: Tensor | None,
    bounded: bool,
    log_sum_B: Tensor,
    kept: None,
    grad_target_B: Tensor,
    grad_log_sum_B: Tensor,
) -> Gradients:
    inputs = [queries_BD, prototypes_SD] if bias_S is None else [queries_BD, prototypes_SD, bias_S]
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        target_B, logits_BS = _logits(inputs[0], inputs[1], target_rows_B, None if bias_S is None else inputs[2])
        probability_BS = (logits_BS - log_sum_B.clamp(min=torch.finfo(log_sum_B.dtype).min)[:, None]).exp()
        # The value is wrong, the gradient right: with log_sum held fixed, d/dz of sum_j exp(z_ij - log_sum_i) is exp(z_ij - log_sum_i).
        value = (grad_target_B * target_B).sum() + (grad_log_sum_B[:, None] * probability_BS).sum()
        gradients = torch.autograd.grad(value, inputs)
    return Gradients(gradients[0], gradients[1], None if bias_S is None else gradients[2])
