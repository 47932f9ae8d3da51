"""The hosts file of multinode.sh: one machine per line, as `[user@]host [slots=N] [address=A]`, with # comments."""

import getpass
import re
from dataclasses import dataclass
from pathlib import Path

from launch.addresses import is_address, is_this_machine, needs_a_zone, same_host

TARGET = re.compile(r"(?:(?P<user>[^\s@-][^\s@]*)@)?(?P<name>[^\s@\[\]-][^\s@\[\]]*|\[[0-9A-Fa-f:.]+(?:%[^\s@\[\]]+)?\])")
EXPECTED = "expected [user@]host, then slots=N and address=A if wanted"


@dataclass(frozen=True)
class Host:
    target: str  # what ssh is given: host or user@host
    name: str
    slots: int | None  # ranks on this host; None leaves it to --ranks-per-node
    local: bool  # this machine: no ssh needed
    address: str | None = None  # under which the other hosts reach it; None: under which ssh does


def read_hosts(path: str) -> list[Host]:
    """Hosts in the file's order, but this machine first when it is listed: the first is the head of the cluster."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(f"Hosts file {path} cannot be read ({reason}); give a text file with one host per line.") from None
    hosts = [parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.partition("#")[0].strip()]
    if not hosts:
        raise ValueError(f"Hosts file {path} names no host; write one host per line, such as gpu-node-1 or user@gpu-node-1 slots=8.")
    for what in ("name", "address"):
        given = [same_host(value) for host in hosts if (value := getattr(host, what))]
        twice = sorted({value for value in given if given.count(value) > 1})
        if twice:
            raise ValueError(f"Hosts file {path} lists {twice[0]} more than once; list it once, with slots=N for N ranks.")
    if len({host.slots is None for host in hosts}) > 1:
        raise ValueError(f"Hosts file {path} gives slots=N for some hosts only; give it for every host or for none.")
    return sorted(hosts, key=lambda host: not host.local)


def own_name() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have none
        return None


def parse(line: str, where: str) -> Host:
    words = line.partition("#")[0].split()
    match = TARGET.fullmatch(words[0])
    if match is None:
        raise ValueError(f"{where}: {line.strip()!r} is not a host; {EXPECTED}.")
    name = match["name"].strip("[]")  # which ssh does not know
    options: dict[str, str] = {}
    for word in words[1:]:
        option, equals, value = word.partition("=")
        if option not in ("slots", "address") or not equals or option in options or (option == "slots" and not value.isdigit()):
            raise ValueError(f"{where}: {line.strip()!r} is not a host; {EXPECTED}.")
        options[option] = value.strip("[]")
    slots = int(options["slots"]) if "slots" in options else None
    if slots == 0:
        raise ValueError(f"{where}: slots=0 leaves {name} without a rank; give at least 1 or remove the line.")
    address = options.get("address")
    if address is not None and not is_address(address):
        raise ValueError(f"{where}: address={address} is no IP address; give that under which the other hosts reach {name}.")
    if needs_a_zone(address or name):
        raise ValueError(f"{where}: {address or name} holds on one network card only; give {name} an address=A that all hosts reach.")
    local = (match["user"] is None or match["user"] == own_name()) and is_this_machine(name)
    return Host(f"{match['user']}@{name}" if match["user"] else name, name, slots, local, address)
