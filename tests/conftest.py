"""Fixtures shared by all tests: `ranks(n)` gives a running process group of n gloo ranks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.ranks import Ranks

torch.set_num_threads(2)
# On a busy machine any example may take long, and that is no fault.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the long forms of tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What tests print of file names that are no UTF-8 would stop pytest-xdist, which sends it as UTF-8."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


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
