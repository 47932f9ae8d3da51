"""What forward leaves to backward on a CPU, where products are slow and memory is not: weights of the similarity matrix, in memory that
would lie idle until then."""

from __future__ import annotations

import torch
from torch import Tensor


class Kept:
    """Weights of as many chunks as fit into the room for the gradient of prototypes: it would lie idle until backward, and a batch no
    larger than the width needs no more. Behind a chunk's weights its unit prototypes, if they fit: in bfloat16 a batch no larger than
    the width leaves the room for them. A chunk's gradient is stored over what has been used."""

    def __init__(self, room: Tensor, batch: int, dtype: torch.dtype) -> None:
        self.room, self.batch, self.dtype = room, batch, dtype
        of_class = room.shape[1] * room.element_size()
        self.stride = -(-batch * dtype.itemsize // of_class) * of_class  # bytes of a class
        self.units_fit = (batch + room.shape[1]) * dtype.itemsize <= self.stride
        self.inverse: dict[int, Tensor] = {}  # by first row, as what follows: 1 / |w| of a chunk whose unit prototypes are kept
        self.hardest: dict[int, tuple[Tensor, Tensor]] = {}  # (column, weight) that a chunk's weights leave out
        self.shift_B1: dict[int, Tensor] = {}  # a chunk's weights are 2^(logit - shift), of the largest logits so far

    def weights(self, rows: slice) -> Tensor | None:
        """Memory [B, n] of a chunk; None where the room ends."""
        count = rows.stop - rows.start
        return self._memory(rows.start * self.stride, self.batch, count)

    def units(self, rows: slice) -> Tensor | None:
        """Memory [n, D] of a chunk, of the same."""
        count = rows.stop - rows.start
        first = rows.start * self.stride + count * self.batch * self.dtype.itemsize
        return self._memory(first, count, self.room.shape[1]) if self.units_fit else None

    def _memory(self, first: int, *shape: int) -> Tensor | None:
        size = shape[0] * shape[1] * self.dtype.itemsize
        memory = self.room.view(-1).view(torch.uint8)[first : first + size]
        return memory.view(self.dtype).view(shape) if len(memory) == size else None
