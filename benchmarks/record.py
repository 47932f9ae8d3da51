"""One CSV row per measurement, with what is needed to judge it: commit, date, hardware, command."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
import sys

import torch

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str:
    """The commit measured; "+" when the working tree differs from it."""
    git = ["git", "-C", os.path.dirname(FOLDER)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed.strip() else "")


def append(name: str, row: dict[str, object]) -> None:
    """Adds a row to results/NAME.csv and prints it."""
    full = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        **row,
    }
    path = os.path.join(FOLDER, f"{name}.csv")
    os.makedirs(FOLDER, exist_ok=True)
    is_new = not os.path.exists(path)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(full))
        if is_new:
            writer.writeheader()
        writer.writerow(full)
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
