"""What a checkpoint is made of: named tensors, of which each rank holds a range of elements. Neither the engine nor the number of ranks
shows in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """This rank's elements [start, start + tensor.numel()) of a tensor of `shape`, counted in row-major order: some rows of a matrix, a
    fragment of a flat optimizer state, or all of it.

    replicated: every rank has all of it, so that any one of them may write it
    settled: stays as it is until an optimizer moves it, so that it may be copied while the next step computes its gradients"""

    tensor: Tensor
    shape: tuple[int, ...]
    start: int = 0
    replicated: bool = False
    settled: bool = False

    def __post_init__(self) -> None:
        assert self.start >= 0 and self.start + self.tensor.numel() <= math.prod(self.shape), (self.start, self.tensor.shape, self.shape)


def whole(tensor: Tensor) -> Part:
    """A tensor that is equal on every rank."""
    return Part(tensor, tuple(tensor.shape), replicated=True)


def rows(local_SD: Tensor, first: int, count: int) -> Part:
    """This rank's rows, from row `first` on, of a matrix (or vector) with `count` rows."""
    width = math.prod(local_SD.shape[1:])
    return Part(local_SD, (count, *local_SD.shape[1:]), first * width)


class Saved(Protocol):
    """Tensors to be read by name: a checkpoint (`reading.Checkpoint`, of format 1 `first_format.FirstCheckpoint`), or tensors in memory
    (`Held`)."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def fill(self, name: str, out: Tensor, start: int = 0) -> None:
        """Writes the elements [start, start + out.numel()) of that tensor, in row-major order, into `out`, of any shape, device, dtype."""
        ...

    def whole(self, name: str) -> Tensor:
        """All of it, in its own dtype and on the CPU."""
        out = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.fill(name, out)
        return out


class Without:
    """`Saved` but for what has names that begin with `prefix`."""

    def __init__(self, saved: Saved, prefix: str) -> None:
        self.saved, self.prefix = saved, prefix
        self.shape, self.dtype, self.fill, self.whole = saved.shape, saved.dtype, saved.fill, saved.whole

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.saved if not name.startswith(self.prefix))

    def __contains__(self, name: object) -> bool:
        return name in self.saved and not str(name).startswith(self.prefix)


class Held:
    """Tensors in memory, as `Saved`."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def fill(self, name: str, out: Tensor, start: int = 0) -> None:
        out.copy_(self.tensors[name].detach().reshape(-1)[start : start + out.numel()].view(out.shape))

    def whole(self, name: str) -> Tensor:
        return self.tensors[name].detach().cpu()
