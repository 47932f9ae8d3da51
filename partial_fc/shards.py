"""Which classes a rank owns, and the initial values of their prototypes; both depend only on the global class id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

INIT_BLOCK = 1024  # classes per generator: large enough to be fast, small enough that a shard draws little that it does not own


@dataclass(frozen=True)
class ClassShard:
    """The classes [first, first + rows) of `num_classes`, owned by one rank. The split is that of torch.chunk (ceil division; the last
    ranks may be short or empty, so there may be more ranks than classes). torch.distributed.checkpoint requires it of a row-sharded matrix:
    with any other split it silently loses rows at load."""

    num_classes: int
    first: int
    rows: int

    @classmethod
    def of_rank(cls, num_classes: int, rank: int, world_size: int) -> ClassShard:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}, but a classifier needs at least 1 class")
        per_rank = -(-num_classes // world_size)
        first = min(rank * per_rank, num_classes)
        return cls(num_classes, first, min(per_rank, num_classes - first))

    def rows_of(self, labels_n: Tensor) -> Tensor:
        """int64 [n]: the row of each class in this shard, -1 for classes of other ranks."""
        rows_n = labels_n - self.first
        return rows_n.where((rows_n >= 0) & (rows_n < self.rows), -1)

    def mask_of(self, labels_n: Tensor) -> Tensor:
        """bool [rows]: the rows of this shard whose class is among the labels; classes of other ranks and -1 are ignored."""
        is_among = torch.zeros(self.rows + 1, dtype=torch.bool, device=labels_n.device)  # the last one takes what is not here:
        # Selecting the others would make the host wait for the device, and so does assigning True through an index, on a GPU.
        return is_among.scatter_(0, self.rows_of(labels_n) % (self.rows + 1), True)[:-1]


def initial_prototypes(shard: ClassShard, width: int, seed: int, std: float = 0.01) -> Tensor:
    """Normal prototypes [rows, width] (float32, CPU) of one shard, equal for a class however the classes are sharded. std 0.01 is usual in
    the field (arcface_torch). Classes are drawn in blocks of 1024, each from its own generator keyed (seed, block)."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch.set_default_... says
    prototypes_SD = torch.empty(shard.rows, width, **options)
    for block in range(shard.first // INIT_BLOCK, -(-(shard.first + shard.rows) // INIT_BLOCK)):
        key = int(np.random.SeedSequence((seed, block)).generate_state(1, np.uint64)[0] >> np.uint64(1))
        drawn = torch.empty(INIT_BLOCK, width, **options).normal_(0.0, std, generator=torch.Generator("cpu").manual_seed(key))
        first = max(block * INIT_BLOCK, shard.first)
        stop = min((block + 1) * INIT_BLOCK, shard.first + shard.rows)
        prototypes_SD[first - shard.first : stop - shard.first] = drawn[first - block * INIT_BLOCK : stop - block * INIT_BLOCK]
    return prototypes_SD
