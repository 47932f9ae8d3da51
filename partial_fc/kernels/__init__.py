"""Kernels of the similarity primitive: one signature (`Kernel`), dense (`reference`) and without the B x S matrix (`chunked`, `triton`).
A kernel sees one rank's classes and never communicates."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from partial_fc.maps import Map
from partial_fc.sources import Source

Reduction = Literal["log_sum_exp", "softplus_sum"]


class Question(NamedTuple):
    """What is asked about B rows and the S classes of one rank. The logit of row i and class j is

    z_ij = <query_i, unit_j> + bias_j                   unit_j = prototype_j / |prototype_j|, or prototype_j itself
    z_ij = scale_i map(<query_i, unit_j>, parameter_i) + bias_j             under a map
    """

    queries_BD: Tensor  # scale x unit features; unit features under a map
    target_rows_B: Tensor  # int64: the target as a row of this shard, outside [0, S) where another rank has it
    reduction: Reduction = "log_sum_exp"
    bounded: bool = True  # promises |z_ij - bias_j| <= 64 and sum_j exp(bias_j) < 1e8 over all ranks: float32 then needs no shift
    bias_S: Tensor | None = None
    included_S: Tensor | None = None  # bool: classes that take part as non-targets; all if None
    masked_rows_B: Tensor | None = None  # int64: the row that is no non-target, where it is not the target
    masks: tuple[Tensor, Tensor] | None = None  # (row labels [B], column labels [S]): equal ones are no non-targets; else one row alone
    map: Map | None = None
    scale_B1: Tensor | None = None  # under a map
    parameter_B1: Tensor | None = None  # of a map
    normalizes: bool = True
    columns: bool = False  # column statistics are wanted
    dtype: torch.dtype = torch.float32  # of the operands of products with chunks of classes

    def masked(self) -> Tensor:
        """int64 [B]: the row that is no non-target."""
        return self.target_rows_B if self.masked_rows_B is None else self.masked_rows_B


class Rows(NamedTuple):
    """Statistics over the classes of one rank."""

    target_B: Tensor  # <query_i, unit_target>; 0 where another rank owns the target
    sum_B: Tensor  # sum over non-targets j of exp(z_ij - shift_i), or of softplus(z_ij)
    shift_B: Tensor  # 0 (bounded, softplus), or the largest non-target z_ij, about (-inf where there is none)
    column_S: Tensor | None = None  # log sum over rows i, of which j is no target, of exp(z_ij)
    apart_B: Tensor | None = None  # int64: non-targets (one per row of this shard, or -1) that backward must compute apart from the others
    kept: Any = None  # what backward may use, once, instead of computing it again; in the room for the gradient


class Known(NamedTuple):
    """What backward knows from forward."""

    log_sum_B: Tensor  # log sum_j exp(z_ij) over the non-targets of *all* ranks; unused for softplus
    column_S: Tensor | None
    apart_B: Tensor | None
    kept: Any


class Slopes(NamedTuple):
    """Derivatives of the loss by a kernel's statistics, once these are summed over all ranks."""

    target_B: Tensor
    sum_B: Tensor  # by log sum_j exp(z_ij), or by sum_j softplus(z_ij)
    column_S: Tensor | None  # by column_S


class Gradients(NamedTuple):
    queries_BD: Tensor  # this rank's part of the sum over classes
    source: tuple[Tensor | None, ...]  # of the source's tensors
    bias_S: Tensor | None
    scale_B1: Tensor | None


class Wanted(NamedTuple):
    """Which gradients somebody needs; those of bias and scale are cheap and always computed."""

    queries: bool
    source: bool


class Kernel(Protocol):
    def forward(self, question: Question, source: Source, keeps: bool = False) -> Rows:
        """`keeps` tells that backward will follow: what it can use may be kept in `source.room()`, which backward passes to
        `source.collect`."""
        ...

    def backward(self, question: Question, source: Source, known: Known, slopes: Slopes, wanted: Wanted) -> Gradients: ...

    def top(self, question: Question, source: Source, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(target [B], the k largest non-target z_ij [B, k] descending, their rows int64 [B, k]); -inf and row 0 where there are fewer."""
        ...
