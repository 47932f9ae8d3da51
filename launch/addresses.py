"""Addresses of hosts, IPv4 and IPv6: which are this machine's, which mean one host only, which ports are free."""

import ipaddress
import socket


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
        return True
    except ValueError:
        return False


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def same_host(name: str) -> str:
    """A name or address in the one form of all its spellings: fd77::0:2 is fd77::2, and names know no capitals."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower().rstrip(".")


def is_this_machine(name: str) -> bool:
    if name.lower() in ("localhost", socket.gethostname().lower()):
        return True
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):  # no such name, or none that could be one
        return False
    return any(can_be_bound(family, address) for family, _, _, _, address in found)


def can_be_bound(family: int, address: tuple[object, ...]) -> bool:
    """Only an address of this machine can."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
        return True
    except OSError:
        return False


def needs_a_zone(address: str) -> bool:
    """Whether it is a link-local IPv6 address, fe80::1%eth0, which means another host on each network card."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_link_local and ":" in address
    except ValueError:
        return "%" in address


def with_port(address: str, port: int | str) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def free_ports(address: str, count: int) -> list[int]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    probes = [socket.create_server((address, 0), family=family) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
