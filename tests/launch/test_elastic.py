"""A job that goes on with fewer ranks when a host is lost, and with more when it is back. On two Ray nodes of this machine with the stub;
on separate hosts (long) with the real trainer."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray", reason="the launcher needs Ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "multinode.sh"
STUB = os.pathsep.join([str(ROOT / "tests" / "launch" / "stub"), str(ROOT)])


class Nodes:
    """Ray nodes of this machine, with room for one rank each; the first is the head."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token, self.processes = folder, secrets.token_hex(16), []
        self.head = self.start(None)["head"]

    def start(self, head: str | None) -> dict[str, Any]:
        node = subprocess.Popen(
            [sys.executable, "-m", "launch.ray_node"],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": STUB, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(node)
        assert node.stdin is not None and node.stdout is not None
        node.stdout.readline()
        order = {"address": "127.0.0.1", "alone": False, "token": self.token, "head": head, "slots": 1}
        node.stdin.write(json.dumps(order) + "\n")
        node.stdin.flush()
        answer = json.loads(node.stdout.readline().removeprefix("ray-node "))
        assert answer["event"] == "ready", answer
        return answer

    def kill(self, number: int) -> None:
        """As when a host loses its power: everything of the node at once."""
        root = psutil.Process(self.processes[number].pid)
        for process in [*root.children(recursive=True), root]:
            with suppress(psutil.Error):
                process.kill()

    def close(self) -> None:
        for node in reversed(self.processes):
            assert node.stdin is not None
            node.stdin.close()
        for node in self.processes:
            node.wait(60)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path_factory.mktemp("nodes"))
    try:
        nodes.start(nodes.head)
        yield nodes
    finally:
        nodes.close()


def launch(folder: Path, *arguments: str, recipe: str = "stub", env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), recipe, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": STUB, "OMP_NUM_THREADS": "1", **env},
        stdout=open(folder / "log.txt", "w"),
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], seconds: float = 180) -> int:
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def steps(folder: Path) -> list[tuple[int, int]]:
    """(step, ranks that took it): the stub's sum over ranks says how many there were."""
    log = folder / "run" / "steps.txt"
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(int(line[0]), {1: 1, 3: 2, 6: 3}[round(float(line[1]) / max(1, int(line[0])))]) for line in lines if int(line[0])]


def wait_for(condition: Any, folder: Path, job: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.1)


def test_a_lost_node_is_done_without_and_used_again_when_it_is_back(nodes, tmp_path):
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": nodes.token}
    job = launch(tmp_path, "--address", nodes.head, "--ranks", "1:2", "--set", "steps=10000", "pause=0.05", env=token)
    try:
        wait_for(lambda: len(steps(tmp_path)) > 8, tmp_path, job)
        nodes.kill(1)
        wait_for(lambda: [ranks for _, ranks in steps(tmp_path)].count(1) > 8, tmp_path, job)
        nodes.start(nodes.head)
        wait_for(lambda: steps(tmp_path)[-1][1] == 2, tmp_path, job)
        time.sleep(1)
        (tmp_path / "run" / "stop").touch()
    finally:
        code = finish(job)
    log, taken = (tmp_path / "log.txt").read_text(), steps(tmp_path)
    assert code == 75, log
    turns = [number for number in range(1, len(taken)) if taken[number][1] != taken[number - 1][1]]
    assert [taken[0][1], *(taken[number][1] for number in turns)] == [2, 1, 2], log
    lost, back = turns
    assert taken[lost][0] == taken[lost - 1][0] // 5 * 5 + 5 * (taken[lost - 1][0] % 5 == 4), log  # from the newest checkpoint
    assert taken[back][0] == taken[back - 1][0] + 1, log  # after a save
    assert "1 ranks have a place, of at most 2" in log and "there is a place for more than 1 ranks: the ranks save" in log
    assert log.count("Failure") == 1 and not list((tmp_path / "run").glob("regroup"))
