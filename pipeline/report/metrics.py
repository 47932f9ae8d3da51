"""metrics.jsonl for a page: the series that are drawn, thinned, and the evaluations that lines tell of. Lines that are not whole are
counted and passed over."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.monitor.json_lines import evaluated

MOST_STEPS = 2**53  # of a run; axes of more cannot be drawn
LARGEST = 1e300  # of a number; JSON may have larger ones than a float holds
COUNTS = {"images", "identities", "genuine_pairs", "impostor_pairs", "unreadable", "pairs", "folds"}  # which lines have as floats
LONGEST = 1 << 20  # bytes of a line that is read


@dataclass
class Metrics:
    series: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # steps and values float64 [n], steps rising
    last: dict[str, float] = field(default_factory=dict)  # the newest value of each name
    evaluations: dict[tuple[int, str], dict[str, float]] = field(default_factory=dict)  # values by step and name of the results
    began: float = math.nan  # seconds since 1970, of the first line and the last
    ended: float = math.nan
    step: int = 0  # of the last line
    lines: int = 0
    damaged: int = 0


def read(path: Path, names: frozenset[str]) -> Metrics:
    """`names`: the series to keep. OSError where the file cannot be read."""
    found, kept = Metrics(), {name: (array("d"), array("d")) for name in names}
    for row in _rows(path, found):
        step = int(row.pop("step"))
        when = row.pop("time", None)
        found.step = max(found.step, step)
        if when is not None:
            found.began, found.ended = (when if math.isnan(found.began) else found.began), when
        sets = evaluated(row)
        for name in sets:
            values = {key.removeprefix(f"{name}/"): value for key, value in row.items() if key.startswith(f"{name}/")}
            values |= {key: int(values[key]) for key in values.keys() & COUNTS}
            found.evaluations[step, name] = values
        if sets:
            continue
        found.last |= row
        for name in row.keys() & names:
            kept[name][0].append(step)
            kept[name][1].append(row[name])
    for name, points in kept.items():
        if points[0]:
            step_n, value_n = map(np.array, points)
            order = np.argsort(step_n, kind="stable")
            found.series[name] = step_n[order], value_n[order]
    return found


def _rows(path: Path, found: Metrics) -> Iterator[dict[str, Any]]:
    """The numbers of each whole line, those of JSON's integers as int."""
    with path.open("rb") as file:
        while line := file.readline(LONGEST):
            found.lines += 1
            row: Any = None
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
            if not isinstance(row, dict) or not is_number(row.get("step")) or not 0 <= row["step"] < MOST_STEPS:
                found.damaged += 1
                continue
            yield {name: value for name, value in row.items() if is_number(value)}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST  # which NaN is not


def thinned(step_n: np.ndarray, value_n: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` (>= 4) of the points, among them the first and the last, and of each stretch the lowest and the highest."""
    if len(step_n) <= most:
        return step_n, value_n
    edges = np.linspace(0, len(step_n), (most - 2) // 2 + 1).astype(int)
    keep = {0, len(step_n) - 1}
    for start, stop in pairwise(edges.tolist()):
        keep |= {start + int(np.argmin(value_n[start:stop])), start + int(np.argmax(value_n[start:stop]))}
    at = np.array(sorted(keep))
    return step_n[at], value_n[at]
