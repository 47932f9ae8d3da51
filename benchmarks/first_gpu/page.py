"""What a run found, as a CSV file and as a page to read."""

from __future__ import annotations

import csv
import os
import time
from typing import Any

from benchmarks.first_gpu.rows import Row
from benchmarks.first_gpu.table import Step
from benchmarks.record import origin


class Page:
    """FOLDER/first_gpu-TIME.csv and .md. Both are complete after every step, so that an interrupted run leaves what it found."""

    def __init__(self, folder: str, command: str) -> None:
        self.folder = os.path.abspath(folder)
        self.path = os.path.join(self.folder, time.strftime("first_gpu-%Y%m%d-%H%M%S"))
        self.origin = {**origin(), "command": command}
        self.steps: list[tuple[Step, list[Row], float]] = []
        try:
            os.makedirs(folder, exist_ok=True)
            self._write()
        except OSError as error:
            raise ValueError(f"{folder} cannot be written ({error.strerror}): choose another folder") from None

    @property
    def failed(self) -> list[str]:
        return [step.name for step, rows, _ in self.steps if any(row.failed for row in rows)]

    def add(self, step: Step, rows: list[Row], seconds: float) -> None:
        self.steps.append((step, rows, seconds))
        self._write()
        print(f"{step.name} ({seconds:.0f} s)", *map(_line, rows), sep="\n  ", flush=True)

    def _write(self) -> None:
        with open(f"{self.path}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*self.origin, "step", *Row._fields])
            writer.writerows([*self.origin.values(), step.name, *row] for step, rows, _ in self.steps for row in rows)
        with open(f"{self.path}.md", "w") as file:
            file.write(self._text())

    def _text(self) -> str:
        known = self.origin
        lines = [
            "# First GPU",
            "",
            f"{known['hardware']}; torch {known['torch']}; commit {known['commit']}; {known['date']}; `{known['command']}`",
            "",
            _table_row("step", "seconds", "rows", "without a figure", "failed"),
            "|---|---|---|---|---|",
        ]
        for step, rows, seconds in self.steps:
            empty, bad = sum(row.value is None for row in rows), sum(row.failed for row in rows)
            lines.append(_table_row(step.name, f"{seconds:.0f}", len(rows), empty or "", bad or ""))
        for step, rows, _ in self.steps:
            lines += ["", f"## {step.title} ({step.name})", "", _table_row("what", "measured", "target", "note"), "|---|---|---|---|"]
            lines += [_table_row(row.what, _measured(row), row.target, row.note) for row in rows]
        return "\n".join(lines) + "\n"


def _measured(row: Row) -> str:
    value = f"{row.value:.6g}" if isinstance(row.value, float) else "" if row.value is None else str(row.value)
    return f"{value} {row.unit}".strip() if value else ""


def _line(row: Row) -> str:
    target = f" (target {row.target})" if row.target else ""
    return f"{row.what}: {'; '.join(part for part in (_measured(row) + target, row.note) if part.strip())}"


def _table_row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
