"""Where the prototypes of a step come from, chunk by chunk, and where their gradient goes: all rows of a matrix, sampled rows, rows mixed
with a bank, rows of two sources; into a gradient or directly into an optimizer."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from partial_fc.buffer_pool import BufferPool
from partial_fc.unit_rows import inverse_norms


class Collector(Protocol):
    """Takes the gradient of one backward pass."""

    def store(self, rows: slice, gradient_nD: Tensor) -> None:
        """Takes the gradient of these rows, once for every row of the source, ascending. The tensor is reused afterwards: copy it."""

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of the source's `tensors`, in their order; None where autograd has nothing to add."""


class PrototypeSource(Protocol):
    pool: BufferPool  # for what a step needs
    tensors: tuple[Tensor, ...]  # what the prototypes are made of, for autograd
    shape: tuple[int, int]  # rows, width
    moves_in_backward: bool  # whether backward moves the prototypes, so that they serve once

    def load(self, rows: slice | Tensor) -> Tensor:
        """Prototypes [n, D] of these rows, any norm. Do not write to them. Those of a slice are valid until the next slice is loaded."""

    def gradient_memory(self) -> Tensor | None:
        """New memory [rows, width] for the gradient of one backward pass, to pass to `collector`; None if no such memory is needed. Until
        the gradient of a row is stored there, others may use it and compute that gradient in it."""

    def collector(self, memory: Tensor | None = None) -> Collector: ...


class Consumer(Protocol):
    """An optimizer that updates rows during backward: see RowSGD(in_backward=True)."""

    def begin_update(self) -> None: ...

    def consume(self, rows: slice | Tensor, gradient_nD: Tensor, is_real_n: Tensor | None) -> None: ...


class Companion(Protocol):
    """The optimizer of a classifier's rows, which learns from the classifier what happens to them."""

    @property
    def has_moved(self) -> bool:
        """Backward has moved rows, and the step has not ended yet."""
        ...

    def before_use(self, rows_K: Tensor) -> None:
        """The rows of a new sample are about to be read."""

    def flush(self) -> None:
        """All rows are about to be read."""

    def after_move(self) -> None:
        """The parameters have another dtype or device."""


class AllRows:
    """All rows of a matrix [S, D], with a dense gradient."""

    def __init__(self, prototypes_SD: Tensor, consumer: Consumer | None = None, pool: BufferPool | None = None) -> None:
        self.tensors: tuple[Tensor, ...] = (prototypes_SD,)
        self.shape = (prototypes_SD.shape[0], prototypes_SD.shape[1])
        self.consumer, self.pool, self.moves_in_backward = consumer, pool or BufferPool(), consumer is not None

    def load(self, rows: slice | Tensor) -> Tensor:
        return _widened(self.tensors[0].detach()[rows])

    def gradient_memory(self) -> Tensor | None:
        return _empty(self, self.shape) if self.consumer is None else None

    def collector(self, memory: Tensor | None = None) -> Collector:
        if self.consumer is not None:
            return _Consumed(self.consumer, None, None)
        return _Stored(_empty(self, self.shape) if memory is None else memory, lambda gradient_SD: gradient_SD)


class SampledRows:
    """Distinct rows `rows_K` of a matrix [S, D], with a sparse gradient of these rows. `is_real_K` is False for padding."""

    def __init__(
        self, prototypes_SD: Tensor, rows_K: Tensor, is_real_K: Tensor, consumer: Consumer | None = None, pool: BufferPool | None = None
    ) -> None:
        self.tensors: tuple[Tensor, ...] = (prototypes_SD,)
        self.shape = (len(rows_K), prototypes_SD.shape[1])
        self.rows_K, self.is_real_K, self.consumer, self.pool = rows_K, is_real_K, consumer, pool or BufferPool()
        self.moves_in_backward = consumer is not None
        self.loaded = prototypes_SD.new_empty(0)

    def load(self, rows: slice | Tensor) -> Tensor:
        prototypes_SD = self.tensors[0].detach()
        if isinstance(rows, Tensor):
            return _widened(prototypes_SD.index_select(0, self.rows_K[rows]))
        if len(self.loaded) < rows.stop - rows.start:
            self.loaded = _empty(self, (rows.stop - rows.start, self.shape[1]))
        return _widened(torch.index_select(prototypes_SD, 0, self.rows_K[rows], out=self.loaded[: rows.stop - rows.start]))

    def gradient_memory(self) -> Tensor | None:
        return _empty(self, self.shape) if self.consumer is None else None

    def collector(self, memory: Tensor | None = None) -> Collector:
        if self.consumer is not None:
            return _Consumed(self.consumer, self.rows_K, self.is_real_K)
        size, rows_1K = self.tensors[0].shape, self.rows_K[None]
        return _Stored(
            _empty(self, self.shape) if memory is None else memory,
            lambda values_KD: torch.sparse_coo_tensor(rows_1K, values_KD, size, check_invariants=False),
        )


class FrozenRows:
    """The rows of another source, without gradient."""

    def __init__(self, source: PrototypeSource) -> None:
        self.load, self.shape, self.pool, self.moves_in_backward = source.load, source.shape, source.pool, False
        self.tensors = tuple(tensor.detach() for tensor in source.tensors)  # for torch to notice if they change before backward

    def gradient_memory(self) -> Tensor | None:
        return None

    def collector(self, memory: Tensor | None = None) -> Collector:
        raise AssertionError("frozen rows have no gradient")


class ConcatenatedRows:
    """The rows of one source, followed by those of another."""

    def __init__(self, first: PrototypeSource, second: PrototypeSource) -> None:
        self.first, self.second, self.pool, self.moves_in_backward = first, second, first.pool, first.moves_in_backward
        self.tensors: tuple[Tensor, ...] = (*first.tensors, *second.tensors)
        self.split = first.shape[0]
        self.shape = (self.split + second.shape[0], first.shape[1])

    def load(self, rows: slice | Tensor) -> Tensor:
        if isinstance(rows, Tensor):
            if not self.split:
                return self.second.load(rows)
            if not self.second.shape[0]:
                return self.first.load(rows)
            of_first_nD, of_second_nD = self.first.load(rows.clamp(max=self.split - 1)), self.second.load((rows - self.split).clamp(min=0))
            return of_first_nD.where((rows < self.split)[:, None], of_second_nD)
        parts = [source.load(part) for source, part in zip((self.first, self.second), self._parts(rows), strict=True) if part is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _parts(self, rows: slice) -> tuple[slice | None, slice | None]:
        first, second = slice(rows.start, min(rows.stop, self.split)), slice(max(0, rows.start - self.split), rows.stop - self.split)
        return first if first.start < first.stop else None, second if second.start < second.stop else None

    def gradient_memory(self) -> Tensor | None:
        first, second = self.first.tensors[0], self.second.tensors[0]
        if self.moves_in_backward or first.dtype != second.dtype:
            return None
        return self.pool.empty(self.shape, first.dtype, first.device)

    def collector(self, memory: Tensor | None = None) -> Collector:
        return _ConcatenatedCollector(self, memory)


class MixedRows:
    """(1 - share) w / |w| + share f: prototypes w of another source mixed with rows f of a bank, which has no gradient; w has none either
    where the share is 1. rows_n: the row of the bank of each prototype; None if they are all rows, in order."""

    def __init__(self, prototypes: PrototypeSource, bank_SD: Tensor, rows_n: Tensor | None, share_n: Tensor) -> None:
        self.prototypes, self.bank_SD, self.rows_n = prototypes, bank_SD, rows_n
        self.share_n1 = share_n[:, None]
        self.tensors: tuple[Tensor, ...] = (*prototypes.tensors, bank_SD)  # for torch to notice if it changes before backward
        self.shape, self.pool, self.moves_in_backward = prototypes.shape, prototypes.pool, prototypes.moves_in_backward
        self.loaded = bank_SD.new_empty(0)

    def load(self, rows: slice | Tensor) -> Tensor:
        prototypes_nD, share_n1 = self.prototypes.load(rows), self.share_n1[rows]
        features_nD = self.bank_SD[rows if self.rows_n is None else self.rows_n[rows]]
        factor_n1 = (1 - share_n1) * inverse_norms(prototypes_nD)
        if isinstance(rows, Tensor):
            return (prototypes_nD * factor_n1).addcmul_(features_nD, share_n1)
        if len(self.loaded) < len(prototypes_nD):
            self.loaded = self.pool.empty((len(prototypes_nD), self.shape[1]), prototypes_nD.dtype, prototypes_nD.device)
        return torch.mul(prototypes_nD, factor_n1, out=self.loaded[: len(prototypes_nD)]).addcmul_(features_nD, share_n1)

    def gradient_memory(self) -> Tensor | None:
        return self.prototypes.gradient_memory()

    def collector(self, memory: Tensor | None = None) -> Collector:
        return _MixedCollector(self, self.prototypes.collector(memory))


def _empty(source: AllRows | SampledRows, shape: tuple[int, int]) -> Tensor:
    return source.pool.empty(shape, source.tensors[0].dtype, source.tensors[0].device)


def _widened(prototypes_nD: Tensor) -> Tensor:
    """Prototypes stored in bfloat16 are normalised in float32."""
    return prototypes_nD.float() if prototypes_nD.dtype is torch.bfloat16 else prototypes_nD


class _Stored:
    """Keeps the gradient in `memory`; `finish` turns it into what autograd gets."""

    def __init__(self, memory_nD: Tensor, finish: Callable[[Tensor], Tensor]) -> None:
        self.memory_nD, self.finish = memory_nD, finish

    def store(self, rows: slice, gradient_nD: Tensor) -> None:
        place_nD = self.memory_nD[rows]
        if gradient_nD.data_ptr() != place_nD.data_ptr():  # otherwise it was computed there
            place_nD.copy_(gradient_nD)

    def gradients(self) -> tuple[Tensor | None, ...]:
        return (self.finish(self.memory_nD),)


class _Consumed:
    def __init__(self, consumer: Consumer, rows_K: Tensor | None, is_real_K: Tensor | None) -> None:
        self.consumer, self.rows_K, self.is_real_K = consumer, rows_K, is_real_K
        consumer.begin_update()

    def store(self, rows: slice, gradient_nD: Tensor) -> None:
        is_real_n = None if self.is_real_K is None else self.is_real_K[rows]
        self.consumer.consume(rows if self.rows_K is None else self.rows_K[rows], gradient_nD, is_real_n)

    def gradients(self) -> tuple[Tensor | None, ...]:
        return (None,)


class _ConcatenatedCollector:
    def __init__(self, joined: ConcatenatedRows, memory: Tensor | None) -> None:
        self.joined = joined
        self.first = joined.first.collector(None if memory is None else memory[: joined.split])
        self.second = joined.second.collector(None if memory is None else memory[joined.split :])

    def store(self, rows: slice, gradient_nD: Tensor) -> None:
        first, second = self.joined._parts(rows)
        split = 0 if first is None else first.stop - first.start
        if first is not None:
            self.first.store(first, gradient_nD[:split])
        if second is not None:
            self.second.store(second, gradient_nD[split:])

    def gradients(self) -> tuple[Tensor | None, ...]:
        return (*self.first.gradients(), *self.second.gradients())


class _MixedCollector:
    def __init__(self, mixed: MixedRows, collector: Collector) -> None:
        self.mixed, self.collector = mixed, collector

    def store(self, rows: slice, gradient_nD: Tensor) -> None:
        prototypes_nD = self.mixed.prototypes.load(rows)
        inverse_n1 = inverse_norms(prototypes_nD)
        along_n1 = (gradient_nD * prototypes_nD).sum(dim=1, keepdim=True) * inverse_n1.square()
        across_nD = torch.addcmul(gradient_nD, prototypes_nD, along_n1, value=-1)
        self.collector.store(rows, across_nD.mul_((1 - self.mixed.share_n1[rows]) * inverse_n1))

    def gradients(self) -> tuple[Tensor | None, ...]:
        return (*self.collector.gradients(), None)
