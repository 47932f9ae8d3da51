"""What is left, and what goes on, when the launcher, its machine or the head is lost: on separate hosts. The trainer is stub/pipeline.
Figures are printed with -s."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch.netns import Host

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
STUB = ROOT / "tests" / "launch" / "stub"
PATIENCE = 240.0  # seconds that a busy machine may need


class Run:
    """multinode.sh on a host of the test, with ranks on two others."""

    def __init__(self, desk: Host, ranks: list[Host], folder: Path) -> None:
        (folder / "hosts.txt").write_text("".join(f"{host.name} slots=1\n" for host in ranks))
        self.folder, self.log, self.ranks = folder, folder / f"log-{time.monotonic():.0f}.txt", ranks
        command = ["bash", str(ROOT / "launch" / "multinode.sh"), "stub", "--hosts", "hosts.txt", "--set", "steps=400", "pause=0.2"]
        command += ["--env", "PYTHONSAFEPATH=1"]  # hosts start Ray in the checkout, whose trainer would come before the stub
        env = {**os.environ, "PYTHONPATH": f"{STUB}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as file:
            self.process = desk.popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until_step(self, more: int) -> None:
        before = steps(self.folder)
        wait(lambda: steps(self.folder) > before + more or self.process.poll() is not None, lambda: self.said)
        assert self.process.poll() is None, self.said


def steps(folder: Path) -> int:
    log = folder / "run" / "steps.txt"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait(found: Callable[[], Any], why: Callable[[], Any] = str, seconds: float = PATIENCE) -> float:
    began = time.monotonic()
    while not found():
        assert time.monotonic() - began < seconds, why()
        time.sleep(0.2)
    return time.monotonic() - began


def ended(hosts: list[Host], seconds: float, sshd: bool = True) -> float:
    """Seconds until nothing is left of the job on any of the hosts: no process, no file in /tmp. sshd: nor one of sshd, which holds a
    connection whose other end is silent until TCP gives up."""

    def left() -> list[str]:
        return [words for host in hosts for words in host.left() if sshd or not words.startswith("sshd:")]

    return wait(lambda: not left(), left, seconds)


def test_the_launcher_is_killed(hosts, tmp_path):
    run = Run(hosts[0].network.desk, hosts[:2], tmp_path)
    run.until_step(2)
    assert all(host.left() for host in hosts[:2])
    run.process.send_signal(signal.SIGKILL)
    seconds = ended([*hosts[:2], hosts[0].network.desk], 60)
    print(f"nothing is left {seconds:.0f} s after SIGKILL to the launcher")
    (logs,) = (tmp_path / "run" / "logs").iterdir()
    assert {"driver.log", "rank-0.log", "rank-1.log", "ray-node1", "ray-node2"} <= {path.name for path in logs.iterdir()}
    assert any("raylet" in path.name for path in (logs / "ray-node2").rglob("*"))


def test_the_machine_of_the_launcher_goes_down(hosts, tmp_path):
    """No connection is closed, so the nodes wait for signs of life."""
    run = Run(hosts[0].network.desk, hosts[:2], tmp_path)
    run.until_step(2)
    hosts[0].network.desk.kill()
    seconds = ended(hosts[:2], 90, sshd=False)
    print(f"nothing is left {seconds:.0f} s after the launcher's machine went down")


def test_the_head_is_cut_off(hosts, tmp_path):
    """It is named, nothing is left on any host once it is back, and the same command goes on."""
    run = Run(hosts[0].network.desk, hosts[:2], tmp_path)
    run.until_step(12)
    hosts[0].cut()
    began = time.monotonic()
    assert run.process.wait(PATIENCE) == 1, run.said
    seconds, said = time.monotonic() - began, run.said
    print(f"the command ended {seconds:.0f} s after the head was cut off: {said.splitlines()[-1]}")
    assert "node1" in said.splitlines()[-1] and "Traceback" not in said, said
    ended([hosts[1], hosts[0].network.desk], 30)
    left = ended(hosts[:1], 90, sshd=False)
    print(f"nothing was left on the head after {time.monotonic() - began:.0f} s ({left:.0f} s after the command had ended)")
    hosts[0].restore()
    before = steps(tmp_path)
    again = Run(hosts[0].network.desk, hosts[:2], tmp_path)
    again.until_step(2)
    first = int((tmp_path / "run" / "steps.txt").read_text().splitlines()[before].split()[0])
    assert first >= 10 and first % 5 == 0, first  # a checkpoint every fifth step
    again.process.send_signal(signal.SIGTERM)
    assert again.process.wait(PATIENCE) == 75, again.said
    ended([*hosts[:2], hosts[0].network.desk], 30, sshd=False)
