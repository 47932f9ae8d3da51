"""Runs the steps one after another, each in a process group of its own, so that a crash or a hang costs no more than its step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from benchmarks.first_gpu.page import Page
from benchmarks.first_gpu.rows import NO_TIME, Row, failed, unmeasured
from benchmarks.first_gpu.table import Step

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def run(page: Page, steps: Sequence[Step], minutes: float, small: bool) -> list[str]:
    """Runs what there is time for; the page is written anew after each step. Names of the steps in which something failed."""
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="protoshard-first-gpu-") as work:
        for step in steps:
            start = time.monotonic()
            limit = 60 * step.minutes[small]
            if obstacle := step.obstacle():
                rows = [unmeasured(step.title, obstacle)]
            elif limit > end - start:
                rows = [Row(step.title, None, note=f"{NO_TIME} (it may take {step.minutes[small]:g} min)")]
            else:
                rows = _run(step, limit, os.path.join(page.folder, "logs", f"{step.name}.txt"), work, small)
            page.add(step, rows, time.monotonic() - start)
    return page.failed


def _run(step: Step, limit: float, log: str, work: str, small: bool) -> list[Row]:
    """The step's rows, and one more that says why it ended early, if it did."""
    os.makedirs(os.path.dirname(log), exist_ok=True)
    path = os.path.join(work, f"{step.name}.jsonl")
    with open(log, "w") as output:
        process = subprocess.Popen(
            _command(step, path, work, small), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also when this process is interrupted; what the step started belongs to its group
            _end_group(process)
    rows = []
    if os.path.exists(path):
        with open(path) as file:
            rows = [Row(*json.loads(line)) for line in file if line.endswith("\n")]
    if code is None:
        rows.append(failed(step.title, f"still running after {step.minutes[small]:g} min, and ended"))
    elif code:
        with open(log, errors="replace") as file:
            text = file.read()
        rows.append(failed(step.title, text if code > 0 else f"{text}\nended by {signal.Signals(-code).name}"))
    elif not rows:
        rows.append(failed(step.title, "it found nothing"))
    return rows


def _command(step: Step, path: str, work: str, small: bool) -> list[str]:
    return [sys.executable, "-m", "benchmarks.first_gpu.child", step.name, path, work, str(int(small))]


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends whatever still runs in the group that `process` leads."""
    for signal_number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and _group_exists(process):
            time.sleep(0.05)
    process.wait()


def _group_exists(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # a leader that has ended stays until someone asks
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
