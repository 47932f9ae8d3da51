"""Fixtures shared by all tests: `ranks(n)` gives a running process group of n gloo ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.ranks import Ranks

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    pools: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in pools or not pools[size].alive:
            pools[size] = Ranks(size)
        return pools[size]

    yield get
    for pool in pools.values():
        if pool.alive:
            pool.close()
