"""Memory that is used again from step to step. On a CPU what the system hands out anew costs several times a pass over it: at 200,000
classes the page faults of one gradient take as long as a product with all of them."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST_BYTES = 1 << 20  # less than this malloc keeps by itself
ALIGNMENT = 64


class Memory:
    """Gives out tensors, and the same memory again once nobody refers to a tensor in it. On a GPU torch's own allocator does that."""

    def __init__(self) -> None:
        self.blocks: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []  # memory, and what is used of it

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < LEAST_BYTES:
            return torch.empty(shape, dtype=dtype, device=device)
        free = [place for place, (block, _) in enumerate(self.blocks) if self._is_free(place) and len(block) == size + ALIGNMENT]
        if free:
            block, _ = self.blocks.pop(free[0])
        else:  # sizes have changed, or this is the first step: what is not in use may never be again
            self.blocks = [block for place, block in enumerate(self.blocks) if not self._is_free(place)]
            block = np.empty(size + ALIGNMENT, np.uint8)
        start = -block.ctypes.data % ALIGNMENT
        used = block[start : start + size]  # lives as long as the tensor's storage, whoever holds that
        self.blocks.append((block, weakref.ref(used)))
        return torch.from_numpy(used).view(dtype).view(shape)

    def _is_free(self, place: int) -> bool:
        return self.blocks[place][1]() is None

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()  # a copy has memory of its own
