"""Ray nodes of this machine, as launch/ray_node.py starts them on hosts, and commands of multinode.sh that use them. The trainer is
stub/pipeline, unless the command's environment says otherwise."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "multinode.sh"
STUB = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "launch" / "stub"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
PATIENCE = 240.0  # seconds that a busy machine may need


class Nodes:
    """`count` nodes with room for `slots` ranks each; the first is the head. `env` is what a shell must export to use them."""

    def __init__(self, folder: Path, count: int = 2, slots: int = 1) -> None:
        self.folder, self.slots = folder, slots
        self.token, self.processes = secrets.token_hex(16), list[subprocess.Popen[str]]()
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        self.head: str | None = None
        try:
            ready = self.start()
            self.head, self.dashboard = ready["head"], ready["dashboard"]
            for _ in range(1, count):
                self.start()
        except BaseException:
            self.close()
            raise

    def start(self) -> dict[str, Any]:
        node = subprocess.Popen(
            [sys.executable, "-m", "launch.ray_node"],
            cwd=self.folder,
            env={**os.environ, **STUB},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(node)
        assert node.stdin is not None and node.stdout is not None
        order = {"address": "127.0.0.1", "alone": False, "token": self.token, "head": self.head, "slots": self.slots}
        node.stdin.write(json.dumps(order) + "\n")
        node.stdin.flush()
        said = []
        for line in node.stdout:
            said.append(json.loads(line.removeprefix("ray-node ")))
            if said[-1]["event"] == "ready":
                return said[-1]
        raise AssertionError(said)

    def kill(self, number: int) -> None:
        """As when a host loses its power: everything of the node at once."""
        node = self.processes.pop(number)
        root = psutil.Process(node.pid)
        for process in [*root.children(recursive=True), root]:
            with suppress(psutil.Error):
                process.kill()
        node.wait(60)

    def close(self) -> None:
        for node in reversed(self.processes):
            assert node.stdin is not None
            node.stdin.close()
        for node in self.processes:
            node.wait(60)


class Command:
    """multinode.sh in `folder`, with its output in a file."""

    def __init__(self, folder: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.log = folder / f"log-{secrets.token_hex(2)}.txt"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                ["bash", str(SCRIPT), *arguments],
                cwd=folder,
                env={**os.environ, **STUB, **(env or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                # A test run in the background of a shell inherits "ignore Ctrl-C", and would pass that on.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until(self, found: Callable[[], object]) -> None:
        """Waits for it, while the command runs."""
        deadline = time.monotonic() + PATIENCE
        while not found():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def wait(self) -> int:
        """Its exit code."""
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()  # it stops what it started
            try:
                self.process.wait(60)
            finally:
                self.process.kill()


def steps(folder: Path) -> list[list[str]]:
    """What the stub has written of each step: its number, the sum over ranks."""
    log = folder / "run" / "steps.txt"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def losses(run: Path) -> dict[int, float]:
    """Of a real run, by step."""
    path = run / "metrics.jsonl"
    complete = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    return {line["step"]: line["loss"] for line in map(json.loads, complete) if "loss" in line}
