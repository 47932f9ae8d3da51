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
        """The maximum over all ranks of each of the values. Over gloo log2(N) messages of 8 bytes a value, rounded up, one by one: an
        all-reduce of gloo, a ring, would wait for 2 (N - 1) of them, with 20 ms between hosts 2.5 s on 64 ranks."""
        if self.is_alone:
            return list(values)
        highest = torch.tensor(values, dtype=torch.int64)
        if dist.get_backend(self.group) != "gloo":
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
            return highest.tolist()
        ways = partners(self.rank, self.ranks)
        # gloo sends when it knows that the receiver is ready, so all receivers say so at once.
        arriving = [torch.empty_like(highest) for _ in ways]
        receiving = [dist.irecv(there, group_src=source, group=self.group) for there, (_, source) in zip(arriving, ways, strict=True)]
        sending = []
        for (target, _), there, received in zip(ways, arriving, receiving, strict=True):
            sending.append((dist.isend(sent := highest.clone(), group_dst=target, group=self.group), sent))
            assert received is not None
            received.wait()
            highest = torch.maximum(highest, there)
        for sent_one, _ in sending:
            assert sent_one is not None
            sent_one.wait()
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


def partners(rank: int, ranks: int) -> list[tuple[int, int]]:
    """(to whom it sends what it knows, from whom it hears) in each round of an exchange in which after log2(N) rounds, rounded up, every
    rank has heard of all. A rank may hear of another one twice, which changes no maximum."""
    return [((rank + (1 << n)) % ranks, (rank - (1 << n)) % ranks) for n in range((ranks - 1).bit_length())]
