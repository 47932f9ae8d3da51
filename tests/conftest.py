"""Fixtures shared by all tests: `ranks(n)` gives a running process group of n gloo ranks."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

from tests.ranks import Pools

torch.set_num_threads(1)  # two of pytest's processes share two cores
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


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    """The process group that a training in this process makes ends with the module, for DeepSpeed too, which keeps groups of its own."""
    yield
    if not dist.is_initialized():
        return
    if (comm := sys.modules.get("deepspeed.comm.comm")) and comm.cdb is not None:
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Iterator[Pools]:
    pools = Pools(pytestconfig.getoption("--long"))
    yield pools
    pools.close()
