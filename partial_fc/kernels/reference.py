"""The dense kernel: the B x S matrix in a few lines of torch, in the dtype of its inputs (float64 for the oracle).
It says what the other kernels must compute; autograd derives its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.kernels import Gradients, Known, Question, Rows, Slopes, Wanted
from partial_fc.kernels.entries import EPSILON
from partial_fc.sources import Source


def _logits(question: Question, prototypes_SD: Tensor) -> tuple[Tensor, Tensor]:
    """(target [B], non-target logits [B, S] with -inf at the targets)."""
    if question.normalizes:
        norms_S1 = prototypes_SD.norm(dim=1, keepdim=True)
        prototypes_SD = torch.where(norms_S1 < EPSILON, 0, prototypes_SD / norms_S1.clamp(min=EPSILON))
    cosines_BS = question.queries_BD @ prototypes_SD.T
    rows_S = torch.arange(len(prototypes_SD), device=cosines_BS.device)
    is_target_BS = question.target_rows_B[:, None] == rows_S
    target_B = torch.where(is_target_BS, cosines_BS, 0).sum(dim=1)
    logits_BS = cosines_BS
    if question.map is not None and question.scale_B1 is not None:
        mapped_BS = question.map.function(cosines_BS, question.parameter_B1)
        if question.map.slope == "straight_through":
            mapped_BS = cosines_BS + (mapped_BS - cosines_BS).detach()
        logits_BS = mapped_BS * question.scale_B1
    if question.bias_S is not None:
        logits_BS = logits_BS + question.bias_S
    if question.included_S is not None:
        logits_BS = logits_BS.masked_fill(~question.included_S, -torch.inf)
    masked_BS = question.masked()[:, None] == rows_S if question.masks is None else question.masks[0][:, None] == question.masks[1]
    return target_B, logits_BS.masked_fill(masked_BS, -torch.inf)


def forward(question: Question, source: Source, keeps: bool = False) -> Rows:
    target_B, logits_BS = _logits(question, source.load(slice(0, source.shape[0])))
    shift_B = torch.zeros_like(target_B)
    column_S = torch.logsumexp(logits_BS, dim=0) if question.columns else None
    if question.reduction == "softplus_sum":
        return Rows(target_B, torch.logaddexp(logits_BS, torch.zeros_like(logits_BS)).sum(dim=1), shift_B, column_S)
    if not question.bounded:
        shift_B = logits_BS.amax(dim=1) if logits_BS.shape[1] else shift_B - torch.inf
    sum_B = (logits_BS - shift_B.clamp(min=-1e30)[:, None]).exp().sum(dim=1)
    return Rows(target_B, sum_B, shift_B, column_S)


def backward(question: Question, source: Source, known: Known, slopes: Slopes, wanted: Wanted) -> Gradients:
    named = {
        "queries": question.queries_BD,
        "source": source.load(slice(0, source.shape[0])),
        "bias": question.bias_S,
        "scale": question.scale_B1,
    }
    with torch.enable_grad():
        inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in named.items() if tensor is not None}
        question = question._replace(queries_BD=inputs["queries"], bias_S=inputs.get("bias"), scale_B1=inputs.get("scale"))
        target_B, logits_BS = _logits(question, inputs["source"])
        value = (slopes.target_B * target_B).sum()
        if question.reduction == "softplus_sum":
            value = value + (slopes.sum_B[:, None] * torch.logaddexp(logits_BS, torch.zeros_like(logits_BS))).sum()
        else:
            # The value is wrong, the gradient right: with log_sum held fixed, the slope of sum_j exp(z_ij - log_sum_i) is its terms.
            probability_BS = (logits_BS - known.log_sum_B.clamp(min=-1e30)[:, None]).exp()
            value = value + (slopes.sum_B.where(torch.isfinite(known.log_sum_B), 0)[:, None] * probability_BS).sum()
        if known.column_S is not None and slopes.column_S is not None:
            is_finite_S = torch.isfinite(known.column_S)
            probability_BS = (logits_BS - known.column_S.where(is_finite_S, 0)).exp()
            value = value + (slopes.column_S.where(is_finite_S, 0) * probability_BS).sum()
        found = dict(zip(inputs, torch.autograd.grad(value, list(inputs.values()), allow_unused=True, materialize_grads=True), strict=True))
    if not wanted.source:
        return Gradients(found["queries"], (), found.get("bias"), found.get("scale"))
    collector = source.collect()
    collector.store(slice(0, source.shape[0]), found["source"])
    return Gradients(found["queries"], collector.gradients(), found.get("bias"), found.get("scale"))


def top(question: Question, source: Source, k: int) -> tuple[Tensor, Tensor, Tensor]:
    target_B, logits_BS = _logits(question, source.load(slice(0, source.shape[0])))
    missing_Bk = logits_BS.new_full((len(logits_BS), k), -torch.inf)
    values_Bk, rows_Bk = torch.cat([logits_BS, missing_Bk], dim=1).topk(k, dim=1)
    return target_B, values_Bk, rows_Bk.where(values_Bk > -torch.inf, 0)
