"""The network card over which ranks of several hosts meet. gloo takes the address of the host's name, which Debian maps to 127.0.1.1, and
NCCL any card, one of virtual machines too; so both are told, unless the user has."""

import ipaddress
import os
import socket

OUTSIDE = "192.0.2.1"  # an address for documentation: the way there is the way to everything that is not near


def use_card_towards(first: str) -> None:
    """The card that leads to the host where ranks meet; on that host itself the one that leads elsewhere."""
    try:
        address = address_towards(first)
        use_card_of(address_towards(OUTSIDE) if ipaddress.ip_address(address).is_loopback else address)
    except OSError:  # no such name, or no way: whoever connects says so
        pass


def use_card_of(address: str) -> None:
    """Sets the variables of gloo and NCCL that are not set, for those who make a group later in this process."""
    card = card_of(address)
    if card is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", card)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={card}")  # without "=" eth1 would stand for eth10 too
        if ":" in address:
            os.environ.setdefault("NCCL_SOCKET_FAMILY", "AF_INET6")


def address_towards(other: str) -> str:
    """The address of this machine that `other`, an address or a name, sees (a connected datagram socket sends nothing). OSError: no way
    leads there."""
    family, _, _, _, address = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0]).partition("%")[0]


def card_of(address: str) -> str | None:
    """The network card that has this address."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return name
    return None
