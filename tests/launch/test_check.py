"""`--check` on three hosts of which some differ, and what a run itself refuses before it starts; no Ray is started."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from launch import check_hosts, multinode
from launch.checking import Row, alone
from tests.launch.netns import ROOT, Host

SCRIPT = ROOT / "launch" / "multinode.sh"
STUB = ROOT / "tests" / "launch" / "stub"
GPUS = "echo 'NVIDIA H100, 570.1, {free}, 81559'; echo 'NVIDIA H100, 570.1, 81000, 81559'"


def launch(
    host: Host, folder: Path, *arguments: str, recipe: str = "faces_small", hosts: str = "node1\nnode2\nnode3\n"
) -> subprocess.CompletedProcess[str]:
    (folder / "hosts.txt").write_text(hosts)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(STUB) if recipe == "stub" else ""}
    return host.run(["bash", SCRIPT, recipe, "--hosts", "hosts.txt", *arguments], cwd=folder, env=env, timeout=200)


def of_another_version(package: str, version: str, folder: Path) -> tuple[Path, Path]:
    """The folder that says which version of a package is installed, and one that says another."""
    metadata = Path(str(importlib.metadata.distribution(package)._path))  # type: ignore[attr-defined]
    copy = shutil.copytree(metadata, folder / metadata.name)
    text = (copy / "METADATA").read_text()
    (copy / "METADATA").write_text(re.sub(r"^Version: .*$", f"Version: {version}", text, count=1, flags=re.M))
    return metadata, copy


@pytest.mark.slow
def test_hosts_that_differ_are_named(hosts, network, tmp_path):
    """Another version of a package, no disk, a wrong clock, a run folder of its own, other data, a GPU in use: each by its host."""
    first, second, third = hosts
    data, run = tmp_path / "faces.rec", tmp_path / "run"
    data.write_bytes(b"x" * 1000)
    run.mkdir()
    second.cover(*of_another_version("numpy", "1.0.1", tmp_path))
    second.cover(run, size="3g")
    third.clock(3600)
    third.cover("/dev/shm", size="1m")
    (tmp_path / "other.rec").write_bytes(b"x" * 999)
    third.cover(data, tmp_path / "other.rec")
    for host, free in ((first, 81000), (second, 500), (third, 81000)):
        programs = tmp_path / host.name
        programs.mkdir()
        (programs / "nvidia-smi").write_text(f"#!/bin/sh\n{GPUS.format(free=free)}\n")
        (programs / "nvidia-smi").chmod(0o755)
        host.cover("/usr/local/bin", programs)
    settings = ["data.train=faces.rec", "run.folder=run", "engine.device=cpu", "evaluation.data="]
    done = launch(network.desk, tmp_path, "--check", "--ranks-per-node", "2", "--set", *settings)
    print(done.stdout)
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    faults = {tuple(line.split(":")[0].split(", ")): line for line in lines if re.match(r"node\d, ", line)}
    assert set(faults) == {
        *(("node2", column) for column in ("numpy", "run folder", "GPU free")),
        *(("node3", column) for column in ("clock", "/dev/shm", "data")),
    }
    assert "1.0.1, but node1 has" in faults["node2", "numpy"] and "launch/quickstart.sh" in faults["node2", "numpy"]
    assert "+3600 s off the others'" in faults["node3", "clock"] and "/dev/shm has 1 MB free" in faults["node3", "/dev/shm"]
    assert "faces.rec has 999 bytes, but 1000 on most hosts" in faults["node3", "data"]
    assert "another program is on 1 of its GPUs (500 MB free)" in faults["node2", "GPU free"]
    assert "give a run.folder that all hosts share" in faults["node2", "run folder"]
    rows = lines[1:4]
    assert [row.split()[0] for row in rows] == ["node1", "node2", "node3"] and "Gbit/s" in rows[0] and "570.1" in rows[0]
    assert "!1.0.1" in rows[1] and "!+3600 s" in rows[2] and "!1.0.1" not in rows[0]
    assert not list(run.iterdir()) and [host.left() for host in network.everyone] == [[], [], [], []]


def test_a_run_refuses_hosts_that_do_not_fit(hosts, network, tmp_path):
    desk, second = network.desk, hosts[1]
    done = launch(desk, tmp_path, "--remote-dir", "/nowhere", recipe="stub")
    assert done.returncode == 2 and done.stdout.count("\n") == 1
    assert re.match(
        r"multinode.sh: Host node1 cannot be used \(.*/nowhere.*\); check that `ssh .* node1` works and that the same checkout", done.stdout
    )
    second.cover(*of_another_version("ray", "2.9.0", tmp_path))
    done = launch(desk, tmp_path, recipe="stub")
    assert (
        done.returncode == 2
        and done.stdout.startswith("multinode.sh: Host node2 has Ray 2.9.0, but node1 has ")
        and done.stdout.count("\n") == 1
    )
    done = launch(desk, tmp_path, recipe="stub", hosts="node1\n10.77.0.1\n")
    sentence = "multinode.sh: Hosts node1 and 10.77.0.1 are the same machine; list it once, with slots=N for N ranks.\n"
    assert (done.returncode, done.stdout) == (2, sentence)
    assert [host.left() for host in network.everyone] == [[], [], [], []]


def test_a_dry_run_prints_commands_and_starts_nothing(tmp_path):
    (tmp_path / "hosts.txt").write_text("gpu-1.invalid slots=2\nann@gpu-2.invalid slots=1 address=10.0.0.2\n")
    arguments = ["stub", "--hosts", "hosts.txt", "--dry-run", "--set", "run.note=my faces", "--env", "SECRET_OF_OTHERS=hush"]
    env = {**os.environ, "PYTHONPATH": str(STUB)}
    done = subprocess.run(["bash", SCRIPT, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 7 and lines[0].startswith("ssh -T -o BatchMode=yes") and "-- ann@gpu-2.invalid" in lines[2]
    assert "on gpu-1.invalid:" in lines[1] and "--head" in lines[1] and "--dashboard-host=127.0.0.1" in lines[1]
    assert "--node-ip-address=10.0.0.2" in lines[3] and "--address=ADDRESS_OF_HEAD:PORT" in lines[3]
    assert lines[4].endswith("-L 127.0.0.1:PORT:127.0.0.1:DASHBOARD_PORT -- gpu-1.invalid")
    assert lines[5].startswith("job: ") and "'--set=run.note=my faces'" in lines[5] and "RAY_AUTH_TOKEN" not in done.stdout
    assert lines[6].startswith("    with ") and "SECRET_OF_OTHERS" in lines[6] and "hush" not in done.stdout


def test_a_recipe_for_gpus_needs_them():
    fact = {"missing": "", "refused": "", "free": {}, "gpus": [], "data": {}, "device": "cuda"}
    row = Row("node1")
    alone(row, fact, None)
    assert row.faults == {"GPUs": "engine.device is cuda, but nvidia-smi shows no GPU; look at its driver, or set engine.device=cpu."}
    alone(row := Row("node1"), fact | {"device": "auto"}, None)
    assert not row.faults


def test_hosts_are_looked_at_with_the_variables_of_this_shell(monkeypatch, capsys):
    """As ranks have them, such as a card in GLOO_SOCKET_IFNAME."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    sent = []

    class Host:
        def __init__(self, host, *_):
            self.host = host

        def expect(self, event, deadline):
            return {"machine": "a", "address": "127.0.0.1", "answer": {}} if event == "hello" else {"answer": {}}

        def send(self, order):
            sent.append(order)

        def close(self): ...

        def wait(self, deadline): ...

    monkeypatch.setattr(check_hosts, "Node", Host)
    monkeypatch.setattr(check_hosts.Check, "look", lambda self, recipe, overrides: self.ask("facts"))
    assert multinode.main(["faces_small", "--check"]) == 0
    assert sent[0]["what"] == "facts" and sent[0]["variables"]["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.long
def test_three_hosts_are_looked_at_in_under_30_seconds(hosts, network, tmp_path):
    (tmp_path / "faces.rec").write_bytes(b"x" * 1000)
    began = time.monotonic()
    done = launch(network.desk, tmp_path, "--check", "--set", "data.train=faces.rec", "run.folder=runs/new/here", "evaluation.data=")
    seconds = time.monotonic() - began
    print(f"{done.stdout}{seconds:.1f} s")
    assert done.returncode == 0 and seconds < 30, done.stdout
    assert not (tmp_path / "runs").exists() and [host.left() for host in network.everyone] == [[], [], [], []]
