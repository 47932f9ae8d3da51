"""The last words of a run: what it reached, how fast, and where to look."""

from __future__ import annotations

import json
import os
import shlex
from array import array
from contextlib import suppress
from statistics import median
from typing import Any

from pipeline import checkpoint
from pipeline.monitor.json_lines import evaluated

SHOWN = {"eer": "EER", "tar_at_far/1e-2": "TAR@FAR=1e-2", "rank1": "rank-1", "accuracy": "accuracy"}


def summary(folder: str, checkpoints: str = "") -> str:
    """A short text from FOLDER/metrics.jsonl and the checkpoints (beside it if not elsewhere), of which any may be missing: the disk may
    have been full."""
    speeds, rows = _read(os.path.join(folder, "metrics.jsonl"))
    lines = [""]
    for name in dict.fromkeys(name for row in rows for name in evaluated(row)):
        measured = [row for row in rows if f"{name}/eer" in row]
        # A run that goes on may name another set the same: it is compared with what has as many images only.
        measured = [row for row in measured if _size(row, name) == _size(measured[-1], name)]
        for key, title in SHOWN.items():
            values = [(row["step"], row[f"{name}/{key}"]) for row in measured if isinstance(row.get(f"{name}/{key}"), int | float)]
            if values:
                before = f"{values[0][1]:.4f} at step {values[0][0]} -> " if len(values) > 1 else ""
                lines.append(f"{name + ' ' + title:28}{before}{values[-1][1]:.4f} at step {values[-1][0]}")
    if speeds:
        lines.append(f"{'images/s':28}{median(speeds):.0f} (median)")
    store = checkpoint.store_of(checkpoints or os.path.join(folder, "checkpoints"))
    with suppress(OSError):  # a store that gives no answer
        lines += [f"{'checkpoint':28}{store.path}/{name}" for name in checkpoint.complete(store)[-1:]]
    figures = sorted(name for name in _names(folder) if name.startswith("roc-"))  # their names end with the step
    newest = max((_step(name) for name in figures), default="")
    lines += [f"{'ROC figure':28}{os.path.join(folder, name)}" for name in figures if _step(name) == newest]
    curves = os.path.join(folder, "tensorboard")
    if os.path.isdir(curves):
        lines.append(f"{'curves':28}tensorboard --logdir {shlex.quote(curves)}")
    return "\n".join(lines)


def _read(path: str) -> tuple[array[float], list[dict[str, Any]]]:
    """Speeds of all lines, and the lines of evaluations: a month has millions of others."""
    speeds, rows = array("d"), list[dict[str, Any]]()
    if not os.path.isfile(path):  # nor a device or a pipe, of which there is no end
        return speeds, rows
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                if row.get("images_per_second") is not None:
                    speeds.append(row["images_per_second"])
                if isinstance(row["step"], int) and evaluated(row):
                    rows.append(row)
            except (ValueError, KeyError, TypeError, AttributeError):  # not written whole
                continue
    return speeds, rows


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _size(row: dict[str, Any], name: str) -> list[Any]:
    return [row.get(f"{name}/{key}") for key in ("images", "identities", "unreadable")]


def _step(figure: str) -> str:
    return figure.rpartition("-")[2]
