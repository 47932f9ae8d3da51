"""Where the prototypes of one step come from, chunk by chunk, and where their gradient goes: the whole matrix or the sampled rows,
into a gradient or straight into an optimizer. A loss may bring its own (mixtures, sample features in place of prototypes)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from partial_fc.memory import Memory


class Collector(Protocol):
    """Takes the gradient of one backward pass."""

    def store(self, rows: slice, gradient_nD: Tensor) -> None:
        """The gradient of these rows, once for every row of the source, ascending. The tensor is reused afterwards: copy it."""
        ...

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of the source's `tensors`, in their order; None where there is nothing for autograd to add."""
        ...


class Source(Protocol):
    memory: Memory  # for what a step needs
    tensors: tuple[Tensor, ...]  # what the prototypes are made of, for autograd
    shape: tuple[int, int]  # rows, width
    is_consumed: bool  # whether backward moves the prototypes, so that they serve once

    def load(self, rows: slice | Tensor) -> Tensor:
        """Prototypes [n, D] of these rows, of any norm; of a slice valid until the next slice is loaded. Not written to."""
        ...

    def room(self) -> Tensor | None:
        """New memory [rows, width] for the gradient of one backward pass, to pass to `collect`; None where no such memory is needed.
        Until the gradient of a row is stored there, others may use it, and compute that gradient there."""
        ...

    def collect(self, room: Tensor | None = None) -> Collector: ...


class Consumer(Protocol):
    """An optimizer that updates rows during backward: see RowSGD(in_backward=True)."""

    def begin_update(self) -> None: ...

    def consume(self, rows: slice | Tensor, gradient_nD: Tensor, is_real_n: Tensor | None) -> None: ...


class Matrix:
    """All rows of a matrix [S, D]. Its gradient is dense."""

    def __init__(self, prototypes_SD: Tensor, consumer: Consumer | None = None, memory: Memory | None = None) -> None:
        self.tensors: tuple[Tensor, ...] = (prototypes_SD,)
        self.shape = (prototypes_SD.shape[0], prototypes_SD.shape[1])
        self.consumer, self.memory, self.is_consumed = consumer, memory or Memory(), consumer is not None

    def load(self, rows: slice | Tensor) -> Tensor:
        return _widened(self.tensors[0].detach()[rows])

    def room(self) -> Tensor | None:
        return _empty(self, self.shape) if self.consumer is None else None

    def collect(self, room: Tensor | None = None) -> Collector:
        if self.consumer is not None:
            return _Consumed(self.consumer, None, None)
        return _Dense(_empty(self, self.shape) if room is None else room)


class SampledRows:
    """Rows `rows_K` of a matrix [S, D], distinct. Its gradient is a sparse tensor of these rows. `is_real_K` is False for padding."""

    def __init__(
        self, prototypes_SD: Tensor, rows_K: Tensor, is_real_K: Tensor, consumer: Consumer | None = None, memory: Memory | None = None
    ) -> None:
        self.tensors: tuple[Tensor, ...] = (prototypes_SD,)
        self.shape = (len(rows_K), prototypes_SD.shape[1])
        self.rows_K, self.is_real_K, self.consumer, self.memory = rows_K, is_real_K, consumer, memory or Memory()
        self.is_consumed = consumer is not None
        self.loaded = prototypes_SD.new_empty(0)

    def load(self, rows: slice | Tensor) -> Tensor:
        prototypes_SD = self.tensors[0].detach()
        if isinstance(rows, Tensor):
            return _widened(prototypes_SD.index_select(0, self.rows_K[rows]))
        if len(self.loaded) < rows.stop - rows.start:
            self.loaded = _empty(self, (rows.stop - rows.start, self.shape[1]))
        return _widened(torch.index_select(prototypes_SD, 0, self.rows_K[rows], out=self.loaded[: rows.stop - rows.start]))

    def room(self) -> Tensor | None:
        return _empty(self, self.shape) if self.consumer is None else None

    def collect(self, room: Tensor | None = None) -> Collector:
        if self.consumer is not None:
            return _Consumed(self.consumer, self.rows_K, self.is_real_K)
        return _Sparse(_empty(self, self.shape) if room is None else room, self.rows_K, self.tensors[0].shape)


class Constant:
    """The rows of another source, without gradient."""

    def __init__(self, source: Source) -> None:
        self.load, self.shape, self.memory, self.is_consumed = source.load, source.shape, source.memory, False
        self.tensors = tuple(tensor.detach() for tensor in source.tensors)  # for torch to notice if they change before backward

    def room(self) -> Tensor | None:
        return None

    def collect(self, room: Tensor | None = None) -> Collector:
        raise AssertionError("nobody asks for the gradient of what has none")


def _empty(source: Matrix | SampledRows, shape: tuple[int, int]) -> Tensor:
    return source.memory.empty(shape, source.tensors[0].dtype, source.tensors[0].device)


def _widened(prototypes_nD: Tensor) -> Tensor:
    """Stored in bfloat16 or not, prototypes are normalised in float32."""
    return prototypes_nD.float() if prototypes_nD.dtype is torch.bfloat16 else prototypes_nD


def _put(gradient_nD: Tensor, place_nD: Tensor) -> None:
    if gradient_nD.data_ptr() != place_nD.data_ptr():  # else it was computed there
        place_nD.copy_(gradient_nD)


class _Dense:
    def __init__(self, gradient_SD: Tensor) -> None:
        self.gradient_SD = gradient_SD

    def store(self, rows: slice, gradient_nD: Tensor) -> None:
        _put(gradient_nD, self.gradient_SD[rows])

    def gradients(self) -> tuple[Tensor | None, ...]:
        return (self.gradient_SD,)


class _Sparse:
    def __init__(self, values_KD: Tensor, rows_K: Tensor, size: torch.Size) -> None:
        self.values_KD, self.rows_K, self.size = values_KD, rows_K, size

    def store(self, rows: slice, gradient_nD: Tensor) -> None:
        _put(gradient_nD, self.values_KD[rows])

    def gradients(self) -> tuple[Tensor | None, ...]:
        return (torch.sparse_coo_tensor(self.rows_K[None], self.values_KD, self.size, check_invariants=False),)


class _Consumed:
    def __init__(self, consumer: Consumer, rows_K: Tensor | None, is_real_K: Tensor | None) -> None:
        self.consumer, self.rows_K, self.is_real_K = consumer, rows_K, is_real_K
        consumer.begin_update()

    def store(self, rows: slice, gradient_nD: Tensor) -> None:
        if self.rows_K is None or self.is_real_K is None:
            self.consumer.consume(rows, gradient_nD, None)
        else:
            self.consumer.consume(self.rows_K[rows], gradient_nD, self.is_real_K[rows])

    def gradients(self) -> tuple[Tensor | None, ...]:
        return (None,)
