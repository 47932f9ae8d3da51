"""Starts a Ray cluster on the machines of a hosts file (or on this one alone) and stops it again, whatever happens in between."""

import json
import os
import queue
import secrets
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from launch.addresses import is_loopback, needs_a_zone
from launch.console import say
from launch.hosts import Host
from launch.returns import Returns
from launch.tunnel import Tunnel
from pipeline.network_card import address_towards

HELLO_SECONDS = 60  # ssh, and Python from a shared file system
READY_SECONDS = 300  # Ray's own patience is 30 s a start, and a node tries three times
BEAT_SECONDS = 10.0  # between signs of life, of which a node may miss some (SILENT_SECONDS)
STOP_SECONDS = 30  # longer than the node's own STOP_SECONDS
SSH = ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3"]


@dataclass(frozen=True)
class Cluster:
    dashboard: str  # http://host:port of the job server
    head: str  # host:port of the control store
    token: str = field(repr=False)
    returns: Returns

    def check(self) -> None:
        """Sees to hosts that were lost. RuntimeError when the head is one of them."""
        self.returns.check()


class Node:
    """A launch/ray_node.py process on one host, or another module that speaks as it does, and the conversation with it."""

    def __init__(self, host: Host, root: str, python: str, module: str = "launch.ray_node"):
        self.host = host
        command = node_command(host, root, python, module)
        # By which the user came here, and not the launcher: on a host that ssh starts, the node takes its address from it.
        env = {name: value for name, value in os.environ.items() if name != "SSH_CONNECTION"}
        try:
            # In a session of its own: Ctrl-C at the terminal is for the launcher, which stops nodes in order.
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            reason = f"{command[0]}: {error.strerror}"
            raise ValueError(f"Host {host.name} cannot be used ({reason}); {self._advice(started=False)}.") from None
        self.lines: queue.Queue[str | None] = queue.Queue()
        self._writing = threading.Lock()
        self.is_up = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.strip())
        self.lines.put(None)

    def expect(self, event: str, deadline: float) -> dict[str, Any]:
        """The node's next message, which must be `event`. ValueError: the host does not even say hello in time; RuntimeError: it did, but
        then not this."""
        fault = ValueError if event == "hello" else RuntimeError
        tail: deque[str] = deque(maxlen=3)
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise fault(f"Host {self.host.name} did not say {event} in time; {self._advice()}.") from None
            if line is None:
                reason = " ".join(tail) or "it closed the connection"
                raise fault(f"Host {self.host.name} cannot be used ({reason}); {self._advice()}.")
            if not line.startswith("ray-node "):
                tail.append(line)
                continue
            message = json.loads(line.removeprefix("ray-node "))
            if message["event"] == "failed":
                raise RuntimeError(f"Ray did not start on host {self.host.name}: {message['reason'] or 'no reason given'}.")
            if message["event"] == "again":
                say(f"Ray did not start on host {self.host.name} ({message['reason']}): trying again")
                continue
            assert message["event"] == event, message
            return message

    def _advice(self, started: bool = True) -> str:
        if self.host.local:
            return "check that the dependencies are installed" if started else "run launch/quickstart.sh in that checkout (--remote-dir)"
        if not started:
            return "install ssh on this machine (package openssh-client)"
        return f"check that `ssh -o BatchMode=yes {self.host.target}` works and that the same checkout and .venv are there (--remote-dir)"

    def send(self, order: dict[str, Any] | None) -> None:
        """None: a sign of life"""
        assert self.process.stdin is not None
        with self._writing, suppress(BrokenPipeError, ValueError):  # ValueError: it is closed. expect() tells why a node ended
            self.process.stdin.write((json.dumps(order) if order else "") + "\n")
            self.process.stdin.flush()

    def has_left(self) -> bool:
        return self.process.poll() is not None

    def close(self) -> None:
        assert self.process.stdin is not None
        with self._writing, suppress(BrokenPipeError):
            self.process.stdin.close()

    def wait(self, deadline: float) -> None:
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def node_command(host: Host, root: str, python: str, module: str = "launch.ray_node") -> list[str]:
    command = [python, "-m", module]
    return command if host.local else [*SSH, "--", host.target, f"cd {shlex.quote(root)} && exec {shlex.join(command)}"]


def beat(nodes: list[Node], over: threading.Event) -> None:
    """A thread: tells the nodes that this machine still lives. Where it goes down, no connection is closed."""
    while not over.wait(BEAT_SECONDS):
        for node in list(nodes):
            node.send(None)


@contextmanager
def started(
    hosts: list[Host], root: str, python: str, ranks_per_node: int | None = None, dashboard: str | None = None, logs: str = ""
) -> Iterator[Cluster]:
    """A cluster of these hosts; the first is its head. ValueError names the host that cannot be reached or used, RuntimeError one where Ray
    does not start.

    dashboard: where the head's listens (None: on its loopback)
    logs: a folder of all hosts, in which Ray's own logs of each are kept at the end"""
    token = secrets.token_hex(16)
    nodes: list[Node] = []
    tunnel: Tunnel | None = None
    over, returns = threading.Event(), None
    threading.Thread(target=beat, args=(nodes, over), daemon=True).start()
    try:
        for host in hosts:
            nodes.append(Node(host, root, python))
        deadline = time.monotonic() + HELLO_SECONDS
        hellos = [node.expect("hello", deadline) for node in nodes]
        one_of_each(hosts, hellos)
        same_versions(hosts, hellos)
        alone = len(hosts) == 1 and hosts[0].local
        orders: list[dict[str, Any]] = [
            {"address": address, "alone": alone, "token": token, "head": None, "slots": host.slots or ranks_per_node}
            | {"dashboard": dashboard, "logs": os.path.join(logs, f"ray-{host.name}") if logs else None, "beats": True}
            for address, host in zip(reachable(hosts, [hello["address"] for hello in hellos]), hosts, strict=True)
        ]
        say(f"reached {', '.join(host.name for host in hosts)}; starting Ray")
        deadline = time.monotonic() + READY_SECONDS
        nodes[0].send(orders[0])
        ready = nodes[0].expect("ready", deadline)
        nodes[0].is_up = True
        say(f"Ray is up on {hosts[0].name}, the head; the token of its dashboard is in {ready['token_file']} there")
        for node, order in zip(nodes[1:], orders[1:], strict=True):
            node.send({**order, "head": ready["head"]})
        for node in nodes[1:]:
            node.expect("ready", deadline)
            say(f"Ray is up on {node.host.name}")
        url = ready["dashboard"]
        if dashboard is None and not hosts[0].local:
            tunnel = Tunnel(SSH, hosts[0].target, url)
            url = tunnel.here
        for order in orders[1:]:
            order["head"] = ready["head"]
        returns = Returns(nodes, [host.name for host in hosts], orders, lambda place: Node(hosts[place], root, python), say)
        yield Cluster(url, ready["head"], token, returns)
    finally:
        over.set()
        if returns is not None:
            returns.close()
        if any(node.is_up for node in nodes):
            say(f"stopping Ray on {len(nodes)} host{'s' * (len(nodes) > 1)}")
        if tunnel is not None:
            tunnel.close()
        for node in reversed(nodes):
            node.close()
        deadline = time.monotonic() + STOP_SECONDS
        for node in reversed(nodes):
            node.wait(deadline)


def one_of_each(hosts: list[Host], hellos: list[dict[str, str]]) -> None:
    """ValueError: two hosts are one machine."""
    machines: dict[str, str] = {}
    for host, hello in zip(hosts, hellos, strict=True):
        twin = machines.setdefault(hello["machine"], host.name)
        if twin != host.name:
            raise ValueError(f"Hosts {twin} and {host.name} are the same machine; list it once, with slots=N for N ranks.")


def same_versions(hosts: list[Host], hellos: list[dict[str, str]]) -> None:
    """ValueError: a host has no Ray, or one that does not talk with that of the first."""
    first, name = hellos[0], hosts[0].name
    for host, hello in zip(hosts, hellos, strict=True):
        if not hello["ray"]:
            raise ValueError(f"Host {host.name} has no Ray in {hello['prefix']}; run launch/quickstart.sh there.")
        for what, key in (("Ray", "ray"), ("Python", "python")):
            if hello[key] != first[key]:
                sentence = f"Host {host.name} has {what} {hello[key]}, but {name} has {first[key]}"
                raise ValueError(f"{sentence}; install the same versions, as launch/quickstart.sh does in the same checkout.")


def reachable(hosts: list[Host], addresses: list[str]) -> list[str]:
    """Under which each host is known to the others: as its line says, or as ssh reached it. ValueError: that means nothing to others."""
    addresses = [host.address or address for host, address in zip(hosts, addresses, strict=True)]
    if len(hosts) == 1:
        return addresses
    others = [address for address in addresses if not is_loopback(address)]
    found = []
    for host, address in zip(hosts, addresses, strict=True):
        if is_loopback(address) and others:  # this machine
            try:
                address = address_towards(others[0])
            except OSError as error:
                raise ValueError(f"No way leads from {host.name} to {others[0]} ({error.strerror}); give hosts an address=A.") from None
        if is_loopback(address) or needs_a_zone(address):
            raise ValueError(f"Host {host.name} is reached as {address}, which means another host elsewhere; give its line an address=A.")
        found.append(address)
    return found
