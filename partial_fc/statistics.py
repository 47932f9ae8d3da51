"""Statistics of a row of the similarity matrix: what they sum, how ranks are merged, and their gradient. A new one is a class here, for the
Triton kernel with terms of its name in kernels/triton_programs.py; HingeSum in tests/partial_fc/test_statistics.py is an example."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partial_fc import collectives
from partial_fc.collectives import Group
from partial_fc.columns import Columns
from partial_fc.device_policy import policy_of
from partial_fc.kernels import ForwardResult, Kernel, NeededGradients, Problem, ShardStatistics, Slopes, Terms
from partial_fc.kernels.exact_entries import ExactEntries, add_rows
from partial_fc.prototype_sources import PrototypeSource

LOG2_E = math.log2(math.e)


class Statistic(Terms):
    """A sum of terms over the non-targets of a row. Communicates 1 all-reduce of 2 B floats."""

    may_shift = False  # whether float32 needs the largest logit of a row, unless logits are bounded
    takes_map = True

    def biased(self, columns: Columns, group: Group) -> Columns:
        """The columns with what the statistic itself adds to logits."""
        return columns

    def evaluate(self, problem: Problem, kernel: Kernel, group: Group) -> tuple[Tensor, ...]:
        """(product with the target [B], the statistic [B] or [B, k], for TopK classes [B, k]) over the columns of all ranks."""
        source = problem.columns.source
        of_problem = (problem.queries_BD, problem.columns.bias_n, problem.scale_B1)
        needed = NeededGradients()
        if torch.is_grad_enabled():
            queries, bias, scale = (tensor is not None and tensor.requires_grad for tensor in of_problem)
            needed = NeededGradients(queries, any(tensor.requires_grad for tensor in source.tensors), bias, scale)
        return _SumFunction.apply(*of_problem, problem, self, kernel, group, needed, *source.tensors)

    def merge(self, shard: ShardStatistics, shifts: bool, group: Group) -> tuple[Tensor, Tensor]:
        """(target [B], statistic [B]) over all ranks."""
        target_B, sum_B = collectives.sum_packed([shard.target_B, shard.sum_B], group)
        return target_B, sum_B


class LogSumExp(Statistic):
    """log sum_j exp(z_ij) over the non-targets j of row i; -inf if there are none. The gradient is dense. If logits may exceed 64, float32
    needs the largest one of each row: 1 all-gather of 3 N B floats in place of the all-reduce."""

    may_shift = True
    base = LOG2_E  # exponentials of tiles are powers of 2: on a CPU torch's exp2 is faster than its exp
    is_exponential = True
    triton_terms = "exp2"

    def terms_(self, tile_Bn: Tensor) -> Tensor:
        return tile_Bn.exp2_()

    def weights_(self, tile_Bn: Tensor, terms_Bn: Tensor | None = None) -> Tensor:
        return tile_Bn.exp2_() if terms_Bn is None else terms_Bn

    def term(self, z: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return torch.exp(z - shift)

    weight = term

    def row_factors(self, slope_B: Tensor, value_B: Tensor, shifts: bool, rounds: bool) -> tuple[Tensor, Tensor | None]:
        # A row without non-targets has the statistic -inf and no gradient, rather than exp(inf) x 0.
        has_others_B = torch.isfinite(value_B)
        log_sum_B, shift_B1 = value_B.where(has_others_B, 0) * self.base, None
        if shifts:
            shift_B1 = log_sum_B[:, None].round() if rounds else log_sum_B[:, None]
            log_sum_B = log_sum_B - shift_B1[:, 0]
        return (slope_B * torch.exp2(-log_sum_B)).where(has_others_B, 0), shift_B1

    def merge(self, shard: ShardStatistics, shifts: bool, group: Group) -> tuple[Tensor, Tensor]:
        if not shifts:
            target_B, sum_B = super().merge(shard, shifts, group)
            return target_B, sum_B.log()
        target_NB, shift_NB, sum_NB = collectives.gather_packed([shard.target_B, shard.shift_B, shard.sum_B], group)
        return target_NB.sum(dim=0), torch.logsumexp(shift_NB + sum_NB.log(), dim=0)


LOG_SUM_EXP = LogSumExp()


@dataclass(frozen=True, eq=False)
class SoftplusSum(Statistic):
    """sum_j log(1 + exp(z_ij - threshold)) over the non-targets j of row i. The gradient is dense. `threshold` is a scalar with gradient,
    complete on every rank; backward then adds 1 all-reduce of a scalar."""

    threshold: Tensor | None = None
    triton_terms = "softplus"

    def biased(self, columns: Columns, group: Group) -> Columns:
        if self.threshold is None:
            return columns
        return columns.with_bias(-collectives.sum_gradient(self.threshold, group).expand(columns.size))

    def terms_(self, tile_Bn: Tensor) -> Tensor:
        return self.term(tile_Bn)

    def weights_(self, tile_Bn: Tensor, terms_Bn: Tensor | None = None) -> Tensor:
        return tile_Bn.sigmoid_()

    def term(self, z: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return softplus(z)

    def weight(self, z: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return z.sigmoid()


@dataclass(frozen=True)
class TopK(Statistic):
    """The k largest non-target cosines of row i (a bias only ranks them; -2 where there are fewer), with their classes (-1). Only
    these have a gradient. Communicates 1 all-gather of (3 k + 1) N B floats."""

    k: int = 1
    takes_map = False
    triton_terms = "exp2"  # for the largest of k = 1; its sum is not used

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"TopK takes k >= 1, but got k = {self.k}")

    def evaluate(self, problem: Problem, kernel: Kernel, group: Group) -> tuple[Tensor, ...]:
        columns = problem.columns
        return _TopFunction.apply(problem.queries_BD, problem, self.k, columns.classes(), kernel, group, *columns.source.tensors)


def softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x, threshold=40.0)  # torch's 20 drops e^-20 = 2e-9, which float64 tests see


def _no_autocast(x: Tensor) -> torch.autocast:
    """Products have the requested precision, also inside a region of mixed precision."""
    return torch.autocast(x.device.type, enabled=False)


class _SumFunction(torch.autograd.Function):
    """(target product [B], statistic over all ranks' non-targets [B])."""

    @staticmethod
    def forward(
        ctx: Any,
        queries_BD: Tensor,
        bias_n: Tensor | None,
        scale_B1: Tensor | None,
        problem: Problem,
        statistic: Statistic,
        kernel: Kernel,
        group: Group,
        needed: NeededGradients,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # Detached: autograd follows the arguments, not the problem.
        problem = problem._replace(
            queries_BD=queries_BD.detach(),
            columns=problem.columns._replace(bias_n=None if bias_n is None else bias_n.detach()),
            scale_B1=None if scale_B1 is None else scale_B1.detach(),
        )
        with _no_autocast(queries_BD):
            shard = kernel.forward(problem, needed)
        target_B, value_B = statistic.merge(shard, problem.shifts, group)
        ctx.save_for_backward(*tensors)  # reading them in backward raises if they have changed since
        # Detached: an output would keep this node, and so itself, alive.
        ctx.problem, ctx.kernel, ctx.result = problem, kernel, ForwardResult(value_B.detach(), shard.exact_columns_B, shard.cache)
        return target_B, value_B

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Every rank computes the same loss from the same vectors, so the all-reduce's backward is the identity: each rank
        # continues with its own columns, and the sum over ranks happens where the features are reduce-scattered.
        queries, bias, scale, _, _, _, _, _, *tensors = ctx.needs_input_grad
        needed = NeededGradients(queries, any(tensors), bias, scale)
        result, ctx.result = ctx.result, ctx.result._replace(cache=None)  # a cache serves once
        assert len(ctx.saved_tensors) == len(tensors)
        with _no_autocast(result.value_B):
            gradients = ctx.kernel.backward(ctx.problem, result, Slopes(*grads), needed)
        of_source = gradients.source if needed.source else (None,) * len(tensors)
        return gradients.queries_BD, gradients.bias_n, gradients.scale_B1, None, None, None, None, None, *of_source


class _TopFunction(torch.autograd.Function):
    """(target cosine [B], the k largest non-target cosines over all ranks [B, k], their classes [B, k])."""

    @staticmethod
    def forward(
        ctx: Any, queries_BD: Tensor, problem: Problem, k: int, classes_n: Tensor, kernel: Kernel, group: Group, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        problem = problem._replace(queries_BD=queries_BD.detach())
        columns = problem.columns
        with _no_autocast(queries_BD):
            target_B, ranking_Bk, columns_Bk = kernel.top(problem, k)
        cosines_Bk, ids_Bk = torch.zeros_like(ranking_Bk), torch.zeros_like(columns_Bk)
        if columns.size:
            ids_Bk = classes_n[columns_Bk]
            for place in range(k):  # ranked by logits that may be rounded and biased; the values come from float32 rows
                cosines_Bk[:, place] = ExactEntries.of(problem.queries_BD, columns, columns_Bk[:, place]).product_B
        bits = {4: torch.int32, 8: torch.int64}[ranking_Bk.element_size()]  # class ids travel as the bits of floats
        partials = torch.cat([target_B[:, None], ranking_Bk, cosines_Bk, ids_Bk.to(bits).view(ranking_Bk.dtype)], dim=1)
        (packed_NBx,) = collectives.gather_packed([partials], group)
        target_NB1, *of_ranks = packed_NBx.split([1, k, k, k], dim=2)
        ranking_BK, cosines_BK, ids_BK = (x_NBk.transpose(0, 1).reshape(len(target_B), -1) for x_NBk in of_ranks)
        ranking_Bk, places_Bk = ranking_BK.topk(k, dim=1)
        is_there_Bk = ranking_Bk > -torch.inf
        chosen_Bk = ids_BK.view(bits).to(torch.int64).gather(1, places_Bk).where(is_there_Bk, -1)
        is_ours_Bk = is_there_Bk & (places_Bk // k == collectives.rank(group))
        ctx.problem, ctx.columns_Bk = problem, columns_Bk.gather(1, places_Bk % k).where(is_ours_Bk, -1)
        ctx.mark_non_differentiable(chosen_Bk)
        ctx.save_for_backward(*tensors)
        return target_NB1[..., 0].sum(dim=0), cosines_BK.gather(1, places_Bk).where(is_there_Bk, -2.0), chosen_Bk

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (queries_BD, columns, *_), _ = ctx.problem, ctx.saved_tensors
        source, needs_source = columns.source, any(ctx.needs_input_grad[6:])
        columns_BK = torch.cat([columns.targets_B[:, None], ctx.columns_Bk], dim=1)
        slopes_BK = torch.cat([grads[0][:, None], grads[1]], dim=1)
        grad_queries_BD = torch.zeros_like(queries_BD)
        of_source: tuple[Tensor | None, ...] = (None,) * len(source.tensors)
        if columns.size:
            gradients = []
            for columns_B, slope_B in zip(columns_BK.unbind(1), slopes_BK.unbind(1), strict=True):
                by_query_BD, by_column_BD = ExactEntries.of(queries_BD, columns, columns_B).gradients(queries_BD, slope_B)
                grad_queries_BD += by_query_BD
                gradients.append(by_column_BD)
            if needs_source:
                of_source = _store_entries(source, columns_BK.T.flatten(), torch.cat(gradients))
        elif needs_source:
            of_source = source.collector().gradients()
        return grad_queries_BD, None, None, None, None, None, *of_source


def _store_entries(source: PrototypeSource, columns_m: Tensor, gradient_mD: Tensor) -> tuple[Tensor | None, ...]:
    """A gradient that is zero except at these columns, which may repeat; -1 stands for other ranks' columns."""
    collector, (count, width) = source.collector(), source.shape
    size = max(1, policy_of(gradient_mD.device).tile_bytes // (4 * width))
    for first in range(0, count, size):
        span = slice(first, min(first + size, count))
        chunk_nD = gradient_mD.new_zeros(span.stop - first + 1, width)
        add_rows(chunk_nD, len(chunk_nD) - 1, columns_m - first, gradient_mD)
        collector.store(span, chunk_nD[:-1])
    return collector.gradients()
