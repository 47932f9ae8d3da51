"""The loop over the columns in chunks: memory, logits and weights of one B x chunk tile at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.device_policy import policy_of
from partial_fc.kernels import Problem
from partial_fc.kernels.exact_entries import ExactGradients, add_rows, entry_logits
from partial_fc.unit_rows import inverse_norms


class Chunk(NamedTuple):
    """Columns `span` of this rank, n of them."""

    span: slice
    columns_nD: Tensor  # as loaded
    inverse_n1: Tensor | None  # 1 / |w|, 0 if w has no direction; None if columns are not normalised
    units_nD: Tensor  # in the dtype of products


class Tile(NamedTuple):
    """Logits [B, n] of a chunk, -inf for excluded columns; with a map its values and slopes."""

    logits_Bn: Tensor  # times the statistic's base
    mapped_Bn: Tensor | None = None
    slope_Bn: Tensor | None = None


class Hardest(NamedTuple):
    """A large non-target of each row in a tile, from float32 rows; it is masked in the tile. It is the largest one where that is positive,
    and only there does its rounding count."""

    place_B: Tensor  # in the tile
    logit_B: Tensor
    unbiased_B: Tensor  # the logit without bias
    slope_B: Tensor | None  # of the mapped cosine by the cosine; None for 1


class TileLoop:
    """Goes over the chunks of a problem's columns and computes logits. Every chunk reuses the memory of the one before: new memory from the
    system costs as much as a pass over it."""

    bias_in_operands = True

    def __init__(self, problem: Problem) -> None:
        self.problem, self.source, self.count = problem, problem.columns.source, problem.columns.size
        self.policy = policy_of(problem.queries_BD.device)
        batch, width = problem.queries_BD.shape
        chunks = max(1, -(-self.count // self.largest(max(batch, 1), width)))
        self.size = max(1, min(self.count, -(-self.count // chunks // 64) * 64))  # equal chunks: a short last one would waste cores
        self.is_rounded = problem.dtype.itemsize < problem.queries_BD.dtype.itemsize
        self.exact_columns_B: Tensor | None = None  # in backward: non-targets masked too, as they are computed exactly
        self.base = problem.statistic.base
        scaled_BD = problem.queries_BD * self.base if problem.map is None else problem.queries_BD
        self.queries_BD = scaled_BD.to(problem.dtype)
        self.allocate(batch, width)
        self.first_B = torch.arange(batch, device=scaled_BD.device)
        # f(z + bias) = f(z) exp(bias): if exponentials are bounded, the factor goes into the operands and the tile stays as it is.
        bias_n, is_in_n = problem.columns.bias_n, problem.columns.mask.included_n
        in_operands = self.bias_in_operands and problem.statistic.is_exponential and not problem.shifts
        self.factor_n = bias_n.exp() if in_operands and bias_n is not None else None
        self.weights_n = self.factor_n
        if in_operands and is_in_n is not None:
            self.weights_n = is_in_n.to(scaled_BD.dtype) if self.factor_n is None else self.factor_n.where(is_in_n, 0)
        self.bias_n = None
        if not in_operands and (bias_n is not None or is_in_n is not None):
            self.bias_n = scaled_BD.new_zeros(self.count) if bias_n is None else bias_n * self.base
            self.bias_n = self.bias_n if is_in_n is None else self.bias_n.where(is_in_n, -torch.inf)

    def largest(self, batch: int, width: int) -> int:
        """Most columns of a chunk. A map passes over several tiles in the precision of the inputs."""
        share = 1 if self.problem.map is None else self.policy.passes_of_map
        item = self.problem.dtype.itemsize
        return max(256, min(self.problem.tile_bytes // (share * batch * item), self.policy.units_bytes // (width * item)))

    def allocate(self, batch: int, width: int) -> None:
        self.tile = self.empty(self.problem.dtype, batch * self.size)
        self.wide_tiles: dict[int, Tensor] = {}
        self.units, self.weighted_units = (self.empty(self.problem.dtype, self.size, width) for _ in range(2))
        self.wide, self.spare = (self.empty(self.problem.queries_BD.dtype, self.size + 1, width) for _ in range(2))

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return self.source.pool.empty(shape, dtype, self.queries_BD.device)

    def chunks(self) -> Iterator[Chunk]:
        for first in range(0, self.count, self.size):
            span = slice(first, min(first + self.size, self.count))
            yield self.chunk(span, self.source.load(span))

    def chunk(self, span: slice, columns_nD: Tensor) -> Chunk:
        return self.normalized(span, columns_nD, self.units[: len(columns_nD)])

    def normalized(self, span: slice, columns_nD: Tensor, units_nD: Tensor) -> Chunk:
        """A chunk, with its unit columns written to `units_nD`."""
        inverse_n1 = inverse_norms(columns_nD) if self.problem.columns.normalize else None
        is_in_n = self.problem.columns.mask.included_n
        if inverse_n1 is not None and is_in_n is not None:
            inverse_n1.masked_fill_(~is_in_n[span, None], 0)  # they weigh 0, and so need no product
        return Chunk(span, columns_nD, inverse_n1, _scaled(columns_nD, inverse_n1, units_nD))

    def tile_memory(self, span: slice) -> Tensor:
        """[B, n]."""
        batch, columns = len(self.queries_BD), span.stop - span.start
        return self.tile[: batch * columns].view(batch, columns)

    def tile_of(self, chunk: Chunk, wants_slope: bool = False) -> Tile:
        problem, (batch, columns) = self.problem, (len(self.queries_BD), len(chunk.units_nD))
        logits_Bn = torch.mm(self.queries_BD, chunk.units_nD.T, out=self.tile_memory(chunk.span))
        mapped_Bn = slope_Bn = None
        if problem.map is not None and problem.scale_B1 is not None:
            # In the precision of the inputs, to avoid more roundings after the one of the product to bfloat16.
            cosines_Bn = self._wide_tile(batch, columns).copy_(logits_Bn) if self.is_rounded else logits_Bn
            spare = self._wide_tile(batch, columns, 1), self._wide_tile(batch, columns, 2)
            mapped_Bn, slope_Bn = problem.map.with_slope(cosines_Bn, wants_slope, spare)
            logits_Bn = torch.mul(mapped_Bn, problem.scale_B1 * self.base, out=spare[1])
        if self.bias_n is not None:
            # In float32, since a second rounding would lose what the subtraction of a threshold leaves.
            memory = logits_Bn if logits_Bn.dtype is self.bias_n.dtype else self._wide_tile(batch, columns)
            logits_Bn = torch.add(logits_Bn, self.bias_n[chunk.span], out=memory)
        self._mask(logits_Bn, chunk.span)
        is_in_n = problem.columns.mask.included_n
        if self.is_rounded and self.weights_n is not None and is_in_n is not None:
            self._leave_out(logits_Bn, ~is_in_n[chunk.span])
        return Tile(logits_Bn, mapped_Bn, slope_Bn)

    def _leave_out(self, logits_Bn: Tensor, is_out_n: Tensor) -> None:
        """Columns of weight 0 are never a row's hardest. Most chunks of a sample have none."""
        if not self.policy.host_looks or is_out_n.numpy().any():
            logits_Bn.masked_fill_(is_out_n, -torch.inf)

    def _wide_tile(self, batch: int, columns: int, place: int = 0) -> Tensor:
        """Memory in the precision of the inputs; each place has its own."""
        if place not in self.wide_tiles:
            self.wide_tiles[place] = self.empty(self.wide.dtype, batch * self.size)
        return self.wide_tiles[place][: batch * columns].view(batch, columns)

    def weigh(self, chunk: Chunk, shift_B1: Tensor | None) -> tuple[Tensor, Tile]:
        """(weights f'(z - shift) [B, n] of backward's products, their tile), without row factors: the exponential is the only full pass."""
        tile = self.tile_of(chunk, wants_slope=True)
        logits_Bn = tile.logits_Bn if shift_B1 is None else tile.logits_Bn.sub_(shift_B1)
        return self.problem.statistic.weights_(logits_Bn), tile

    def _mask(self, logits_Bn: Tensor, span: slice) -> None:
        """Masks targets before the exponential; they are never subtracted after it."""
        columns = self.problem.columns
        if columns.mask.labels is None:
            self.put(logits_Bn, columns.masked_columns() - span.start, -torch.inf)
        else:
            labels_B, labels_n = columns.mask.labels
            logits_Bn.masked_fill_(labels_B[:, None] == labels_n[span], -torch.inf)
        if self.exact_columns_B is not None:
            self.put(logits_Bn, self.exact_columns_B - span.start, -torch.inf)

    def put(self, tile_Bn: Tensor, place_B: Tensor, value: float | Tensor) -> None:
        """Writes one entry of each row whose place lies in the tile."""
        columns = tile_Bn.shape[1]
        is_here_B = (place_B >= 0) & (place_B < columns)
        flat_B = self.first_B * columns + place_B.clamp(0, columns - 1)
        # The other rows rewrite one of their entries, since selecting them would make the host wait for the device.
        flat = tile_Bn.view(-1)
        old_B = flat.index_select(0, flat_B)
        new_B = old_B.masked_fill_(is_here_B, value) if isinstance(value, float) else value.where(is_here_B, old_B)
        flat.index_copy_(0, flat_B, new_B)  # as fast as put_ here, which torch's deterministic algorithms refuse; scatter_ is slower

    def take_hardest(self, chunk: Chunk, logits_Bn: Tensor) -> Hardest:
        """The largest non-target of each row, which this then masks."""
        largest_B, place_B = _largest(logits_Bn)
        self.put(logits_Bn, place_B, -torch.inf)
        columns_BD = chunk.columns_nD.index_select(0, place_B)
        product_B = (self.problem.queries_BD * columns_BD).sum(dim=1)
        if chunk.inverse_n1 is not None:
            product_B *= chunk.inverse_n1[:, 0].index_select(0, place_B)
        unbiased_B, _, scaled_B = entry_logits(self.problem, product_B)
        slope_B = None if scaled_B is None or self.problem.scale_B1 is None else scaled_B / self.problem.scale_B1[:, 0]
        unbiased_B, bias_n = unbiased_B.masked_fill(largest_B == -torch.inf, -torch.inf), self.problem.columns.bias_n
        logit_B = unbiased_B if bias_n is None else unbiased_B + bias_n[chunk.span].index_select(0, place_B)
        return Hardest(place_B, logit_B, unbiased_B, slope_B)

    def operand(self, chunk: Chunk) -> Tensor:
        """Unit columns [n, D], times exp(bias) unless the logits contain it."""
        if self.factor_n is None:
            return chunk.units_nD
        assert chunk.inverse_n1 is not None
        return _scaled(chunk.columns_nD, chunk.inverse_n1 * self.factor_n[chunk.span, None], self.weighted_units[: len(chunk.units_nD)])

    def gradient_memory(self, span: slice) -> Tensor:
        """Memory for the gradient of a chunk and the spare row of `add_rows`."""
        return self.wide[: span.stop - span.start + 1]

    def column_gradient(self, chunk: Chunk, weights_Bn: Tensor, weighted_BD: Tensor, exact: ExactGradients) -> Tensor:
        """[n, D], wide, valid until the next chunk: weights^T x weighted queries through the norm, plus the exact gradients."""
        count = len(chunk.units_nD)
        grad_nD, spare_nD = self.wide[:count], self.spare[:count]
        multiply(weights_Bn.T, weighted_BD, grad_nD, self.weighted_units[:count])
        out_nD = self.gradient_memory(chunk.span)
        if chunk.inverse_n1 is not None:
            # From the gradient of w / |w| to that of w: the part along w is removed, the rest divided by |w|.
            factor_n1 = chunk.inverse_n1 if self.factor_n is None else chunk.inverse_n1 * self.factor_n[chunk.span, None]
            along_n1 = torch.mul(grad_nD, chunk.columns_nD, out=spare_nD).sum(dim=1, keepdim=True)
            grad_nD.addcmul_(chunk.columns_nD, along_n1.mul_(chunk.inverse_n1.square()), value=-1)
            torch.mul(grad_nD, factor_n1, out=out_nD[:count])
        elif out_nD.data_ptr() != grad_nD.data_ptr():
            out_nD[:count].copy_(grad_nD)
        add_rows(out_nD, count, exact.columns_m - chunk.span.start, exact.gradients_mD)
        return out_nD[:count]

    def row_sums(self, terms_Bn: Tensor, span: slice) -> Tensor:
        """[B], in the precision of the inputs."""
        wide = self.problem.queries_BD.dtype
        if self.weights_n is None or (self.is_rounded and self.factor_n is None):  # excluded columns are 0 already
            return terms_Bn.sum(dim=1, dtype=wide)
        if terms_Bn.dtype is wide:
            return terms_Bn @ self.weights_n[span]
        return torch.mul(terms_Bn, self.weights_n[span], out=self._wide_tile(*terms_Bn.shape)).sum(dim=1)


def _scaled(x_nD: Tensor, factor_n1: Tensor | None, out_nD: Tensor) -> Tensor:
    """x times factors of its rows, rounded to the dtype of `out`."""
    return out_nD.copy_(x_nD) if factor_n1 is None else torch.mul(x_nD, factor_n1, out=out_nD)


def _largest(x_Bn: Tensor) -> tuple[Tensor, Tensor]:
    """(value [B], place [B]) of a large entry of each row: the largest one, if that is positive. bfloat16 numbers above 0 are ordered like
    their bits, and torch compares integers faster."""
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
    if out.dtype is torch.float32 and policy_of(out.device).has_wide_products:
        if out.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32, out=out)
        return torch.mm(left.float(), right.float(), out=out)  # the same elsewhere, for tests
    return out.copy_(torch.mm(left, right, out=spare))
