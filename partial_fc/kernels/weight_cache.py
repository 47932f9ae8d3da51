"""What forward leaves to backward on a CPU, where products are slow and memory is plentiful: weights of the similarity matrix, in the
memory that the gradient of prototypes will fill. A GPU recomputes weights faster than it writes and reads them."""

import torch
from torch import Tensor

from partial_fc.device_policy import policy_of
from partial_fc.kernels import NeededGradients, Problem
from partial_fc.kernels.tiles import Chunk, Hardest, Tile, TileLoop


def loop_for(problem: Problem, needed: NeededGradients) -> TileLoop:
    """The loop of forward: it keeps weights if backward will follow, can use them and has the memory."""
    if not needed.source or needed.scale or not policy_of(problem.queries_BD.device).keeps_weights:
        return TileLoop(problem)  # the gradient of the scale needs the mapped cosines
    if needed.bias and (problem.shifts or (problem.map is not None and problem.map.slope == "exact")):
        return TileLoop(problem)  # for this gradient kept weights lack digits (bfloat16, large logits), or wrongly hold the map's slope
    memory = problem.columns.source.gradient_memory()
    return TileLoop(problem) if memory is None else CachingLoop(problem, memory)


class CachingLoop(TileLoop):
    """Goes over the chunks twice, forward and backward, with the same memory. Keeps the weights of as many chunks as fit into `memory`, the
    memory for the gradient, which is idle until backward and fits them all if the batch is no larger than the width. The unit columns of a
    chunk follow its weights if they fit: in bfloat16 they do for such a batch. The gradient of a chunk overwrites what has been used."""

    def __init__(self, problem: Problem, memory: Tensor) -> None:
        self.gradient_SD, self.batch = memory, len(problem.queries_BD)
        of_column = memory.shape[1] * memory.element_size()
        self.stride = -(-self.batch * problem.dtype.itemsize // of_column) * of_column  # bytes of a column
        self.units_fit = (self.batch + memory.shape[1]) * problem.dtype.itemsize <= self.stride
        self.inverse: dict[int, Tensor] = {}  # by first column, as below: 1 / |w| of a chunk whose unit columns are kept
        self.hardest: dict[int, tuple[Tensor, Tensor]] = {}  # (place, weight) that a chunk's weights leave out
        self.shift_B1: dict[int, Tensor] = {}  # a chunk's weights are f'(logit - shift), with the largest logits so far as shift
        super().__init__(problem)

    def kept_weights(self, span: slice) -> Tensor | None:
        """Memory [B, n] of a chunk; None beyond the end of that memory."""
        return self._memory(span.start * self.stride, self.batch, span.stop - span.start)

    def kept_units(self, span: slice) -> Tensor | None:
        """Memory [n, D] of a chunk; None as above, or if they do not fit."""
        count, width = span.stop - span.start, self.gradient_SD.shape[1]
        first = span.start * self.stride + count * self.batch * self.problem.dtype.itemsize
        return self._memory(first, count, width) if self.units_fit else None

    def _memory(self, first: int, *shape: int) -> Tensor | None:
        dtype = self.problem.dtype
        size = shape[0] * shape[1] * dtype.itemsize
        memory = self.gradient_SD.view(-1).view(torch.uint8)[first : first + size]
        return memory.view(dtype).view(shape) if len(memory) == size else None

    def chunk(self, span: slice, columns_nD: Tensor) -> Chunk:
        units_nD = self.kept_units(span)
        if units_nD is None:
            return super().chunk(span, columns_nD)
        if span.start in self.inverse:
            return Chunk(span, columns_nD, self.inverse[span.start], units_nD)
        chunk = self.normalized(span, columns_nD, units_nD)
        if chunk.inverse_n1 is not None:
            self.inverse[span.start] = chunk.inverse_n1
        return chunk

    def tile_memory(self, span: slice) -> Tensor:
        kept_Bn = self.kept_weights(span)
        return super().tile_memory(span) if kept_Bn is None else kept_Bn

    def keep(self, chunk: Chunk, tile: Tile, terms_Bn: Tensor, hardest: Hardest | None, shift_B: Tensor | None) -> None:
        """Keeps a chunk's weights, times the slope of a map, from its tile of logits minus shift (times base) and their terms."""
        kept_Bn, statistic, first = self.kept_weights(chunk.span), self.problem.statistic, chunk.span.start
        if kept_Bn is None:
            return
        if shift_B is not None:
            self.shift_B1[first] = shift_B[:, None]
        if hardest is not None:
            logit_B = hardest.logit_B if self.factor_n is None else hardest.unbiased_B
            weight_B = statistic.weight(logit_B, 0.0 if shift_B is None else shift_B / self.base)
            self.hardest[first] = hardest.place_B, weight_B if hardest.slope_B is None else weight_B * hardest.slope_B
        weights_Bn = statistic.weights_(tile.logits_Bn, terms_Bn)
        if tile.slope_Bn is not None:
            torch.mul(weights_Bn, tile.slope_Bn, out=kept_Bn)
        elif kept_Bn.data_ptr() != weights_Bn.data_ptr():
            kept_Bn.copy_(weights_Bn)

    def weigh(self, chunk: Chunk, shift_B1: Tensor | None) -> tuple[Tensor, Tile]:
        kept_Bn, first = self.kept_weights(chunk.span), chunk.span.start
        if kept_Bn is None:
            return super().weigh(chunk, shift_B1)
        if self.exact_columns_B is not None:  # forward left out every chunk's hardest; only the largest of all is computed exactly
            place_B, weight_B = self.hardest[first]
            is_exact_B = place_B + first == self.exact_columns_B
            self.put(kept_Bn, place_B.masked_fill(is_exact_B, -1), weight_B.to(kept_Bn.dtype))
        if shift_B1 is not None:  # in bfloat16 a power of two, which rounds nothing
            kept_Bn *= torch.exp2(self.shift_B1[first] - shift_B1).to(kept_Bn.dtype)
        return kept_Bn, Tile(kept_Bn)

    def gradient_memory(self, span: slice) -> Tensor:
        return self.gradient_SD[span]
