"""metrics.jsonl: one JSON object per line, in the order of steps."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.monitor.appending import Appending
from pipeline.monitor.writer import Writer

BLOCK = 1 << 16  # bytes


class JsonLines(Writer):
    """Appends {"step", "time" (seconds since 1970), name: value, ...} lines to `path`.

    `begin` first drops lines of step `first_step` or later, and a last line that a killed run left half-written. NaN and infinities, which
    JSON does not know, become null. OSError where a line is not written; the next one is tried anew.
    """

    name = "metrics.jsonl"

    def __init__(self, path: Path, first_step: int = 0) -> None:
        self._path, self._first_step = path, first_step
        self._has_begun = False
        self._file = Appending(path)

    def begin(self) -> None:
        if self._path.is_file():
            _drop_from(self._path, self._first_step)
        self._file.append(b"")
        self._has_begun = True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if not self._has_begun:
            self.begin()
        record: dict[str, float | None] = {"step": step, "time": round(time.time(), 3)}
        record.update((name, float(value) if math.isfinite(value) else None) for name, value in values.items())
        self._file.append(json.dumps(record, allow_nan=False).encode() + b"\n")

    def evaluation(self, step: int, set_name: str, values: Mapping[str, float], threshold: float) -> None:
        """Under SET/FIGURE; the threshold under evaluation/SET/threshold, beside which `threshold` is what a loss has learned."""
        self.scalars(step, {**{f"{set_name}/{name}": value for name, value in values.items()}, threshold_of(set_name): threshold})

    def close(self) -> None:
        self._file.close()


def threshold_of(set_name: str) -> str:
    """What a line of metrics calls the best threshold of an evaluation set. Every evaluation has one."""
    return f"evaluation/{set_name}/threshold"


def evaluated(row: Mapping[str, Any]) -> list[str]:
    """The sets whose figures a line of metrics holds. Groups of a set, SET/GROUP/eer, are none, and have no such threshold; it is the last
    of those that begin like it, as of the groups of a set called "evaluation". Lines of the first versions have none."""
    thresholds = [name for name in row if name.startswith("evaluation/") and name.endswith("/threshold") and name.count("/") > 1]
    if thresholds:
        return [thresholds[-1].split("/", 1)[1].rpartition("/")[0]]
    return [name.removesuffix("/eer") for name in row if name.endswith("/eer")]


def last_step(path: Path) -> float:
    """The step of the last line; 0 where there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return next((_step(line) for _, line in _backwards(file)), 0)


def rows_at_end(path: Path, step: int) -> list[dict[str, Any]]:
    """What the last lines say of `step`, newest first; nothing where the file cannot be read."""
    rows = []
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                for _, line in _backwards(file):
                    if _step(line) < step:
                        break
                    with suppress(ValueError, RecursionError):
                        rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and row.get("step") == step]


def _drop_from(path: Path, first_step: int) -> None:
    """Cuts the file behind its last whole line of an earlier step. That needs no room on the disk, and reads what is dropped only."""
    if not path.stat().st_size:
        return
    with path.open("r+b") as file:
        end = next((end for end, line in _backwards(file) if _step(line) < first_step), 0) if first_step > 0 else 0
        file.truncate(end)


def _backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The whole lines, from the last one on, each after the place where it ends. What follows the last line feed is none."""
    start = file.seek(0, os.SEEK_END)
    block = b""  # the file from `start` on
    stop = 0  # in the block: behind the line feed of the line to come, once there is one
    while True:
        feed = block.rfind(b"\n", 0, max(0, stop - 1)) if stop else block.rfind(b"\n")
        if feed < 0 and start > 0:
            size = min(BLOCK, start)
            start -= size
            file.seek(start)
            block, stop = file.read(size) + (block[:stop] if stop else block), stop + size if stop else 0
            continue
        if stop:
            yield start + stop, block[feed + 1 : stop]
        stop = feed + 1
        if not stop:
            return


def _step(line: bytes) -> float:
    """The step a line reports; infinity, so that it is dropped, where the line is not whole."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int | float) else math.inf
