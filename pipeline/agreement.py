"""What ranks tell each other between steps: whether one was asked to stop, whether all have written their part of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Agreement:
    """Small messages between the hosts of all ranks, over gloo, so that no GPU is waited for. Every rank makes one and calls its methods
    in the same order, from its main thread. Without a process group it is that of a single rank.

    minutes: that a rank waits for the others before it fails"""

    def __init__(self, minutes: float = 60.0) -> None:
        self.is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.rank, self.ranks = (0, 1) if self.is_alone else (dist.get_rank(), dist.get_world_size())
        # On a CPU the group of the training serves: its collectives come in the same order on every rank anyway.
        needs_own = not self.is_alone and dist.get_backend() not in ("gloo", "mpi", "fake")
        self.group = dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes)) if needs_own else None

    def highest(self, *values: int) -> list[int]:
        """The maximum over all ranks of each of the values. 1 all-reduce of 8 bytes each."""
        if self.is_alone:
            return list(values)
        highest = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        return highest.tolist()

    def gather(self, value: T) -> list[T]:
        """What each rank gave, on every rank. Two all-gathers; meant for a few kilobytes."""
        if self.is_alone:
            return [value]
        values = [value] * self.ranks
        dist.all_gather_object(values, value, group=self.group)
        return values

    def of_first(self, value: T) -> T:
        """What rank 0 gave, on every rank: its view of a folder counts, since machines may see a network file system differently for a
        while."""
        if self.is_alone:
            return value
        values: Sequence[T] = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)  # type: ignore[arg-type]
        return values[0]
