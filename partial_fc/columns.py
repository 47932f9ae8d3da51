"""What a batch is compared with in a step: this rank's columns of the similarity matrix, all its classes or a sample of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.memory import Memory
from partial_fc.sampling import Sample
from partial_fc.shards import ClassShard
from partial_fc.sources import Consumer, Matrix, SampledRows, Source


class Columns(NamedTuple):
    source: Source
    target_columns_B: Tensor  # of each sample; -1 where another rank has it
    first_class: int
    classes_n: Tensor | None = None  # int64 class of each column; None where they are all classes of the shard, in order
    rows_n: Tensor | None = None  # row of the shard of each column, for what is kept by class; None as above
    included_n: Tensor | None = None  # bool: those that are non-targets of anybody
    bias_n: Tensor | None = None
    masked_columns_B: Tensor | None = None  # of each sample, what is none of its non-targets; the target where None
    samples: slice | None = None  # samples of the batch that are columns too, the last ones
    column_S: Tensor | None = None  # of each row of the shard, -1 for what is no column; None where all are, in order

    def of_labels(self, labels_n: Tensor, shard: ClassShard) -> Tensor:
        """int64 [n]: the column of each class, whether of this batch or not; -1 where this rank has none."""
        rows_n = shard.rows_of(labels_n)
        if self.column_S is None or not shard.rows:
            return rows_n
        return self.column_S.index_select(0, rows_n.clamp(min=0)).where(rows_n >= 0, -1)


def of_all(shard: ClassShard, prototypes_SD: Tensor, labels_B: Tensor, consumer: Consumer | None, memory: Memory) -> Columns:
    return Columns(Matrix(prototypes_SD, consumer, memory), shard.rows_of(labels_B), shard.first)


def of_sample(
    shard: ClassShard,
    prototypes_SD: Tensor,
    labels_B: Tensor,
    sample: Sample,
    corrected_rate: float | None,
    consumer: Consumer | None,
    memory: Memory,
) -> Columns:
    """corrected_rate: the rate of the sample, if classes that are in by chance shall be weighed by 1 / rate."""
    correction_K = None
    if corrected_rate is not None:
        correction_K = torch.where(sample.is_certain_K, 0.0, -math.log(corrected_rate)).to(
            torch.promote_types(prototypes_SD.dtype, torch.float32)
        )
    return Columns(
        SampledRows(prototypes_SD, sample.rows_K, sample.is_real_K, consumer, memory),
        sample.columns_of(labels_B - shard.first),
        shard.first,
        classes_n=sample.rows_K + shard.first,
        rows_n=sample.rows_K,
        included_n=sample.is_real_K,
        bias_n=correction_K,
        column_S=sample.column_S,
    )
