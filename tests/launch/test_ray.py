"""Jobs on two Ray nodes of this machine, and a cluster that the launcher starts itself; the trainer is stub/pipeline.
Only processes started here are ever signalled, other Ray clusters of the machine stay as they are."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "multinode.sh"
PYTHONPATH = os.pathsep.join([str(ROOT / "tests" / "launch" / "stub"), str(ROOT)])


class TwoNodes(NamedTuple):
    dashboard: str
    head: str
    env: dict[str, str]  # what a shell must export to use it


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    """Two Ray nodes with room for one rank each."""
    token = secrets.token_hex(16)
    nodes: list[subprocess.Popen[str]] = []
    folder = tmp_path_factory.mktemp("nodes")

    def start(head: str | None) -> dict[str, Any]:
        node = subprocess.Popen(
            [sys.executable, "-m", "launch.ray_node"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        nodes.append(node)
        assert node.stdin is not None and node.stdout is not None
        assert message(node.stdout.readline())["event"] == "hello"
        node.stdin.write(json.dumps({"address": "127.0.0.1", "token": token, "head": head, "slots": 1}) + "\n")
        node.stdin.flush()
        return message(node.stdout.readline())

    try:
        ready = start(None)
        start(ready["head"])
        yield TwoNodes(ready["dashboard"], ready["head"], {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
    finally:
        for node in nodes:
            assert node.stdin is not None
            node.stdin.close()
        for node in nodes:
            node.wait(30)


def message(line: str) -> dict[str, Any]:
    answer = json.loads(line.removeprefix("ray-node "))
    assert answer["event"] != "failed", answer
    return answer


def launch(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), "stub", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=open(folder / "log.txt", "w"),
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 120) -> int:
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher stops what it started
            process.wait(60)


def wait_for_step(number: int, folder: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while len(steps(folder)) <= number:
        assert job.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.2)


def steps(folder: Path) -> list[list[str]]:
    log = folder / "run" / "steps.txt"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def worker(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / "run" / f"worker{rank}.json").read_text())


def test_a_killed_worker_goes_on_from_the_last_checkpoint(two_nodes, tmp_path):
    note = "my faces [1, 2] 'a' \"b\" $HOME"
    job = launch(
        tmp_path, "--address", two_nodes.head, "--resume", "none", "--set", "steps=16", "pause=0.2", f"run.note={note}", env=two_nodes.env
    )
    try:
        wait_for_step(7, tmp_path, job)
        first = worker(tmp_path, 1)
        assert (first["RANK"], first["WORLD_SIZE"], first["MASTER_PORT"].isdigit()) == ("1", "2", True)
        os.kill(first["pid"], signal.SIGKILL)
    finally:
        code = finish(job)
    log = (tmp_path / "log.txt").read_text()
    assert code == 0, log
    assert "Failure 1, 3 allowed" in log and "restarting from the newest checkpoint" in log and "finished, total 45" in log
    numbers = [int(number) for number, *_ in steps(tmp_path)]
    again = next(index for index in range(1, len(numbers)) if numbers[index] <= numbers[index - 1] or index == numbers[index - 1] + 2)
    assert numbers[again] in (5, 10) and numbers[again:] == list(range(numbers[again], 16)), numbers
    assert worker(tmp_path, 1)["note"] == note and worker(tmp_path, 1)["pid"] != first["pid"]
    assert worker(tmp_path, 0)["resume"] == "auto"  # --resume none counts for the first attempt only
    assert not list(tmp_path.glob("*.ray"))


def test_bad_input_of_one_rank_is_not_tried_again(two_nodes, tmp_path):
    code = finish(launch(tmp_path, "--address", two_nodes.dashboard, "--set", "fail=bad input", env=two_nodes.env))
    log = (tmp_path / "log.txt").read_text()
    assert code == 2, log
    assert "multinode.sh: File faces.tar has no image; give a folder of images." in log
    assert "Traceback" not in log and "Failure" not in log


def test_a_wrong_token_is_bad_input(two_nodes, tmp_path):
    code = finish(launch(tmp_path, "--address", two_nodes.dashboard, env={**two_nodes.env, "RAY_AUTH_TOKEN": "0" * 32}))
    log = (tmp_path / "log.txt").read_text()
    assert code == 2 and log.startswith("multinode.sh: The Ray cluster at http://") and log.count("\n") == 1, log


def test_failures_run_out(two_nodes, tmp_path):
    code = finish(launch(tmp_path, "--address", two_nodes.dashboard, "--max-failures", "0", "--set", "fail=bug", env=two_nodes.env))
    log = (tmp_path / "log.txt").read_text()
    assert code == 1 and "Failure 1, 0 allowed" in log and "RuntimeError: a bug" in log, log


def test_interrupting_leaves_the_users_cluster_without_the_job(two_nodes, tmp_path):
    job = launch(tmp_path, "--address", two_nodes.dashboard, "--set", "steps=10000", "pause=0.1", env=two_nodes.env)
    try:
        wait_for_step(2, tmp_path, job)
        job.send_signal(signal.SIGINT)
    finally:
        code = finish(job)
    assert code == 130, (tmp_path / "log.txt").read_text()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(worker(tmp_path, 0)["pid"]):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_cluster_of_its_own_is_stopped_on_sigterm(tmp_path):
    job = launch(tmp_path, "--ranks-per-node", "2", "--set", "steps=10000", "pause=0.1")
    try:
        wait_for_step(2, tmp_path, job)
        started = psutil.Process(job.pid).children(recursive=True)
        job.terminate()
    finally:
        code = finish(job)
    assert code == 143, (tmp_path / "log.txt").read_text()
    assert len(started) > 5
    _, alive = psutil.wait_procs(started, timeout=5)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
