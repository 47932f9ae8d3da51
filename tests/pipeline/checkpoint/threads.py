"""Ranks that are threads of this process, for tests that break off or watch what all of them do to a store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class ThreadAgreement:
    """An Agreement of one such rank."""

    def __init__(self, rank: int, ranks: int, barrier: threading.Barrier, values: list[Any]) -> None:
        self.rank, self.ranks, self.is_alone = rank, ranks, ranks == 1
        self.barrier, self.values = barrier, values

    def gather(self, value):
        self.barrier.wait(30)
        self.values[self.rank] = value
        self.barrier.wait(30)
        return list(self.values)

    def of_first(self, value):
        return self.gather(value)[0]

    def highest(self, *values):
        return [max(column) for column in zip(*self.gather(values), strict=True)]


def on_threads(ranks: int, function: Callable[[ThreadAgreement], Any]) -> list[Any]:
    """What function(agreement) returned on each rank. If one raises, the others are let go, and it is raised here."""
    barrier, values = threading.Barrier(ranks), [None] * ranks

    def run(rank):
        try:
            return function(ThreadAgreement(rank, ranks, barrier, values))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks)]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
