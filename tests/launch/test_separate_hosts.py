"""Runs over ssh, and on a cluster of `ray start`, on hosts of their own; the trainer is stub/pipeline."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch.netns import ROOT, Host, Network

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SCRIPT = ROOT / "launch" / "multinode.sh"
PYTHONPATH = os.pathsep.join([str(ROOT / "tests" / "launch" / "stub"), str(ROOT)])
SECONDS = 150


def launch(host: Host, folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", SCRIPT, "stub", *arguments]
    return host.popen(command, cwd=folder, env=env, stdout=open(folder / "log.txt", "w"), stderr=subprocess.STDOUT)


def finish(job: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    try:
        code = job.wait(SECONDS)
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait(60)
    return code, (folder / "log.txt").read_text()


def wait_for(condition, job: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.1)


def nothing_is_left(network: Network) -> bool:
    deadline = time.monotonic() + 20
    while any(host.left() for host in network.everyone) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [host.left() for host in network.everyone] == [[]] * len(network.everyone)


def test_over_ssh_to_ipv6_addresses_without_a_trace_of_the_token(hosts, network, tmp_path):
    """The launcher is no host of the cluster. Dashboards listen on loopback, the token is in no command line, and in no file but the
    user's own on the head."""
    (tmp_path / "hosts.txt").write_text("[fd77::1] slots=1\nroot@fd77::2 slots=1\n")
    job = launch(network.desk, tmp_path, "--hosts", "hosts.txt", "--set", "steps=10000", "pause=0.1")
    try:
        wait_for((tmp_path / "run" / "steps.txt").exists, job, tmp_path)
        found = {(host.name, pid): words for host in network.everyone for pid, words in host.processes().items()}
        tokens = {match[1] for _, pid in found for match in re.finditer(rb"RAY_AUTH_TOKEN=([^\0]*)", environment(pid))}
        (token,) = {one.decode() for one in tokens}
        telling = [words for words in found.values() if token in words]
        for host in network.everyone:
            files = host.run(["grep", "-rlF", token, "/tmp", "--exclude-dir=pytest-of-root"]).stdout.splitlines()
            telling += [file for file in files if not (file.endswith("/token") and host.sh(f"stat -c %a {file}") == "600\n")]
        dashboards = [words for words in found.values() if "dashboard/dashboard.py" in words]
        listening = hosts[0].sh("ss -Htlnp")
        ports = re.findall(r"--port=(\d+)", dashboards[0])
        places = re.findall(rf"(\S+):{ports[0]}\s", listening)
    finally:
        job.terminate()
        code, log = finish(job, tmp_path)
    assert code == 75, log
    assert len(token) == 32 and telling == [] and token not in log
    assert len(dashboards) == 1 and set(places) <= {"127.0.0.1"} and places, listening
    assert nothing_is_left(network), [host.left() for host in network.everyone]


STAND_IN = """import socket, sys, time
options = dict(word[2:].partition("=")[::2] for word in sys.argv if word.startswith("--"))
kept = [socket.create_server((options["node-ip-address"], int(options["dashboard-agent-listen-port"])),
                             family=socket.AF_INET6 if ":" in options["node-ip-address"] else socket.AF_INET)]
if "head" in options:
    kept.append(socket.create_server((options["dashboard-host"], int(options["dashboard-port"]))))
print("Ray runtime started", flush=True)
while True:
    kept[-1].accept()[0].sendall(b"dashboard of " + socket.gethostname().encode())
"""
LAUNCHER = """import socket, sys, time
from launch import cluster
from launch.hosts import read_hosts
with cluster.started(read_hosts("hosts.txt"), root=sys.argv[1], python=sys.argv[2], ranks_per_node=1) as running:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", int(running.dashboard.rpartition(":")[2]))) as connection:
                said = connection.recv(100).decode()
        except OSError:
            said = ""
        if said:
            break
        time.sleep(0.1)
    print(said, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("ending", ["in order", "killed"])
def test_nodes_and_tunnel_live_as_long_as_the_launcher(ending, hosts, network, tmp_path):
    """The launcher reaches the dashboard of a head elsewhere, and nothing stays when it ends. Ray is a stand-in that only listens."""
    (tmp_path / "ray" / "scripts").mkdir(parents=True)
    for name, text in (("__init__.py", ""), ("scripts/__init__.py", ""), ("scripts/scripts.py", STAND_IN)):
        (tmp_path / "ray" / name).write_text(text)
    for host in hosts[:2]:
        host.environment(PYTHONPATH=str(tmp_path))
    (tmp_path / "hosts.txt").write_text("node1\n[fd77::2]\n")
    command = [sys.executable, "-c", LAUNCHER, str(ROOT), sys.executable]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = network.desk.popen(command, cwd=tmp_path, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert launcher.stdout.readline() == "dashboard of node1\n"
        assert [len(host.left()) > 1 for host in network.everyone] == [True, True, False, True]
        if ending == "in order":
            launcher.stdin.write("\n")
            launcher.stdin.flush()
            assert launcher.wait(SECONDS) == 0
        else:
            launcher.kill()
    finally:
        launcher.kill()
        launcher.wait()
    assert nothing_is_left(network), [host.left() for host in network.everyone]


def environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


@contextmanager
def ray_start(hosts: list[Host], folder: Path) -> Iterator[dict[str, str]]:
    """A cluster of `ray start` on these hosts, with a processor each: what a shell must export to use it."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=100000000", "--num-cpus=1"]
    nodes: list[subprocess.Popen[str]] = []
    try:
        for host in hosts:
            (folder / host.name).mkdir()
            role = ["--head", f"--dashboard-host={host.address}"] if host is hosts[0] else [f"--address={hosts[0].address}:6379"]
            with open(folder / host.name / "log.txt", "w") as log:
                command = [*start, f"--node-ip-address={host.address}", *role]
                nodes.append(host.popen(command, env={**os.environ, **token}, stdout=log, stderr=subprocess.STDOUT))
            said = folder / host.name / "log.txt"
            wait_for(lambda said=said: "Ray runtime started" in said.read_text(), nodes[-1], said.parent)
        yield token
    finally:
        for node in nodes:
            node.kill()  # in order it would take half a minute
            node.wait()
        for host in hosts:
            host.changed = True  # so that what Ray has left there is gone, too


def test_a_cluster_of_ray_start_whose_names_map_to_127_0_1_1(hosts, network, tmp_path):
    """Ranks on two hosts find each other, whatever the hosts' names say."""
    with ray_start(hosts[:2], tmp_path) as token:
        arguments = ("--address", "10.77.0.1:6379", "--ranks-per-node", "1")
        code, log = finish(launch(network.desk, tmp_path, *arguments, **token), tmp_path)
    assert code == 0 and "stub on 2 ranks" in log and "finished, total 12" in log and "Traceback" not in log, log


@pytest.mark.long
def test_a_run_folder_that_hosts_do_not_share_is_told_before_training(hosts, network, tmp_path):
    (tmp_path / "run").mkdir()
    hosts[1].cover(tmp_path / "run")
    with ray_start(hosts[:2], tmp_path) as token:
        arguments = ("--address", "10.77.0.1:6379", "--ranks-per-node", "1")
        code, log = finish(launch(network.desk, tmp_path, *arguments, **token), tmp_path)
    assert code == 2 and "multinode.sh: Host node" in log and "give a run.folder that all hosts share." in log, log
    assert "Traceback" not in log and not list((tmp_path / "run").glob(".seen*")), log
