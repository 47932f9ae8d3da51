"""evaluations.json in a run's folder: what was measured, on which set, at which step. So a restart measures nothing again."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any

from pipeline.evaluation.report import Report

FILE = "evaluations.json"
KEYS = {"step", "name", "of", "values"}  # of a row; those of earlier versions have no more


class Kept:
    """Rows of one evaluation of one set each: step, name of the results, what the set is, values, intervals; and of the newest of each name
    its tables. What the file holds of `first_step` and later steps, which will be trained again, is forgotten, and so is a file that is
    not whole."""

    def __init__(self, folder: str, first_step: int) -> None:
        self._path = os.path.join(folder, FILE)
        self._rows = [row for row in rows_of(self._path) or () if row["step"] < first_step]

    def values(self, step: int, name: str, of: dict[str, Any]) -> dict[str, float] | None:
        """What was measured at `step`; None if nothing was, or on another set of that name, or the row is damaged."""
        found = (row["values"] for row in self._rows if (row["step"], row["name"], row["of"]) == (step, name, of))
        return next((values for values in found if all(isinstance(value, int | float) for value in values.values())), None)

    def add(self, step: int, name: str, of: dict[str, Any], values: dict[str, float], report: Report | None = None) -> None:
        """`report`: where intervals and tables are found. OSError if the file cannot be written; then it is as it was before."""
        for row in self._rows:
            if row["name"] == name:
                row.pop("tables", None)
        self._rows.append({"step": step, "name": name, "of": of, "values": values, **(details(report) if report else {})})
        temporary = f"{self._path}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump({"evaluations": self._rows}, file)
            os.replace(temporary, self._path)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def rows_of(path: str) -> list[dict[str, Any]] | None:
    """The rows of the file at `path`; None if there is none, or not a whole one."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                rows = json.load(file)["evaluations"]
            return [row for row in rows if row.keys() >= KEYS and row["step"] >= 0 and isinstance(row["values"], dict)]
    return None


def details(report: Report) -> dict[str, Any]:
    """Intervals and tables by name; those of a group behind its name and a /."""
    found: dict[str, Any] = {"intervals": {name: list(ends) for name, ends in report.intervals.items()}, "tables": dict(report.tables)}
    for group, part in report.groups.items():
        for kind, items in details(part).items():
            found[kind] |= {f"{group}/{name}": item for name, item in items.items()}
    return {kind: items for kind, items in found.items() if items}
