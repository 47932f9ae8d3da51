"""Kernels of the similarity primitive: one signature (`Kernel`), dense (`reference`) and without the B x n matrix (`chunked`, `triton`). A
kernel sees one rank's columns and never communicates."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from partial_fc.columns import Columns
from partial_fc.device_policy import CPU
from partial_fc.maps import Map


class Terms:
    """A statistic as a kernel sees it: a sum of terms f(z_ij - shift_i) over the non-targets j of row i.

    Excluded columns reach f as logits of -inf, so f(-inf) and f'(-inf) must be 0. For the Triton kernel f must not be negative: it clamps
    a sum at 0 after it took the largest term out."""

    base = 1.0  # tiles hold logits times this
    is_exponential = False  # f(z + bias) = f(z) exp(bias), so that the bias may go into the operands of the products
    triton_terms = ""  # the name of f in triton_programs.py; "" for a statistic without Triton

    def terms_(self, tile_Bn: Tensor) -> Tensor:
        """f of a tile of shifted logits times base; may overwrite the tile."""
        raise NotImplementedError

    def weights_(self, tile_Bn: Tensor, terms_Bn: Tensor | None = None) -> Tensor:
        """f', by the logit and not by the tile, of the same tile; may overwrite it. `terms_Bn` is the result of `terms_` on that tile, if
        known: where `terms_` overwrote the tile, both are the same memory."""
        raise NotImplementedError

    def term(self, z: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """f(z - shift) of logits, differentiable."""
        raise NotImplementedError

    def weight(self, z: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        """f'(z - shift) of one logit per row. With the statistic of all ranks as shift, it is the statistic's derivative by the logit."""
        raise NotImplementedError

    def row_factors(self, slope_B: Tensor, value_B: Tensor, shifts: bool, rounds: bool) -> tuple[Tensor, Tensor | None]:
        """(factor [B], shift [B, 1] times base or None) with d loss / d z_ij = factor_i f'(z_ij - shift_i), from d loss / d statistic and
        the statistic over all ranks. `rounds` asks for a whole number as shift, which costs a low-precision tile no digits. For example
        slope e^(z - a) = [slope 2^-(a' - shift)] 2^(z' - shift) for a log-sum-exp a, where ' means times log2(e)."""
        return slope_B, None


class Problem(NamedTuple):
    """B rows against the n columns of one rank. The logit of row i and column j is

    z_ij = <query_i, unit_j> + bias_j                   unit_j = column_j / |column_j|, or column_j itself
    z_ij = scale_i map(<query_i, unit_j>, parameter_i) + bias_j             with a map
    """

    queries_BD: Tensor  # scale x unit features; unit features under a map
    columns: Columns
    statistic: Terms
    shifts: bool = False  # terms need the row's largest logit as shift; otherwise |z_ij - bias_j| <= 64, and float32 needs none
    map: Map | None = None
    scale_B1: Tensor | None = None  # under a map
    dtype: torch.dtype = torch.float32  # of the operands of products with chunks of columns
    tile_bytes: int = CPU.tile_bytes  # of a tile of logits


class ShardStatistics(NamedTuple):
    """Statistics over the columns of one rank."""

    target_B: Tensor  # <query_i, unit_target>; 0 where another rank owns the target
    sum_B: Tensor  # of the terms
    shift_B: Tensor  # 0, or about the largest non-target z_ij (-inf if there is none)
    exact_columns_B: Tensor | None = None  # int64: a non-target of each row (or -1) that backward must compute separately
    cache: Any = None  # what backward may use once instead of recomputing it; in the memory of the gradient


class ForwardResult(NamedTuple):
    """What backward knows from forward."""

    value_B: Tensor  # the statistic over the columns of *all* ranks
    exact_columns_B: Tensor | None = None
    cache: Any = None


class Slopes(NamedTuple):
    """Derivatives of the loss by the results of `ShardStatistics` merged over all ranks."""

    target_B: Tensor
    value_B: Tensor


class Gradients(NamedTuple):
    queries_BD: Tensor  # this rank's part of the sum over classes
    source: tuple[Tensor | None, ...]  # of the source's tensors
    bias_n: Tensor | None
    scale_B1: Tensor | None


class NeededGradients(NamedTuple):
    """Which gradients are or will be needed; those of bias and scale are cheap and always computed."""

    queries: bool = False
    source: bool = False
    bias: bool = False
    scale: bool = False


class Kernel(Protocol):
    def forward(self, problem: Problem, needed: NeededGradients) -> ShardStatistics: ...

    def backward(self, problem: Problem, result: ForwardResult, slopes: Slopes, needed: NeededGradients) -> Gradients: ...

    def top(self, problem: Problem, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(target [B], the k largest non-target z_ij [B, k] descending, their columns int64 [B, k]); -inf and 0 where there are fewer."""
