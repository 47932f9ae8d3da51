"""Nodes whose Ray does not start: tried again with other ports and another folder, then a failure and no bad input. No Ray is started."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import cluster, ray_node
from launch.hosts import Host
from launch.tunnel import Tunnel

ORDER = {"address": "127.0.0.1", "alone": True, "token": "t", "head": None, "slots": None}


@pytest.fixture
def said(monkeypatch):
    """What the node says to the launcher, whose end of the conversation stays open."""
    events: list[tuple[str, dict[str, str]]] = []
    monkeypatch.setattr(ray_node, "say", lambda event, **fields: events.append((event, fields)))
    monkeypatch.setattr(ray_node, "PORTS_SECONDS", 0.5)
    return events


def ray_that(script: str):
    """In place of `ray start`: a program that knows its command line as `options`, its try as `tries`."""
    return [sys.executable, "-S", "-c", f"import socket, sys, time\n{script}"]


def up(ports: list[int], seconds: float) -> str:
    """Listens there for so long."""
    listening = f"kept = [socket.create_server(('127.0.0.1', port)) for port in {ports}]"
    return f"{listening}\nprint('Ray runtime started', flush=True)\ntime.sleep({seconds})"


def test_a_start_that_fails_is_tried_again_in_a_new_folder_on_new_ports(said, monkeypatch):
    folders, ports = [], []

    def command(order, folder):
        folders.append(folder)
        order["port"], order["dashboard_port"], order["agent_port"] = ray_node.free_ports("127.0.0.1", 3)
        ports.append(order["port"])
        if len(folders) == 1:
            return ray_that("sys.exit('The current node timed out during startup.')")
        if len(folders) == 2:  # another program has taken the agent's port
            return ray_that(up([order["dashboard_port"]], 60))
        return ray_that(up([order["dashboard_port"], order["agent_port"]], 1))

    monkeypatch.setattr(ray_node, "start_command", command)
    ray_node.run(dict(ORDER))
    assert [event for event, _ in said] == ["again", "again", "ready"]
    assert said[0][1]["reason"] == "The current node timed out during startup." and "ports" in said[1][1]["reason"]
    assert said[2][1]["head"] == f"127.0.0.1:{ports[2]}" and said[2][1]["dashboard"].startswith("http://127.0.0.1:")
    assert len(set(folders)) == 3 and not any(Path(folder).exists() for folder in folders)


def test_starts_run_out(said, monkeypatch):
    monkeypatch.setattr(ray_node, "start_command", lambda order, folder: ray_that("sys.exit('no room')"))
    ray_node.run(dict(ORDER))
    assert [(event, fields["reason"]) for event, fields in said] == [("again", "no room"), ("again", "no room"), ("failed", "no room")]


def test_a_port_that_is_held_is_not_chosen():
    with socket.create_server(("127.0.0.1", 0)) as held:
        assert held.getsockname()[1] not in ray_node.free_ports("127.0.0.1", 50)


def node_that(tmp_path, *events: dict[str, str]) -> str:
    """In place of Python on a host: a node that says this, and then waits for the end of its input."""
    hello = {"event": "hello", "address": "127.0.0.1", "machine": "m", "ray": "2.60.0", "python": "3.11.7", "prefix": "/x"}
    lines = "".join(f"echo 'ray-node {json.dumps(event)}'\n" for event in (hello, *events))
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{lines}cat > {tmp_path}/said\ntouch {tmp_path}/ended\n")
    program.chmod(0o755)
    return str(program)


def test_the_launcher_says_so_and_takes_it_for_a_failure(tmp_path, capsys):
    python = node_that(tmp_path, {"event": "again", "reason": "no room"}, {"event": "failed", "reason": "no room"})
    with (
        pytest.raises(RuntimeError, match=r"Ray did not start on host localhost: no room\."),
        cluster.started([Host("localhost", "localhost", None, True)], root="/", python=python, ranks_per_node=None),
    ):
        pass
    assert "  Ray did not start on host localhost (no room): trying again\n" in capsys.readouterr().err
    assert (tmp_path / "ended").exists()


def test_a_node_that_ends_while_it_starts_is_a_failure(tmp_path):
    python = node_that(tmp_path)
    Path(python).write_text(Path(python).read_text().replace(f"cat > {tmp_path}/said", "echo 'Killed'"))
    with (
        pytest.raises(RuntimeError, match=r"Host localhost cannot be used \(Killed\)"),
        cluster.started([Host("localhost", "localhost", None, True)], root="/", python=python, ranks_per_node=None),
    ):
        pass


def test_a_tunnel_is_dug_again(tmp_path):
    """ssh is a program here that notes its arguments and waits, the second time."""
    program = tmp_path / "ssh"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ $(wc -l < {tmp_path}/calls) = 1 ] && exit 255\nexec sleep 60\n')
    program.chmod(0o755)
    tunnel = Tunnel([str(program)], "ann@head", "http://127.0.0.1:8265")
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "calls").exists() or (tmp_path / "calls").read_text().count("\n") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        tunnel.close()
    calls = (tmp_path / "calls").read_text().splitlines()
    port = tunnel.here.rpartition(":")[2]
    assert len(calls) == 2 and f"-L 127.0.0.1:{port}:127.0.0.1:8265 -- ann@head" in calls[0]
    assert not [thread for thread in threading.enumerate() if "_keep" in thread.name]


def test_a_tunnel_ends_with_its_launcher(tmp_path):
    program = tmp_path / "ssh"
    program.write_text(f"#!/bin/sh\ntrap 'touch {tmp_path}/ended; exit' TERM\ntouch {tmp_path}/began\nwhile :; do sleep 0.1; done\n")
    program.chmod(0o755)
    script = f"from launch.tunnel import Tunnel\nimport time\nTunnel([{str(program)!r}], 'head', 'http://127.0.0.1:1')\ntime.sleep(60)"
    launcher = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 20
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    while not (tmp_path / "ended").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
