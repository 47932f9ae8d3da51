"""The dense kernel: the B x n matrix in a few lines of torch, in the dtype of its inputs (float64 for the oracle). It defines what the
other kernels must compute; autograd derives its backward."""

import torch
from torch import Tensor

from partial_fc.kernels import ForwardResult, Gradients, NeededGradients, Problem, ShardStatistics, Slopes
from partial_fc.maps import sloped
from partial_fc.unit_rows import EPSILON


def _logits(problem: Problem, columns_nD: Tensor) -> tuple[Tensor, Tensor]:
    """(target [B], non-target logits [B, n], -inf for columns that are not non-targets)."""
    columns = problem.columns
    if columns.normalize:
        norms_n1 = columns_nD.norm(dim=1, keepdim=True)
        columns_nD = torch.where(norms_n1 < EPSILON, 0, columns_nD / norms_n1.clamp(min=EPSILON))
    cosines_Bn = problem.queries_BD @ columns_nD.T
    place_n = torch.arange(len(columns_nD), device=cosines_Bn.device)
    target_B = torch.where(columns.targets_B[:, None] == place_n, cosines_Bn, 0).sum(dim=1)
    logits_Bn = cosines_Bn
    if problem.map is not None and problem.scale_B1 is not None:
        mapped_Bn = problem.map.function(cosines_Bn, problem.map.parameter())
        logits_Bn = sloped(mapped_Bn, cosines_Bn, problem.map.slope) * problem.scale_B1
    if columns.bias_n is not None:
        logits_Bn = logits_Bn + columns.bias_n
    mask = columns.mask
    if mask.included_n is not None:
        logits_Bn = logits_Bn.masked_fill(~mask.included_n, -torch.inf)
    is_masked_Bn = columns.masked_columns()[:, None] == place_n if mask.labels is None else mask.labels[0][:, None] == mask.labels[1]
    return target_B, logits_Bn.masked_fill(is_masked_Bn, -torch.inf)


def _all_columns(problem: Problem) -> Tensor:
    return problem.columns.source.load(slice(0, problem.columns.size))


def forward(problem: Problem, needed: NeededGradients) -> ShardStatistics:
    target_B, logits_Bn = _logits(problem, _all_columns(problem))
    shift_B = torch.zeros_like(target_B)
    if problem.shifts:
        shift_B = logits_Bn.amax(dim=1) if logits_Bn.shape[1] else shift_B - torch.inf
    sum_B = problem.statistic.term(logits_Bn, shift_B.clamp(min=-1e30)[:, None]).sum(dim=1)
    return ShardStatistics(target_B, sum_B, shift_B)


def backward(problem: Problem, result: ForwardResult, slopes: Slopes, needed: NeededGradients) -> Gradients:
    columns = problem.columns
    named = {"queries": problem.queries_BD, "source": _all_columns(problem), "bias": columns.bias_n, "scale": problem.scale_B1}
    with torch.enable_grad():
        inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in named.items() if tensor is not None}
        problem = problem._replace(
            queries_BD=inputs["queries"], columns=columns._replace(bias_n=inputs.get("bias")), scale_B1=inputs.get("scale")
        )
        target_B, logits_Bn = _logits(problem, inputs["source"])
        # Not the loss but a surrogate, whose gradient by each z_ij is slope_i f'(z_ij - statistic_i).
        is_there_B = torch.isfinite(result.value_B)
        terms_Bn = problem.statistic.term(logits_Bn, result.value_B.where(is_there_B, -1e30)[:, None])
        value = (slopes.target_B * target_B).sum() + (slopes.value_B.where(is_there_B, 0)[:, None] * terms_Bn).sum()
        found = dict(zip(inputs, torch.autograd.grad(value, list(inputs.values()), allow_unused=True, materialize_grads=True), strict=True))
    of_source: tuple[Tensor | None, ...] = ()
    if needed.source:
        collector = columns.source.collector()
        collector.store(slice(0, columns.size), found["source"])
        of_source = collector.gradients()
    return Gradients(found["queries"], of_source, found.get("bias"), found.get("scale"))


def top(problem: Problem, k: int) -> tuple[Tensor, Tensor, Tensor]:
    target_B, logits_Bn = _logits(problem, _all_columns(problem))
    missing_Bk = logits_Bn.new_full((len(logits_Bn), k), -torch.inf)
    values_Bk, columns_Bk = torch.cat([logits_Bn, missing_Bk], dim=1).topk(k, dim=1)
    return target_B, values_Bk, columns_Bk.where(values_Bk > -torch.inf, 0)
