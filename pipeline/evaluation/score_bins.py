"""Cosines counted by bins of 1.9e-6 and not stored: memory does not grow with the pairs, and counts of tiles, threads and ranks add up."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.evaluation.report import HISTOGRAM_EDGES, OperatingPoints

# Bins are centred on multiples of 2 / STEPS = 1.9e-6: wide against float32 rounding (1e-7), and the ties that occur in practice
# (cosines -1, 0 and 1 of equal, dead or orthogonal embeddings) lie in the middle of a bin, so that rounding does not split them.
STEPS = 2**20
FIRST = 2  # the bin of cosine -1; bin 0 takes what is no pair of the kind, bin 1 and the last what rounding moved beyond -1 and 1
BINS = STEPS + 4
FLUSH = 2**30  # scores counted in int32 before they go to int64


def bins(rows_RD: Tensor, columns_MD: Tensor, out: Tensor) -> Tensor:
    """float32 [R, M] whose integer part is the bin of a pair's cosine, in the memory of `out`. Both have unit length."""
    bin_RM = out[: len(rows_RD) * len(columns_MD)].view(len(rows_RD), -1)
    torch.mm(rows_RD * (STEPS / 2), columns_MD.T, out=bin_RM)
    return bin_RM.add_(STEPS / 2 + FIRST + 0.5)


class Counts:
    """Genuine and impostor pairs by bin, as one thread counts them: kind 0 and 1 of `by_kind_2K`, int64 [2, BINS]."""

    def __init__(self, scores: Tensor) -> None:
        """scores: float32 [n], room for the bins of a tile; as large as the largest."""
        self.scores = scores
        self._index = torch.empty_like(scores, dtype=torch.int64)
        self._ones = torch.ones_like(scores, dtype=torch.int32)
        self._recent_2K = torch.zeros(2, BINS, dtype=torch.int32, device=scores.device)  # twice as fast as int64
        self.by_kind_2K = torch.zeros(2, BINS, dtype=torch.int64, device=scores.device)
        self._counted = 0

    def count(self, kind: int, bin_n: Tensor) -> None:
        """`bin_n` has any shape; its fractions are cut off."""
        index = self._index[: bin_n.numel()].view_as(bin_n).copy_(bin_n)
        self._recent_2K[kind].scatter_add_(0, index.view(-1), self._ones[: bin_n.numel()])
        self._counted += bin_n.numel()
        if self._counted > FLUSH:
            self._flush()

    def _flush(self) -> None:
        self.by_kind_2K += self._recent_2K
        self._recent_2K.zero_()
        self._counted = 0

    def done(self) -> Tensor:
        """What was counted, int64 [2, BINS]."""
        self._flush()
        return self.by_kind_2K


def total(counts: list[Counts], world_size: int = 1, group: dist.ProcessGroup | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Genuine and impostor pairs by bin, int64 [BINS] each, of all threads and ranks: one all-reduce of 16 MiB."""
    counts_2K = torch.stack([of_thread.done() for of_thread in counts]).sum(dim=0)
    if world_size > 1:
        dist.all_reduce(counts_2K, group=group)
    counts_2K[:, FIRST] += counts_2K[:, FIRST - 1]
    counts_2K[:, FIRST + STEPS] += counts_2K[:, FIRST + STEPS + 1]
    counts_2K[:, [0, FIRST - 1, FIRST + STEPS + 1]] = 0
    genuine_K, impostor_K = counts_2K.cpu().numpy()
    return genuine_K, impostor_K


def lower_edges() -> np.ndarray:
    """The least cosine of each bin, float64 [BINS]: as a threshold it accepts the whole bin."""
    return (np.arange(BINS) - FIRST - 0.5) * (2 / STEPS) - 1


def operating_points(genuine_K: np.ndarray, impostor_K: np.ndarray) -> OperatingPoints:
    return OperatingPoints.of_counts(lower_edges(), genuine_K, impostor_K)


def histogram(counts_K: np.ndarray) -> np.ndarray:
    """Counts between HISTOGRAM_EDGES, int64 [256]; cosine 1 belongs to the last."""
    coarse = counts_K[FIRST : FIRST + STEPS].reshape(len(HISTOGRAM_EDGES) - 1, -1).sum(axis=1)
    coarse[-1] += counts_K[FIRST + STEPS]
    return coarse
