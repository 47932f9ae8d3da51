"""The walk over the classes in chunks: memory, logits and weights of one B x chunk tile at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.kernels import Known, Question, Slopes
from partial_fc.kernels.entries import Apart, add_rows, entry_logits, inverse_norms
from partial_fc.kernels.kept import Kept
from partial_fc.sources import Source

TILE_BYTES = 8 << 20  # of one logits tile: fits the last-level cache of a CPU socket and the L2 of a GPU beside its operands
LOG2_E = math.log2(math.e)  # exponentials are powers of 2 here: on CPU torch's exp2 is faster than its exp
LN_2 = math.log(2.0)


class Chunk(NamedTuple):
    """Classes `rows` of the shard, n of them."""

    rows: slice
    prototypes_nD: Tensor  # as loaded
    inverse_n1: Tensor | None  # 1 / |w|, or 0 where w has no direction; None where prototypes are not normalised
    units_nD: Tensor  # in the dtype of products


class Tile(NamedTuple):
    """Logits [B, n] of a chunk, -inf at the targets; and under a map its values and slopes."""

    logits_Bn: Tensor  # times LOG2_E for log-sum-exps
    mapped_Bn: Tensor | None = None
    slope_Bn: Tensor | None = None


class Walk:
    """Goes over the chunks of a source and computes logits. Every chunk uses the memory of the one before it: what the system hands out
    anew costs as much as a pass over it."""

    bias_in_operands = True

    def __init__(self, question: Question, source: Source) -> None:
        self.question, self.source = question, source
        (batch, width), self.classes = question.queries_BD.shape, source.shape[0]
        chunks = max(1, -(-self.classes // self.largest(max(batch, 1), width)))
        self.size = max(1, min(self.classes, -(-self.classes // chunks // 64) * 64))  # equal chunks: a short last one would waste cores
        self.is_rounded = question.dtype.itemsize < question.queries_BD.dtype.itemsize
        self.kept: Kept | None = None
        self.apart_rows_B: Tensor | None = None  # in backward: non-targets that are masked too, because they are computed apart
        self.base = LOG2_E if question.reduction == "log_sum_exp" else 1.0
        scaled_BD = question.queries_BD * self.base if question.map is None else question.queries_BD
        self.queries_BD = scaled_BD.to(question.dtype)
        self.allocate(batch, width)
        self.first_B = torch.arange(batch, device=scaled_BD.device)
        # exp(z + bias) = exp(z) exp(bias): where exponentials are bounded the factor goes into the operands, and the tile is not touched.
        bias_S, is_in_S = question.bias_S, question.included_S
        in_operands = self.bias_in_operands and question.reduction == "log_sum_exp" and question.bounded and not question.columns
        self.factor_S = bias_S.exp() if in_operands and bias_S is not None else None
        self.weights_S = self.factor_S
        if in_operands and is_in_S is not None:
            self.weights_S = is_in_S.to(scaled_BD.dtype) if self.factor_S is None else self.factor_S.where(is_in_S, 0)
        self.bias_S = None
        if not in_operands and (bias_S is not None or is_in_S is not None):
            self.bias_S = scaled_BD.new_zeros(self.classes) if bias_S is None else bias_S * self.base
            self.bias_S = self.bias_S if is_in_S is None else self.bias_S.where(is_in_S, -torch.inf)

    def largest(self, batch: int, width: int) -> int:
        """Most classes of a chunk."""
        # A map passes over several tiles in the precision of the inputs.
        share = 1 if self.question.map is None or self.question.queries_BD.is_cuda else 4
        return max(256, TILE_BYTES // (share * batch * self.question.dtype.itemsize))

    def allocate(self, batch: int, width: int) -> None:
        self.tile = self.empty(self.question.dtype, batch * self.size)
        self.wide_tiles: dict[int, Tensor] = {}
        self.units, self.weighted_units = (self.empty(self.question.dtype, self.size, width) for _ in range(2))
        self.wide, self.spare = (self.empty(self.question.queries_BD.dtype, self.size + 1, width) for _ in range(2))

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return self.source.memory.empty(shape, dtype, self.queries_BD.device)

    def chunks(self) -> Iterator[Chunk]:
        for first in range(0, self.classes, self.size):
            rows = slice(first, min(first + self.size, self.classes))
            yield self.chunk(rows, self.source.load(rows))

    def chunk(self, rows: slice, prototypes_nD: Tensor) -> Chunk:
        units_nD = None if self.kept is None else self.kept.units(rows)
        if self.kept is not None and units_nD is not None and rows.start in self.kept.inverse:
            return Chunk(rows, prototypes_nD, self.kept.inverse[rows.start], units_nD)
        inverse_n1 = inverse_norms(prototypes_nD) if self.question.normalizes else None
        if inverse_n1 is not None and self.question.included_S is not None:
            inverse_n1.masked_fill_(~self.question.included_S[rows, None], 0)  # weighed by 0, but here without a product either
        if self.kept is not None and units_nD is not None and inverse_n1 is not None:
            self.kept.inverse[rows.start] = inverse_n1
        return Chunk(rows, prototypes_nD, inverse_n1, self._scaled(prototypes_nD, inverse_n1, self.units if units_nD is None else units_nD))

    def _scaled(self, x_nD: Tensor, factor_n1: Tensor | None, to: Tensor) -> Tensor:
        """x times factors of its rows, rounded to the memory `to`."""
        out_nD = to[: len(x_nD)]
        if factor_n1 is None:
            return out_nD.copy_(x_nD)
        return torch.mul(x_nD, factor_n1, out=out_nD)

    def tile_of(self, chunk: Chunk, wants_slope: bool = False) -> Tile:
        question, (batch, columns) = self.question, (len(self.queries_BD), len(chunk.units_nD))
        kept_Bn = self.kept.weights(chunk.rows) if self.kept is not None else None
        logits_Bn = self.tile[: batch * columns].view(batch, columns) if kept_Bn is None else kept_Bn
        torch.mm(self.queries_BD, chunk.units_nD.T, out=logits_Bn)
        mapped_Bn = slope_Bn = None
        if question.map is not None and question.scale_B1 is not None:
            # In the precision of the inputs, lest what bfloat16 left of the product is rounded several times more.
            cosines_Bn = self._wide_tile(batch, columns).copy_(logits_Bn) if self.is_rounded else logits_Bn
            spare = self._wide_tile(batch, columns, 1), self._wide_tile(batch, columns, 2)
            mapped_Bn, slope_Bn = question.map.with_slope(cosines_Bn, question.parameter_B1, wants_slope, spare)
            logits_Bn = torch.mul(mapped_Bn, question.scale_B1 * self.base, out=spare[1])
        if self.bias_S is not None:
            # In float32: rounded a second time, logits would lose what the subtraction of a threshold leaves.
            memory = logits_Bn if logits_Bn.dtype is self.bias_S.dtype else self._wide_tile(batch, columns)
            logits_Bn = torch.add(logits_Bn, self.bias_S[chunk.rows], out=memory)
        self._mask(logits_Bn, chunk.rows)
        if self.is_rounded and self.weights_S is not None and question.included_S is not None:
            self._leave_out(logits_Bn, ~question.included_S[chunk.rows])
        return Tile(logits_Bn, mapped_Bn, slope_Bn)

    def _leave_out(self, logits_Bn: Tensor, is_out_n: Tensor) -> None:
        """Lest a class that weighs nothing is a row's hardest. Most chunks of a sample have none, which a GPU's host would wait to know."""
        if is_out_n.device.type != "cpu" or is_out_n.numpy().any():
            logits_Bn.masked_fill_(is_out_n, -torch.inf)

    def _wide_tile(self, batch: int, columns: int, place: int = 0) -> Tensor:
        """Memory in the precision of the inputs, other at another place."""
        if place not in self.wide_tiles:
            self.wide_tiles[place] = self.empty(self.wide.dtype, batch * self.size)
        return self.wide_tiles[place][: batch * columns].view(batch, columns)

    def weigh(self, chunk: Chunk, weights: Weights) -> tuple[Tensor, Tile]:
        """Weights [B, n] of the products of backward, and the tile they came from."""
        kept_Bn = None if self.kept is None else self.kept.weights(chunk.rows)
        if self.kept is not None and kept_Bn is not None:
            if self.apart_rows_B is not None:  # forward left out every chunk's hardest; of these only the last is computed apart
                column_B, weight_B = self.kept.hardest[chunk.rows.start]
                is_apart_B = column_B + chunk.rows.start == self.apart_rows_B
                self.put(kept_Bn, column_B.masked_fill(is_apart_B, -1), weight_B.to(kept_Bn.dtype))
            if weights.shift_B1 is not None:  # in bfloat16 a power of two, which rounds nothing
                kept_Bn *= torch.exp2(self.kept.shift_B1[chunk.rows.start] - weights.shift_B1).to(kept_Bn.dtype)
            return kept_Bn, Tile(kept_Bn)
        tile = self.tile_of(chunk, wants_slope=True)
        return weights.of(chunk, tile.logits_Bn), tile

    def _mask(self, logits_Bn: Tensor, rows: slice) -> None:
        """Targets are masked before the exponential, never subtracted after it."""
        if self.question.masks is None:
            self.put(logits_Bn, self.question.masked() - rows.start, -torch.inf)
        else:
            labels_B, labels_S = self.question.masks
            logits_Bn.masked_fill_(labels_B[:, None] == labels_S[rows], -torch.inf)
        if self.apart_rows_B is not None:
            self.put(logits_Bn, self.apart_rows_B - rows.start, -torch.inf)

    def put(self, tile_Bn: Tensor, column_B: Tensor, value: float | Tensor) -> None:
        """Writes one entry of each row, where its column lies in the tile."""
        columns = tile_Bn.shape[1]
        is_here_B = (column_B >= 0) & (column_B < columns)
        place_B = self.first_B * columns + column_B.clamp(0, columns - 1)
        # The other rows rewrite an entry of theirs: picking them out would need the host to wait for the device.
        kept_B = tile_Bn.take(place_B)
        tile_Bn.put_(place_B, kept_B.masked_fill_(is_here_B, value) if isinstance(value, float) else value.where(is_here_B, kept_B))

    def take_hardest(self, chunk: Chunk, logits_Bn: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(column [B], logit [B] without bias, its slope by the mapped cosine's own cosine or None for 1), from float32 rows, of each row's
        largest non-target of the tile, which is then masked."""
        largest_B, column_B = _largest(logits_Bn)
        self.put(logits_Bn, column_B, -torch.inf)
        units_BD = chunk.prototypes_nD.index_select(0, column_B)
        product_B = (self.question.queries_BD * units_BD).sum(dim=1)
        if chunk.inverse_n1 is not None:
            product_B *= chunk.inverse_n1[:, 0].index_select(0, column_B)
        logit_B, _, scaled_B = entry_logits(self.question, product_B)
        slope_B = None if scaled_B is None or self.question.scale_B1 is None else scaled_B / self.question.scale_B1[:, 0]
        return column_B, logit_B.masked_fill(largest_B == -torch.inf, -torch.inf), slope_B

    def keep(self, chunk: Chunk, weights_Bn: Tensor, slope_Bn: Tensor | None) -> None:
        """Keeps what `weigh` will be asked for, if there is room: weights, times the slope of a map."""
        kept_Bn = None if self.kept is None else self.kept.weights(chunk.rows)
        if kept_Bn is None:
            return
        if slope_Bn is not None:
            torch.mul(weights_Bn, slope_Bn, out=kept_Bn)
        elif kept_Bn.data_ptr() != weights_Bn.data_ptr():
            kept_Bn.copy_(weights_Bn)

    def operand(self, chunk: Chunk) -> Tensor:
        """Unit prototypes [n, D] times exp(bias), where that is not in the logits."""
        if self.factor_S is None:
            return chunk.units_nD
        assert chunk.inverse_n1 is not None
        return self._scaled(chunk.prototypes_nD, chunk.inverse_n1 * self.factor_S[chunk.rows, None], self.weighted_units)

    def prototype_gradient(self, chunk: Chunk, weights_Bn: Tensor, weighted_BD: Tensor, apart: Apart) -> Tensor:
        """[n, D], in the precision of the inputs: weights^T x weighted queries, through the norm, and what was computed apart; valid
        until the next chunk."""
        count = len(chunk.units_nD)
        grad_nD, spare_nD = self.wide[:count], self.spare[:count]
        multiply(weights_Bn.T, weighted_BD, grad_nD, self.weighted_units[:count])
        out_nD = self.wide[: count + 1] if self.kept is None else self.kept.room[chunk.rows]
        if chunk.inverse_n1 is not None:
            # From the gradient of w / |w| to that of w: the part along w goes, the rest is divided by |w|.
            factor_n1 = chunk.inverse_n1 if self.factor_S is None else chunk.inverse_n1 * self.factor_S[chunk.rows, None]
            along_n1 = torch.mul(grad_nD, chunk.prototypes_nD, out=spare_nD).sum(dim=1, keepdim=True)
            grad_nD.addcmul_(chunk.prototypes_nD, along_n1.mul_(chunk.inverse_n1.square()), value=-1)
            torch.mul(grad_nD, factor_n1, out=out_nD[:count])
        elif self.kept is not None:
            out_nD.copy_(grad_nD)
        add_rows(out_nD, count, apart.rows_n - chunk.rows.start, apart.gradients_nD)
        return out_nD[:count]

    def row_sums(self, exp_Bn: Tensor, rows: slice) -> Tensor:
        """[B], in the precision of the inputs."""
        wide = self.question.queries_BD.dtype
        if self.weights_S is None or (self.is_rounded and self.factor_S is None):  # what is left out is 0 already
            return exp_Bn.sum(dim=1, dtype=wide)
        if exp_Bn.dtype is wide:
            return exp_Bn @ self.weights_S[rows]
        return torch.mul(exp_Bn, self.weights_S[rows], out=self._wide_tile(*exp_Bn.shape)).sum(dim=1)


class Weights:
    """d loss / d z_ij = factor_i x weight_ij [x exp(bias_j), where that is in the operands]: factors of rows stay out of the tile, so
    that the exponential is its only full pass."""

    def __init__(self, walk: Walk, known: Known, slopes: Slopes) -> None:
        self.walk, self.known, self.slopes = walk, known, slopes
        self.factor_B = slopes.sum_B
        self.shift_B1: Tensor | None = None
        if walk.question.reduction == "log_sum_exp":
            # A row without non-targets has log_sum = -inf and no gradient, rather than exp(inf) x 0.
            has_others_B = torch.isfinite(known.log_sum_B)
            log_sum_B = known.log_sum_B.where(has_others_B, 0) * LOG2_E
            if not walk.question.bounded:
                self.shift_B1 = log_sum_B[:, None]
                if walk.is_rounded:  # the tile then has few digits: a whole number leaves them to the logits
                    self.shift_B1 = self.shift_B1.round()
                log_sum_B = log_sum_B - self.shift_B1[:, 0]
            self.factor_B = (self.factor_B * torch.exp2(-log_sum_B)).where(has_others_B, 0)
        if walk.question.columns:
            self.row_factor_B1, self.factor_B = self.factor_B[:, None], torch.ones_like(self.factor_B)

    def of(self, chunk: Chunk, logits_Bn: Tensor) -> Tensor:
        question, base = self.walk.question, self.walk.base
        by_column_Bn = None
        if self.known.column_S is not None and self.slopes.column_S is not None:
            column_n, slope_n = self.known.column_S[chunk.rows], self.slopes.column_S[chunk.rows]
            is_finite_n = torch.isfinite(column_n)
            by_column_Bn = torch.exp(logits_Bn / base - column_n.where(is_finite_n, 0)) * slope_n.where(is_finite_n, 0)
        if question.reduction == "softplus_sum":
            weights_Bn = logits_Bn.sigmoid_()
        else:
            weights_Bn = (logits_Bn if self.shift_B1 is None else logits_Bn.sub_(self.shift_B1)).exp2_()
        return weights_Bn if by_column_Bn is None else weights_Bn * self.row_factor_B1 + by_column_Bn

    def of_entries(self, logit_B: Tensor, rows_B: Tensor) -> Tensor:
        """d loss / d z of one entry per row."""
        if self.walk.question.reduction == "softplus_sum":
            weight_B = self.slopes.sum_B * logit_B.sigmoid()
        else:
            weight_B = self.slopes.sum_B * torch.exp(logit_B - self.known.log_sum_B)
        if self.known.column_S is not None and self.slopes.column_S is not None:
            weight_B = weight_B + self.slopes.column_S[rows_B] * torch.exp(logit_B - self.known.column_S[rows_B])
        return weight_B


def _largest(x_Bn: Tensor) -> tuple[Tensor, Tensor]:
    """(value [B], column [B]) of a large entry of each row: the largest, where that is positive. bfloat16 numbers above 0 are ordered
    like their bits, and torch compares integers faster."""
    batch, columns = x_Bn.shape
    if x_Bn.dtype is not torch.bfloat16 or columns % 64:
        return x_Bn.max(dim=1)
    blocks_Bx64 = x_Bn.view(torch.int16).view(batch, columns // 64, 64)
    block_B = blocks_Bx64.amax(dim=2).argmax(dim=1)
    largest_B, place_B = blocks_Bx64.gather(1, block_B[:, None, None].expand(batch, 1, 64))[:, 0].max(dim=1)
    return largest_B.view(torch.bfloat16), block_B * 64 + place_B


def multiply(left: Tensor, right: Tensor, out: Tensor, spare: Tensor | None = None) -> Tensor:
    """left @ right into `out`, which may be wider than they are; `spare` is memory in their dtype."""
    if left.dtype is out.dtype:
        return torch.mm(left, right, out=out)
    if out.is_cuda and out.dtype is torch.float32:  # sums in float32 that are not rounded at the end: CPUs have no such product
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return out.copy_(torch.mm(left, right, out=spare))
