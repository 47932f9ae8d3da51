"""`--check` of the hosts of a file, over ssh, and `--dry-run`: the commands that a run would give."""

import shlex
import time
from typing import Any

from launch import tunnel
from launch.checking import Check
from launch.cluster import HELLO_SECONDS, SSH, STOP_SECONDS, Node, node_command, one_of_each, reachable
from launch.hosts import Host
from launch.ray_node import start_command


class OverSsh:
    """A host whose launch/look.py is asked."""

    def __init__(self, node: Node, folder: str, slots: int | None, variables: dict[str, str]) -> None:
        self.node, self.slots, self.order = node, slots, {"folder": folder, "variables": variables}
        self.name, self.address = node.host.name, ""

    def send(self, what: str, **arguments: Any) -> None:
        self.node.send({**self.order, "what": what, "with": arguments})

    def answer(self, deadline: float) -> Any:
        try:
            return self.node.expect("answer", deadline)["answer"]
        except RuntimeError as error:
            raise ValueError(str(error)) from None


def check(
    hosts: list[Host],
    *,
    root: str,
    python: str,
    folder: str,
    ranks_per_node: int | None,
    recipe: str,
    overrides: list[str],
    variables: dict[str, str],
) -> int:
    """2 if a cell of the table fails, else 0. ValueError: two hosts are one.

    variables: what ranks inherit from this shell"""
    nodes: list[Node] = []
    try:
        nodes = [Node(host, root, python, "launch.look") for host in hosts]
        deadline = time.monotonic() + HELLO_SECONDS
        places, hellos, unreachable = [], [], []
        for node in nodes:
            try:
                hellos.append(node.expect("hello", deadline))
                places.append(OverSsh(node, folder, node.host.slots or ranks_per_node, variables))
            except ValueError as error:
                unreachable.append((node.host.name, str(error)))
        answering = [place.node.host for place in places]
        one_of_each(answering, hellos)
        for place, address in zip(places, reachable(answering, [hello["address"] for hello in hellos]) if places else [], strict=True):
            place.address = address
        looking = Check(places, unreachable)
        if places:
            looking.look(recipe, overrides)
        return 2 if looking.report() else 0
    finally:
        for node in nodes:
            node.close()
        deadline = time.monotonic() + STOP_SECONDS
        for node in nodes:
            node.wait(deadline)


def commands(
    hosts: list[Host],
    *,
    root: str,
    python: str,
    ranks_per_node: int | None,
    dashboard: str | None,
    entrypoint: str,
    variables: dict[str, str],
) -> list[str]:
    """What a run would start, line by line. Addresses in capitals are known only when the hosts have answered. Of variables the
    names alone, since values may be secret."""
    lines = []
    for index, host in enumerate(hosts):
        order = {
            "address": host.address or ("127.0.0.1" if len(hosts) == 1 and host.local else f"ADDRESS_OF_{host.name}"),
            "slots": host.slots or ranks_per_node,
            "head": "ADDRESS_OF_HEAD:PORT" if index else None,
            "dashboard": dashboard,
            "ports": ["PORT", "DASHBOARD_PORT", "AGENT_PORT", "CLIENT_PORT"],
        }
        starting = [python, *start_command(order, "/tmp/protoshard-ray-RANDOM")[1:]]
        lines += [shlex.join(node_command(host, root, python)), f"    on {host.name}: {shlex.join(starting)}"]
    if dashboard is None and not hosts[0].local:
        lines.append(shlex.join(tunnel.command(SSH, hosts[0].target, "PORT", "DASHBOARD_PORT")))
    return [*lines, f"job: {entrypoint}", f"    with {' '.join(sorted(variables))}"]
