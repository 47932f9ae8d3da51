"""Shows and keeps measurements. Each is one CSV row, with what is needed to judge it: commit, date, hardware, command."""

from __future__ import annotations

import csv
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from dali_loaders.outputs import check_file
from pipeline.measuring import hardware

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")


def commit() -> str:
    """The commit measured; "+" when the working tree differs from it. Where git cannot tell, as in a copy without its history, what
    PROTOSHARD_COMMIT says."""
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
        return os.environ.get("PROTOSHARD_COMMIT", "unknown")
    return head + ("+" if changed.strip() else "")


def _program() -> str:
    folder, name = os.path.split(sys.argv[0])
    return f"python -m benchmarks.{name.removesuffix('.py')}" if os.path.basename(folder) == "benchmarks" else "protoshard"


def origin() -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "command": " ".join([_program(), *sys.argv[1:]]),
    }


def append(path: str, row: dict[str, Any]) -> None:
    """Adds `origin` and `row` to the CSV file. ValueError where it has other columns, or cannot be written."""
    full = {**origin(), **{key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()}}
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, "a+", newline="") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
            if header is not None and header != list(full):
                raise ValueError(f"{path} has other columns than this benchmark: rename it, or name another file with --csv")
            writer = csv.DictWriter(file, list(full))
            if header is None:
                writer.writeheader()
            writer.writerow(full)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): name another file with --csv") from None


def report(rows: Iterable[dict[str, Any]], as_text: Callable[[dict[str, Any]], str], as_json: bool, path: str) -> None:
    """Prints rows as they come, or all of them as one JSON object, and appends them to the CSV file."""
    check_file(path, "--csv", makes_folder=True)
    kept = []
    for row in rows:
        kept.append(row)
        if not as_json:
            print(as_text(row), flush=True)
            append(path, row)
    if as_json:
        print(json.dumps({**origin(), "rows": kept}, indent=1))
        for row in kept:
            append(path, row)


def quartiles(name: str, values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Median, and lower and upper quartile."""
    if not len(values):
        return {name: None, f"{name}_quartiles": None}
    low, middle, high = (float(f"{value:.4g}") for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {name: middle, f"{name}_quartiles": [low, high]}


def spread(row: dict[str, Any], name: str, unit: str = "") -> str:
    """What `quartiles` put into a row, for people."""
    low, high = row[f"{name}_quartiles"]
    return f"{row[name]:.3g} {unit}".rstrip() + f" ({low:.3g} to {high:.3g})"
