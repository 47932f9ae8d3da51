"""The baseline: a model-parallel CosFace classifier in eager float32, in the order of operations of arcface_torch's PartialFC V2. Written
here from a description of that order. Like that one, it stores the B x S logits several times and has a dense gradient at any rate."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from partial_fc.shards import ClassShard


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(x_b: Tensor) -> Tensor:
    parts = [torch.empty_like(x_b) for _ in range(_ranks())]
    dist.all_gather(parts, x_b.contiguous())
    return torch.cat(parts)


def _reduce(x: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
    if _ranks() > 1:
        dist.all_reduce(x, operation)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_bD: Tensor) -> Tensor:
        return _gather(x_bD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        parts = [part.contiguous() for part in grads[0].chunk(_ranks())]
        for rank, part in enumerate(parts):
            dist.reduce(part, dst=rank)
        return parts[dist.get_rank()] * _ranks()  # data-parallel engines average over ranks


class _CrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy over the classes of all ranks: 3 all-reduces of B floats."""

    @staticmethod
    def forward(ctx: Any, logits_BS: Tensor, rows_n: Tensor, columns_n: Tensor) -> Tensor:
        """Entries (rows_n, columns_n) are the targets of this rank. Overwrites the logits."""
        largest_B1 = logits_BS.amax(dim=1, keepdim=True)
        _reduce(largest_B1, dist.ReduceOp.MAX)
        probability_BS = logits_BS.sub_(largest_B1).exp_()
        sum_B1 = probability_BS.sum(dim=1, keepdim=True)
        _reduce(sum_B1)
        probability_BS.div_(sum_B1)
        target_B = probability_BS.new_zeros(len(probability_BS))
        target_B[rows_n] = probability_BS[rows_n, columns_n]
        _reduce(target_B)
        ctx.probability_BS, ctx.rows_n, ctx.columns_n = probability_BS, rows_n, columns_n
        return -target_B.clamp_(min=1e-30).log_().mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        probability_BS, rows_n, columns_n = ctx.probability_BS, ctx.rows_n, ctx.columns_n
        one_hot_nS = probability_BS.new_zeros(len(rows_n), probability_BS.shape[1]).scatter_(1, columns_n[:, None], 1.0)
        probability_BS[rows_n] -= one_hot_nS
        return probability_BS.div_(len(probability_BS)) * grads[0], None, None


class EagerClassifier(nn.Module):
    """CosFace over the classes of all ranks; `prototypes_SD`, float32, are this rank's. Trained with torch.optim.SGD.

    With sample_rate below 1 it takes the classes of the batch, adds random ones up to sample_rate S, and indexes the whole parameter.
    """

    def __init__(self, shard: ClassShard, prototypes_SD: Tensor, scale: float, margin: float, sample_rate: float = 1.0) -> None:
        super().__init__()
        self.shard, self.scale, self.margin, self.sample_rate = shard, scale, margin, sample_rate
        self.prototypes = nn.Parameter(prototypes_SD)

    def forward(self, features_bD: Tensor, labels_b: Tensor) -> Tensor:
        """Mean loss over the global batch, equal on every rank. Every rank brings equally many rows.

        Communicates 2 all-gathers (B D floats, B labels) and 3 all-reduces of B floats; backward 1 reduce per rank of its D B / N floats.
        """
        features_BD = _GatherRows.apply(features_bD) if _ranks() > 1 else features_bD
        labels_B = (_gather(labels_b) if _ranks() > 1 else labels_b) - self.shard.first
        rows_n = torch.where((labels_B >= 0) & (labels_B < self.shard.rows))[0]  # samples whose class is this rank's
        columns_n = labels_B[rows_n]
        prototypes_SD: Tensor = self.prototypes
        if self.sample_rate < 1:
            sample_K = self._sample(columns_n)
            columns_n = torch.searchsorted(sample_K, columns_n)
            prototypes_SD = self.prototypes[sample_K]
        logits_BS = functional.linear(functional.normalize(features_BD), functional.normalize(prototypes_SD))
        logits_BS = logits_BS.clamp(-1, 1)
        logits_BS[rows_n, columns_n] = logits_BS[rows_n, columns_n] - self.margin
        return _CrossEntropy.apply(logits_BS * self.scale, rows_n, columns_n)

    def _sample(self, positives_n: Tensor) -> Tensor:
        """Ascending rows of the shard: the positives, and others at random up to sample_rate S."""
        positives = positives_n.unique()
        size = int(self.sample_rate * self.shard.rows)
        if len(positives) >= size:
            return positives
        order_S = torch.rand(self.shard.rows, device=positives.device)
        order_S[positives] = 2.0
        return order_S.topk(size).indices.sort().values
