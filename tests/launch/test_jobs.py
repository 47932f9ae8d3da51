"""Jobs on a Ray node of this machine that others keep: by name, attached to, stopped, followed through a lost contact and a killed worker.
The trainer is stub/pipeline."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.log_file import Shown
from tests.launch.ray_nodes import PATIENCE, ROOT, Command, Nodes, losses, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """With room for two ranks."""
    node = Nodes(tmp_path_factory.mktemp("node"), count=1, slots=2)
    yield node
    node.close()


def command(node: Nodes, folder: Path, *arguments: str, address: str = "", **variables: str) -> Command:
    return Command(folder, *arguments, "--address", address or node.dashboard, env=node.env | variables)


class Proxy:
    """Passes connections on to the dashboard, until the network is cut."""

    def __init__(self, to: str) -> None:
        self._to = (to.rpartition("/")[2].partition(":")[0], int(to.rpartition(":")[2]))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self.is_cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._server.accept()
            except OSError:
                return
            if self.is_cut:
                here.close()
                continue
            there = socket.create_connection(self._to)
            self._open += [here, there]
            for one, other in ((here, there), (there, here)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(1 << 16):
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            end.close()

    def cut(self) -> None:
        self.is_cut = True
        for end in self._open:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        self.cut()
        self._server.close()


def test_a_killed_worker_and_a_lost_contact(node, two_nodes, tmp_path):
    """One job: a worker is killed, then the launcher's connection is cut for a while. The failure is said in one line, the log is whole,
    and says nothing of two_nodes, another Ray of this machine."""
    proxy = Proxy(node.dashboard)
    job = command(node, tmp_path, "stub", "--set", "steps=90", "pause=0.2", address=proxy.address)
    try:
        job.until(lambda: len(steps(tmp_path)) > 6)
        os.kill(json.loads((tmp_path / "run" / "worker1.json").read_text())["pid"], signal.SIGKILL)
        job.until(lambda: "Failure 1" in job.said)
        before = len(steps(tmp_path))
        job.until(lambda: len(steps(tmp_path)) > before + 2)
        proxy.cut()
        job.until(lambda: "no contact with the job server" in job.said)
        proxy.is_cut = False
    finally:
        code = job.wait()
        proxy.close()
    said = job.said
    assert code == 0 and "contact with the job server is back" in said and "HTTPConnectionPool" not in said, said
    (line,) = [line for line in said.splitlines() if "Failure" in line]
    assert re.search(r"Failure 1, 3 allowed before the next checkpoint \(rank 1.* died without a word \(killed\? out of memory\?\)", line)
    assert len(line) < 400
    (logs,) = (tmp_path / "run" / "logs").iterdir()
    assert {path.name for path in logs.iterdir()} == {"driver.log", "rank-0.log", "rank-1.log", "failures.txt"}
    kept, of = (logs / "driver.log").read_text().splitlines(), Shown(b"", everything=True).of
    shown = [line for line in said.splitlines() if "job server" not in line and "submitted" not in line]
    assert shown == [line for line in kept if of(line.encode())]  # once each, in order
    assert f"logs of all ranks: {logs}" in said and "workers placed: ranks 0 to 1 on" in said and "process group made, with gloo" in said
    assert "c10d" not in said and "Gloo" not in said
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  |\s|$", line) for line in said.splitlines())
    assert "SYSTEM_ERROR" in (logs / "failures.txt").read_text() and "step 89" in (logs / "rank-0.log").read_text()


@pytest.mark.long  # test_following.py has its parts
def test_a_job_by_name(node, tmp_path):
    words = ("stub", "--name", "faces", "--set", "steps=100000", "pause=0.1")
    first = command(node, tmp_path, *words, "--detach")
    assert first.wait() == 0 and "job faces runs; launch/multinode.sh --attach faces" in first.said, first.said
    second = command(node, tmp_path, *words, "--detach")
    assert second.wait() == 0 and "job faces was running already" in second.said, second.said
    other = command(node, tmp_path, "stub", "--name", "faces", "--set", "steps=3")
    assert other.wait() == 2 and "Job faces runs with another recipe or other options" in other.said, other.said
    attached = command(node, tmp_path, "--attach", "faces")
    left = command(node, tmp_path, *words)
    try:
        attached.until(lambda: "step 2 total" in attached.said and "following it" in left.said and "Ctrl-C" in left.said)
        left.process.send_signal(signal.SIGINT)
        assert left.wait() == 130 and "job faces goes on" in left.said, left.said
        status = [sys.executable, "-m", "pipeline.cli", "status", "faces", "--address", node.dashboard]
        asked = subprocess.run(
            status, cwd=tmp_path, env={**os.environ, **node.env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=PATIENCE
        )
        assert asked.returncode == 0 and "job faces: RUNNING" in asked.stderr and "job         faces, logs in" in asked.stdout, asked
        stop = command(node, tmp_path, "--stop", "faces")
        assert stop.wait() == 0 and "asking job faces to save and stop, and waiting up to 60 min" in stop.said, stop.said
        assert "has ended, as FAILED, with exit code 75" in stop.said
        code = attached.wait()
    finally:
        attached.process.kill()
    assert code == 75 and "stopped at step" in attached.said, attached.said
    assert not (tmp_path / "run" / "stop").exists()


@pytest.mark.long
def test_a_job_that_is_stopped_before_its_run_has_begun(node, tmp_path):
    job = command(node, tmp_path, "stub", "--set", "steps=100000", "pause=0.1")
    job.until(lambda: "submitted" in job.said)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 75 and "asking the run to save and stop, and waiting up to 60 min (run.timeout) for it" in job.said, job.said
    assert len(steps(tmp_path)) < 100000


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_driver_and_the_job_submitted_again(node, tmp_path):
    """The real trainer: it goes on from the newest checkpoint, with the losses of a run that was not disturbed."""
    env = {**os.environ, **node.env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    protoshard = [sys.executable, "-m", "pipeline.cli"]
    drawing = [*protoshard, "data", "faces", "faces.tar", "--identities", "24", "--images", "12", "--size", "32"]
    subprocess.run(drawing, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=PATIENCE)
    settings = [
        "data.train=faces.tar",
        "data.image_size=32",
        "run.batch=32",
        "run.epochs=33",
        "run.log_every=1",
        "backbone.name=small_nobn",
    ]
    settings += ["checkpoint.every_steps=10", "backbone.width=32", "engine.precision=float32", "evaluation.data="]
    quiet = [*protoshard, "train", "faces_small", "--ranks", "2", "--set", *settings, "run.folder=quiet"]
    subprocess.run(quiet, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=2 * PATIENCE)
    words = ("faces_small", "--set", *settings, "run.folder=killed")
    first = command(node, tmp_path, *words, PYTHONPATH=str(ROOT))
    first.until(lambda: len(losses(tmp_path / "killed")) > 25)
    own = {"launch.ray_driver", f"--folder={tmp_path}"}
    (driver,) = (one for one in psutil.process_iter(["cmdline"]) if own <= set(one.info["cmdline"]))  # a shell has them in one word
    began = time.monotonic()
    driver.kill()
    assert first.wait() == 1 and "was ended by SIGKILL (out of memory?)" in first.said, first.said
    lines = len(losses(tmp_path / "killed"))
    second = command(node, tmp_path, *words, PYTHONPATH=str(ROOT))
    second.until(lambda: "resumed from" in second.said and len(losses(tmp_path / "killed")) > lines)
    print(f"on {time.monotonic() - began:.0f} s after SIGKILL to the driver, of which the first command took {lines} steps")
    assert second.wait() == 0, second.said
    killed, undisturbed = losses(tmp_path / "killed"), losses(tmp_path / "quiet")
    assert len(undisturbed) == 297
    print(f"largest relative deviation of losses: {max(abs(killed.get(step, 0) / loss - 1) for step, loss in undisturbed.items()):.1e}")
    assert killed == pytest.approx(undisturbed, rel=1e-4)
