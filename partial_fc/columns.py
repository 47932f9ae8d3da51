"""The columns of the similarity matrix on one rank: which prototypes or samples a row meets, which column is its target, and which are
excluded from its statistic. Built by `of_classes`, `of_sampled`, `of_samples` and `of_bank`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc import collectives
from partial_fc.bank import Bank
from partial_fc.buffer_pool import BufferPool
from partial_fc.collectives import Group
from partial_fc.positives import positives_of, share_of, within
from partial_fc.prototype_sources import AllRows, Consumer, FrozenRows, MixedRows, PrototypeSource, SampledRows
from partial_fc.sampling import ClassSample
from partial_fc.shards import ClassShard


class Mask(NamedTuple):
    """The columns excluded from a row's statistic, by default its target. A sample with several labels would have several here."""

    columns_B: Tensor | None = None  # int64: one column per row, -1 if another rank has it; None for the target
    labels: tuple[Tensor, Tensor] | None = None  # (of rows [B], of columns [n]): all columns with the row's label instead
    included_n: Tensor | None = None  # bool: False for a column excluded from every row's statistic


class Placement(NamedTuple):
    """The class of each column."""

    first_class: int = 0  # first class of this rank's shard
    classes_n: Tensor | None = None  # int64 class of each column; None if they are the classes from first_class on, in order
    rows_n: Tensor | None = None  # int64 row of the shard of each column; None if all rows are columns, in order
    column_S: Tensor | None = None  # int64 column of each row of the shard, -1 for none; None as above
    samples: slice | None = None  # samples of the batch that are columns too, behind the classes


class Columns(NamedTuple):
    """n columns of this rank."""

    source: PrototypeSource  # what the columns are made of
    targets_B: Tensor  # int64: the column of each row's target; -1 if another rank has it
    mask: Mask = Mask()
    bias_n: Tensor | None = None  # added to the logits of non-targets, never to a target's; with gradient
    bias_is_bounded: bool = False  # promises 1e-8 < sum of exp(bias) over all ranks' columns < 1e8: no maximum needed
    placement: Placement = Placement()
    normalize: bool = True  # whether columns are divided by their norms

    @property
    def size(self) -> int:
        return self.source.shape[0]

    def masked_columns(self) -> Tensor:
        """int64 [B]: the only column of each row that is not a non-target, if `mask.labels` is None."""
        return self.targets_B if self.mask.columns_B is None else self.mask.columns_B

    def classes(self) -> Tensor:
        """int64 [n]: the class of each column."""
        placement = self.placement
        if placement.classes_n is not None:
            return placement.classes_n
        return torch.arange(placement.first_class, placement.first_class + self.size, device=self.targets_B.device)

    def of_labels(self, labels_n: Tensor, shard: ClassShard) -> Tensor:
        """int64 [n]: the column of each class, in this batch or not; -1 if this rank has none."""
        rows_n = shard.rows_of(labels_n)
        return rows_n if self.placement.column_S is None else _places(self.placement.column_S, rows_n)

    def by_column(self, vector_S: Tensor, of_samples_B: Tensor | None = None) -> Tensor:
        """[n]: a vector by row of the shard, reordered by column. Columns that are samples take theirs from a vector by sample, or 0."""
        rows_n, samples = self.placement.rows_n, self.placement.samples
        vector_n = vector_S if rows_n is None else vector_S.index_select(0, rows_n)
        if samples is None:
            return vector_n
        zeros_n = vector_S.new_zeros(samples.stop - samples.start)
        return torch.cat([vector_n, zeros_n if of_samples_B is None else of_samples_B[samples]])

    def with_bias(self, bias_n: Tensor) -> Columns:
        return self._replace(bias_n=bias_n if self.bias_n is None else self.bias_n + bias_n, bias_is_bounded=False)

    def frozen(self) -> Columns:
        """The same columns, without gradient."""
        return self._replace(source=FrozenRows(self.source))

    def mixed(self, bank: Bank, share_S: Tensor) -> Columns:
        """The columns, with each prototype mixed with its class's row of the bank: see MixedRows. share_S, by row of the shard, lies in [0,
        1]. Columns that are samples stay as they are."""
        if not len(bank.steps_S):
            return self
        rows_n = self.placement.rows_n
        if self.placement.samples is not None:
            rows_n = self.by_column(torch.arange(len(share_S), device=share_S.device))
        return self._replace(source=MixedRows(self.source, bank.features_SD, rows_n, self.by_column(share_S)))


def _places(column_S: Tensor, rows_n: Tensor) -> Tensor:
    """column_S[rows_n], or -1 where a row is -1."""
    return column_S.index_select(0, rows_n.clamp(min=0)).where(rows_n >= 0, -1) if len(column_S) else rows_n


def of_classes(
    prototypes: Tensor | PrototypeSource,
    labels_B: Tensor,
    first_class: int = 0,
    *,
    bias_S: Tensor | None = None,
    included_S: Tensor | None = None,
    normalize: bool = True,
) -> Columns:
    """All classes of this rank.

    prototypes  of the classes [first_class, first_class + S): a matrix [S, D] of any norm, or a source; S = 0 is allowed
    labels_B    int64 global class ids
    bias_S      added to the logits of non-targets, with gradient
    included_S  bool: False leaves a class out of the non-targets of all rows
    normalize   False takes products with prototypes as they are in place of cosines"""
    source: PrototypeSource = AllRows(prototypes) if isinstance(prototypes, Tensor) else prototypes
    rows_B = labels_B - first_class
    return Columns(
        source,
        rows_B.where((rows_B >= 0) & (rows_B < source.shape[0]), -1),
        Mask(included_n=included_S),
        bias_S,
        placement=Placement(first_class),
        normalize=normalize,
    )


def of_sampled(
    shard: ClassShard,
    prototypes_SD: Tensor,
    labels_B: Tensor,
    sample: ClassSample,
    corrected_rate: float | None = None,
    consumer: Consumer | None = None,
    pool: BufferPool | None = None,
) -> Columns:
    """The classes of a step's sample. With corrected_rate, its rate, classes drawn by chance count 1 / rate times in a log-sum-exp."""
    correction_K = None
    if corrected_rate is not None:
        wide = torch.promote_types(prototypes_SD.dtype, torch.float32)
        correction_K = torch.where(sample.is_certain_K, 0.0, -math.log(corrected_rate)).to(wide)
    return Columns(
        SampledRows(prototypes_SD, sample.rows_K, sample.is_real_K, consumer, pool),
        _places(sample.column_S, shard.rows_of(labels_B)),
        Mask(included_n=sample.is_real_K),
        correction_K,
        bias_is_bounded=True,
        placement=Placement(shard.first, sample.rows_K + shard.first, sample.rows_K, sample.column_S),
    )


def of_samples(
    features_BD: Tensor,
    labels_B: Tensor,
    group: Group = None,
    *,
    one_per_identity: bool = True,
    label_bias_B: Tensor | None = None,
    normalize: bool = True,
) -> tuple[Columns, Tensor]:
    """(B / N samples of the gathered batch, with gradient; [B] whether a row has a target). The target is another sample of the identity
    (see `positives_of`). Non-targets are one sample of every other identity of the batch, or all of them. A sample never meets itself.

    label_bias_B  added to the logits of non-targets, by sample, complete on every rank"""
    positives, mine = positives_of(labels_B), share_of(len(labels_B), group)
    labels_n = labels_B[mine]
    mask = Mask(labels=(labels_B, labels_n))
    if one_per_identity:
        mask = Mask(within(positives.first_B, mine), included_n=positives.is_first_B[mine])
    columns = Columns(
        AllRows(features_BD[mine]),
        within(positives.other_B, mine, positives.has_other_B),
        mask,
        None if label_bias_B is None else collectives.sum_gradient(label_bias_B, group)[mine],
        placement=Placement(classes_n=labels_n),
        normalize=normalize,
    )
    return columns, positives.has_other_B


def of_bank(
    bank: Bank, shard: ClassShard, labels_B: Tensor, is_fresh_S: Tensor, *, leaves_out_batch: bool = False, pool: BufferPool | None = None
) -> Columns:
    """The fresh last features of this rank's classes, without gradient. leaves_out_batch: classes of the batch are only targets."""
    if leaves_out_batch:
        is_fresh_S = is_fresh_S & ~shard.mask_of(labels_B)
    return of_classes(AllRows(bank.features_SD, pool=pool), labels_B, shard.first, included_S=is_fresh_S)
