"""A copy of what is to be saved in this rank's host memory: all that training waits for when a checkpoint is written beside it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pipeline.checkpoint.data_file import size_of
from pipeline.checkpoint.parts import Part

ALIGNMENT = 64  # bytes


class HostCopy:
    """One buffer, made once and used for every save; pinned where tensors are on a GPU, so that copies run at the speed of the bus."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.touching: threading.Thread | None = None

    def reserve(self, parts: dict[str, Part]) -> None:
        """Gets the memory ahead of the first save: the system hands it out page by page, which takes longer than the copy."""
        self._make(parts)
        self.touching = threading.Thread(target=self.buffer.zero_, name="protoshard-host-memory", daemon=True)
        self.touching.start()

    def of(self, parts: dict[str, Part]) -> tuple[dict[str, Part], Callable[[], None]]:
        """The parts with tensors in the buffer, which the next call overwrites; and what copies those that are settled, to be called from
        any thread. The others are there on return."""
        if self.touching is not None:
            self.touching.join()
            self.touching = None
        if len(self.buffer) < _room(parts):
            self._make(parts)
        copies, at = {}, 0
        now: list[tuple[Tensor, Tensor]] = []
        later: list[tuple[Tensor, Tensor]] = []
        for name, part in parts.items():
            tensor = part.tensor.detach()
            size = size_of({name: part})
            slot = self.buffer[at : at + size].view(tensor.dtype).view(tensor.shape)
            (later if part.settled else now).append((slot, tensor))
            copies[name] = replace(part, tensor=slot)
            at += _aligned(size)
        _copy(now)
        device = next((tensor.device for _, tensor in later + now if tensor.is_cuda), None)
        if device is None:
            return copies, partial(_copy, later)
        torch.cuda.current_stream(device).synchronize()  # copies are there, and whatever moved the settled ones is done
        return copies, partial(_copy_beside, later, device)

    def _make(self, parts: dict[str, Part]) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)  # first the old one goes
        self.buffer = torch.empty(_room(parts), dtype=torch.uint8, pin_memory=any(_is_on_gpu(part.tensor) for part in parts.values()))


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for slot, tensor in pairs:
        slot.copy_(tensor, non_blocking=True)


def _copy_beside(pairs: list[tuple[Tensor, Tensor]], device: torch.device) -> None:
    """On a stream of its own, beside the kernels of the next step."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        _copy(pairs)
    stream.synchronize()


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _room(parts: dict[str, Part]) -> int:
    return sum(_aligned(size_of({name: part})) for name, part in parts.items())


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT
