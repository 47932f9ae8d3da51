"""A Ray cluster of this machine, `two_nodes`, and separate hosts for tests of the launcher (netns.py says what a host can do):

    def test_x(hosts):                              # node1, node2, node3, each with an sshd, and node1.network.desk
        job = hosts[0].popen(["bash", ...], cwd=tmp_path)
        hosts[1].cut()
        assert hosts[2].left() == []

`hosts` heals after each test what the test has broken: such hosts are switched off and on. `network` is for fixtures that keep something
running on `network.hosts` over several tests. Both last for the tests of this folder. Without root, iproute2 or openssh-server the tests
skip."""

from collections.abc import Iterator

import pytest

from tests.launch.netns import Host, Network, why_not
from tests.launch.ray_nodes import Nodes


@pytest.fixture(scope="package")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two Ray nodes with room for one rank each. They are up until the last test of this folder, beside the clusters that others start."""
    nodes = Nodes(tmp_path_factory.mktemp("two_nodes"))
    yield nodes
    nodes.close()


@pytest.fixture(scope="package")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    network = Network(tmp_path_factory.mktemp("network"))
    try:
        network.open()
        yield network
    finally:
        network.close()


@pytest.fixture
def hosts(network: Network) -> Iterator[list[Host]]:
    try:
        yield network.hosts
    finally:
        network.heal()
