"""That a node ends with its launcher, and leaves nothing: without Ray, whose node is one more process to it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import node_processes, ray_node

ROOT = Path(__file__).resolve().parents[2]
LISTENING = """
import queue, threading, time
from launch import ray_node
ray_node.SILENT_SECONDS = 3.0
heard = queue.Queue()
threading.Thread(target=ray_node.listen, args=(heard,), daemon=True).start()
print(heard.get(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def listening():
    command = [sys.executable, "-c", LISTENING]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait(10)
    for stream in (process.stdin, process.stdout):
        stream.close()


def tell(process, line: str) -> None:
    process.stdin.write(line + "\n")
    process.stdin.flush()


def test_a_node_ends_without_signs_of_life(listening):
    tell(listening, '{"beats": true}')
    assert listening.stdout.readline() == '{"beats": true}\n'
    for _ in range(13):
        time.sleep(0.3)
        tell(listening, "")
        assert listening.poll() is None  # for longer than it would be without
    assert listening.wait(30) < 0


def test_a_node_ends_with_its_input(listening):
    tell(listening, '{"beats": false}')
    assert listening.stdout.readline() == '{"beats": false}\n'
    time.sleep(3.5)
    assert listening.poll() is None  # nobody promised anything
    listening.stdin.close()
    assert listening.wait(30) < 0


@pytest.fixture
def orphan(tmp_path):
    """A process in a session of its own, whose parent has gone, with the environment of a node in `tmp_path`."""
    command = "import os, sys; os.fork() and os._exit(0); os.setsid(); print(os.getpid(), flush=True); sys.stdout.close(); os.close(1)"
    env = {**os.environ, node_processes.NODE: str(tmp_path)}
    waiting = [sys.executable, "-c", f"{command}; import time; time.sleep(120)"]
    return int(subprocess.run(waiting, env=env, stdout=subprocess.PIPE, timeout=60).stdout)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_all_that_a_node_has_started_ends(tmp_path, orphan):
    assert node_processes.started(str(tmp_path)) == [orphan]
    node_processes.end_all(f"{tmp_path}-other")
    assert is_there(orphan)
    node_processes.end_all(str(tmp_path))
    assert not is_there(orphan) and node_processes.started(str(tmp_path)) == []


def test_what_killed_nodes_have_left_is_removed(tmp_path, orphan, monkeypatch):
    monkeypatch.setattr(
        node_processes.glob, "glob", lambda pattern: [str(tmp_path / name / node_processes.ALIVE) for name in ("lives", "left")]
    )
    for name in ("lives", "left"):
        (tmp_path / name).mkdir()
        (tmp_path / name / node_processes.ALIVE).touch()
    with (tmp_path / "lives" / node_processes.ALIVE).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        node_processes.remove_left()
    assert [path.name for path in tmp_path.iterdir()] == ["lives"]
    node_processes.end_all(str(tmp_path))


def test_a_token_is_for_its_user_alone(tmp_path):
    ray_node.write_token(str(tmp_path / "token"), "secret")
    assert (tmp_path / "token").read_text() == "secret\n" and (tmp_path / "token").stat().st_mode & 0o777 == 0o600
