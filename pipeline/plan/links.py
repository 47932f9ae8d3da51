"""What a collective costs over two levels of links: between the ranks of a node, and between nodes. Seconds, from bytes and messages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

# One message between ranks of a node, seconds. Assumed: a launch of NCCL; a local socket of gloo with a thread to be woken.
NEAR_GPU, NEAR_CPU = 2e-6, 5e-5
FIRST_WINDOW = 10 * 1448  # bytes: of a TCP connection that begins, or goes on after a pause (RFC 6928)


class Cost(NamedTuple):
    """Of one or several collectives that follow each other."""

    seconds: float
    sent: float  # bytes that leave each node; inside one node, that leave each rank

    def __add__(self, other: object) -> Cost:
        assert isinstance(other, Cost)
        return Cost(self.seconds + other.seconds, self.sent + other.sent)

    def times(self, count: float) -> Cost:
        return Cost(self.seconds * count, self.sent * count)


NOTHING = Cost(0.0, 0.0)


@dataclass(frozen=True)
class Links:
    """A ring of all ranks, node by node, enters and leaves each node once: its link carries what each rank sends."""

    nodes: int
    ranks_per_node: int
    inside: float  # bytes per second that a rank sends to another one of its node
    between: float  # bytes per second that a node sends
    latency: float  # seconds of a message from node to node
    nccl: bool  # else gloo

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def rate(self) -> float:
        """Of the slowest link of the ring."""
        inside = self.inside if self.ranks_per_node > 1 else float("inf")
        between = self.between if self.nodes > 1 else float("inf")
        return min(inside, between)

    def all_gather(self, size: float) -> Cost:
        """size: bytes of the gathered whole. A ring in both libraries: each part passes N - 1 links."""
        return self._ring(size, passes=1)

    def reduce_scatter(self, size: float) -> Cost:
        """size: bytes of the whole that is summed. gloo has none: torch takes an all-reduce there."""
        return self._ring(size, passes=1) if self.nccl else self.all_reduce(size)

    def all_reduce(self, size: float) -> Cost:
        """A ring, twice around; NCCL has trees, whose messages wait for fewer others."""
        ring = self._ring(size, passes=2)
        if not self.nccl or self.ranks == 1:
            return ring
        waiting = 2 * (_rounds(self.nodes) * self.latency + _rounds(self.ranks_per_node) * NEAR_GPU)
        return Cost(min(ring.seconds, ring.sent / self.rate + waiting), ring.sent)

    def exchange(self) -> Cost:
        """log2(N) rounds of some bytes, which go over gloo everywhere (Agreement.highest); the first also hears that the receiver is
        ready."""
        if self.ranks == 1:
            return NOTHING
        far, near = _rounds(self.nodes), _rounds(self.ranks) - _rounds(self.nodes)
        return Cost((far + (far > 0)) * self.latency + near * NEAR_CPU, 8.0 * _rounds(self.ranks))

    def slow_start(self, size: float) -> float:
        """Seconds that a connection of gloo between nodes loses in a message of that many bytes after a pause: TCP then begins with few
        packets, and sends twice as many with each round trip."""
        if self.nccl or self.nodes == 1:
            return 0.0
        trip = 2 * self.latency
        rounds = max(0, math.ceil(math.log2(max(1.0, min(size, self.rate * trip)) / FIRST_WINDOW)))
        return max(0.0, rounds * trip - FIRST_WINDOW * ((1 << rounds) - 1) / self.rate)

    def _ring(self, size: float, passes: int) -> Cost:
        if self.ranks == 1:
            return NOTHING
        near = NEAR_GPU if self.nccl else NEAR_CPU
        steps = passes * (self.ranks - 1)
        # Of N links of the ring, `nodes` lead to another node, if there is one.
        far = steps * self.nodes / self.ranks if self.nodes > 1 else 0.0
        # gloo sends when it has heard that the receiver is ready, which it says when it comes to the collective.
        ready = 0.0 if self.nccl else (self.latency if self.nodes > 1 else near)
        sent = passes * (self.ranks - 1) / self.ranks * size
        return Cost(sent / self.rate + ready + far * self.latency + (steps - far) * near, sent)


def _rounds(count: int) -> int:
    return (count - 1).bit_length()
