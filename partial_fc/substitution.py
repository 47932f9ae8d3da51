"""Pairwise substitution: for one step, sample features stand in for the prototypes of some classes. The abstract of GFace (Zhao et al.,
TIP 2025) names the mechanism; the form is ours. From the gathered batch, with gradient to both sides, or from the bank of last features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc import collectives, sampling
from partial_fc.bank import Bank, mixed
from partial_fc.collectives import Group
from partial_fc.columns import Columns
from partial_fc.sources import Collector, Matrix, Source

STREAM = 1  # of random numbers: the sample of classes has none


class Positives(NamedTuple):
    """Of each sample of a batch."""

    first_B: Tensor  # int64: the first sample of its identity, by place in the batch
    is_first_B: Tensor  # bool
    rows_B: Tensor  # int64: another sample of its identity, the first; for that one the second
    is_there_B: Tensor  # bool: whether there is another one


def positives_of(labels_B: Tensor) -> Positives:
    sorted_B, order_B = labels_B.sort(stable=True)
    start_B = torch.searchsorted(sorted_B, labels_B)  # place of the first sample of the identity among the sorted ones
    last_B = torch.searchsorted(sorted_B, labels_B, right=True) - 1
    first_B = order_B[start_B]
    is_first_B = first_B == torch.arange(len(labels_B), device=labels_B.device)
    return Positives(first_B, is_first_B, order_B[torch.where(is_first_B, torch.minimum(start_B + 1, last_B), start_B)], last_B > start_B)


def share_of(batch: int, group: Group) -> slice:
    """The samples of the gathered batch that are this rank's columns, where samples are."""
    share = -(-batch // collectives.world_size(group))
    first = min(batch, collectives.rank(group) * share)
    return slice(first, min(batch, first + share))


def within(rows_B: Tensor, mine: slice, is_wanted_B: Tensor | None = None) -> Tensor:
    """Places of rows within a slice; -1 for those outside, or not wanted."""
    is_here_B = (rows_B >= mine.start) & (rows_B < mine.stop)
    return (rows_B - mine.start).where(is_here_B if is_wanted_B is None else is_here_B & is_wanted_B, -1)


def substitute(columns: Columns, features_BD: Tensor, labels_B: Tensor, rate: float, seed: int, step: int, group: Group) -> Columns:
    """The columns with the prototype of each class of the batch replaced by its first sample, with probability `rate`, decided by numbers
    keyed (seed, step, class). For that sample itself, which must not meet itself, the prototype stays the target.

    The samples are further columns, B / N on each rank. Communicates nothing.
    """
    positives, mine, count = positives_of(labels_B), share_of(len(labels_B), group), columns.source.shape[0]
    is_replaced_B = sampling.uniform(labels_B, seed, step, STREAM) < rate
    samples_B = within(positives.first_B, mine)
    samples_B = torch.where(samples_B >= 0, samples_B + count, -1)
    prototypes_B = columns.target_columns_B
    included_n = torch.ones(count + 1, dtype=torch.bool, device=labels_B.device)  # the last one takes what is not here
    if columns.included_n is not None:
        included_n[:-1] = columns.included_n
    included_n[torch.where(is_replaced_B & (prototypes_B >= 0), prototypes_B, count)] = False
    classes_n = columns.classes_n
    if classes_n is None:
        classes_n = torch.arange(columns.first_class, columns.first_class + count, device=labels_B.device)
    bias_n = columns.bias_n
    return Columns(
        Joined(columns.source, Matrix(features_BD[mine])),
        samples_B.where(is_replaced_B & ~positives.is_first_B, prototypes_B),
        columns.first_class,
        torch.cat([classes_n, labels_B[mine]]),
        columns.rows_n,
        torch.cat([included_n[:-1], (is_replaced_B & positives.is_first_B)[mine]]),
        None if bias_n is None else torch.cat([bias_n, bias_n.new_zeros(mine.stop - mine.start)]),
        samples_B.where(is_replaced_B, prototypes_B),
        mine,
        columns.column_S,
    )


def substitute_from_bank(columns: Columns, bank: Bank, staleness: int, rate: float, seed: int, step: int) -> Columns:
    """The columns with the prototype of each class whose feature in the bank is at most `staleness` steps old replaced by that feature,
    with probability `rate`, decided by numbers keyed (seed, step, class). Nothing flows to the bank, nor in this step to a replaced
    prototype; momentum and weight decay move it all the same. Communicates nothing.

    No anchor meets itself, as the bank is written after the step; but a class of one image meets that image's feature of before.
    """
    ids_S = torch.arange(columns.first_class, columns.first_class + len(bank.steps_S), device=bank.steps_S.device)
    is_replaced_S = bank.fresh(step, staleness) & (sampling.uniform(ids_S, seed, step, STREAM) < rate)
    return mixed(columns, bank, is_replaced_S.to(bank.features_SD.dtype))


class Joined:
    """The rows of one source, and behind them those of another."""

    def __init__(self, first: Source, second: Source) -> None:
        self.first, self.second, self.memory, self.is_consumed = first, second, first.memory, first.is_consumed
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

    def room(self) -> Tensor | None:
        first, second = self.first.tensors[0], self.second.tensors[0]
        if self.is_consumed or first.dtype != second.dtype:
            return None
        return self.memory.empty(self.shape, first.dtype, first.device)

    def collect(self, room: Tensor | None = None) -> Collector:
        return _JoinedCollector(self, room)


class _JoinedCollector:
    def __init__(self, joined: Joined, room: Tensor | None) -> None:
        self.joined = joined
        self.first = joined.first.collect(None if room is None else room[: joined.split])
        self.second = joined.second.collect(None if room is None else room[joined.split :])

    def store(self, rows: slice, gradient_nD: Tensor) -> None:
        first, second = self.joined._parts(rows)
        split = 0 if first is None else first.stop - first.start
        if first is not None:
            self.first.store(first, gradient_nD[:split])
        if second is not None:
            self.second.store(second, gradient_nD[split:])

    def gradients(self) -> tuple[Tensor | None, ...]:
        return (*self.first.gradients(), *self.second.gradients())
