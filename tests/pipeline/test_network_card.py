import os
import socket

import pytest

from pipeline import network_card
from pipeline.network_card import address_towards, card_of, use_card_of, use_card_towards

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY")


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what the test sets goes away
        monkeypatch.delenv(name)


def chosen() -> list[str | None]:
    return [os.environ.get(name) for name in VARIABLES]


def test_the_card_of_an_address(monkeypatch):
    use_card_of("192.0.2.77")  # of no machine
    assert chosen() == [None, None, None]
    use_card_of("127.0.0.1")
    assert chosen() == ["lo", "=lo", None]
    monkeypatch.setattr(network_card, "card_of", {"10.0.0.1": "eth0", "fd77::1": "eth6"}.get)
    use_card_of("10.0.0.1")
    assert chosen() == ["lo", "=lo", None]  # which might be the user's


def test_ipv6_is_told_to_nccl(monkeypatch):
    monkeypatch.setattr(network_card, "card_of", {"fd77::1": "eth6"}.get)
    use_card_of("fd77::1")
    assert chosen() == ["eth6", "=eth6", "AF_INET6"]


def test_the_first_host_whose_name_is_its_loopback(monkeypatch):
    monkeypatch.setattr(
        network_card, "address_towards", {"first": "127.0.0.1", network_card.OUTSIDE: "10.0.0.1", "far": "10.0.0.2"}.__getitem__
    )
    monkeypatch.setattr(network_card, "card_of", {"10.0.0.1": "eth1", "10.0.0.2": "eth2"}.get)
    use_card_towards("first")
    assert chosen() == ["eth1", "=eth1", None]


def test_a_name_that_means_nothing():
    use_card_towards("host.invalid")
    assert chosen() == [None, None, None]


def test_ways_from_this_machine():
    assert address_towards("127.0.0.1") == "127.0.0.1" and card_of("127.0.0.1") == "lo" and card_of("192.0.2.77") is None
    if socket.has_ipv6 and card_of("::1"):
        assert address_towards("::1") == "::1"
