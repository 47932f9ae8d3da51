"""The hosts file of multinode.sh: one machine per line, as `[user@]host [slots=N]`, with # comments."""

import getpass
import re
import socket
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"(?P<target>(?:(?P<user>[^\s@]+)@)?(?P<name>[^\s@-][^\s@]*))(?:\s+slots=(?P<slots>\d+))?")


@dataclass(frozen=True)
class Host:
    target: str  # what ssh is given: host or user@host
    name: str
    slots: int | None  # ranks on this host; None leaves it to --ranks-per-node
    local: bool  # this machine: no ssh needed


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
    names = [host.name for host in hosts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Hosts file {path} lists {twice[0]} more than once; list it once, with slots=N for N ranks.")
    if len({host.slots is None for host in hosts}) > 1:
        raise ValueError(f"Hosts file {path} gives slots=N for some hosts only; give it for every host or for none.")
    return sorted(hosts, key=lambda host: not host.local)


def parse(line: str, where: str) -> Host:
    match = LINE.fullmatch(line.partition("#")[0].strip())
    if match is None:
        raise ValueError(f"{where}: {line.strip()!r} is not a host; expected [user@]host, then slots=N if wanted.")
    slots = int(match["slots"]) if match["slots"] else None
    if slots == 0:
        raise ValueError(f"{where}: slots=0 leaves {match['name']} without a rank; give at least 1 or remove the line.")
    local = match["user"] in (None, getpass.getuser()) and is_this_machine(match["name"])
    return Host(match["target"], match["name"], slots, local)


def is_this_machine(name: str) -> bool:
    if name in ("localhost", socket.gethostname()):
        return True
    try:  # only an address of this machine can be bound
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((socket.gethostbyname(name), 0))
        return True
    except OSError:
        return False
