"""Memory reused from step to step: on a CPU each page that the system hands out anew costs a fault, slower than filling it."""

import math
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from partial_fc.device_policy import policy_of

LEAST_BYTES = 1 << 20  # malloc itself keeps smaller blocks
ALIGNMENT = 64
IDLE_CALLS = 64  # a few steps; memory that stays unused for longer goes back to the system


class Block(NamedTuple):
    memory: np.ndarray
    user: weakref.ref[np.ndarray]  # to the part that a tensor lies in
    call: int  # the call that gave it out


class BufferPool:
    """Gives out tensors, and reuses their memory once nothing refers to them; where the device's policy says so."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.calls = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if not policy_of(device).pools_memory or size < LEAST_BYTES:
            return torch.empty(shape, dtype=dtype, device=device)
        self.calls += 1
        fitting = [block.memory for block in self.blocks if block.user() is None and size <= len(block.memory) - ALIGNMENT <= 2 * size]
        memory = min(fitting, key=len) if fitting else np.empty(size + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        used = memory[start : start + size]  # lives as long as the tensor's storage
        others = [block for block in self.blocks if block.memory is not memory and not self._is_idle(block)]
        self.blocks = [*others, Block(memory, weakref.ref(used), self.calls)]
        return torch.from_numpy(used).view(dtype).view(shape)

    def _is_idle(self, block: Block) -> bool:
        return block.user() is None and self.calls - block.call > IDLE_CALLS

    def __reduce__(self) -> tuple[Any, ...]:
        return BufferPool, ()  # a copy has memory of its own
