"""Kernels of the similarity primitive: one signature (`Kernel`), dense (`reference`) and without the B x S matrix (`chunked`).
A kernel sees one rank's classes and never communicates."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Rows(NamedTuple):
    """Row statistics [B] over the classes of one rank. The logit of row i and class j is z_ij = <query_i, w_j / |w_j|> + bias_j."""

    target_B: Tensor  # <query_i, w_y / |w_y|>, without bias; 0 where another rank owns class y_i
    shift_B: Tensor  # what was taken from the logits before the exponential: 0 (bounded) or the largest z_ij, j != y_i (-inf: no such j)
    sum_exp_B: Tensor  # sum over j != y_i of exp(z_ij - shift_i)
    kept: Any = None  # what backward may use instead of computing it again; of bounded size


class Gradients(NamedTuple):
    queries_BD: Tensor  # this rank's part of the sum over classes
    prototypes_SD: Tensor
    bias_S: Tensor | None


class Kernel(Protocol):
    def forward(self, queries_BD: Tensor, prototypes_SD: Tensor, target_rows_B: Tensor, bias_S: Tensor | None, bounded: bool) -> Rows:
        """Row statistics. `target_rows_B` is y_i as a row of this shard, outside [0, S) where it belongs to another rank.
        `bounded` promises |z_ij| <= 64, where float32 needs no shift: e^64 x 1e8 classes < 3e38, and e^-64 is a normal number."""
        ...

    def backward(
        self,
        queries_BD: Tensor,
        prototypes_SD: Tensor,
        target_rows_B: Tensor,
        bias_S: Tensor | None,
        bounded: bool,
        log_sum_B: Tensor,
        kept: Any,
        grad_target_B: Tensor,
        grad_log_sum_B: Tensor,
    ) -> Gradients:
        """Gradients of sum_i (grad_target_i target_i + grad_log_sum_i log_sum_i), where log_sum_i is the log of the sum of
        exp(z_ij) over the non-target classes of *all* ranks: d log_sum_i / d z_ij = exp(z_ij - log_sum_i)."""
        ...
