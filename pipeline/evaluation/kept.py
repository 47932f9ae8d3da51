"""evaluations.json in a run's folder: what was measured, on which set, at which step. So a restart measures nothing again."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any

FILE = "evaluations.json"
KEYS = {"step", "name", "of", "values"}  # of a row


class Kept:
    """Rows of one evaluation of one set each: step, name of the results, what the set is, values. What the file holds of `first_step` and
    later steps, which will be trained again, is forgotten, and so is a file that is not whole."""

    def __init__(self, folder: str, first_step: int) -> None:
        self._path = os.path.join(folder, FILE)
        self._rows: list[dict[str, Any]] = []
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if os.path.isfile(self._path):
                with open(self._path, encoding="utf-8") as file:
                    rows = json.load(file)["evaluations"]
                self._rows = [row for row in rows if row.keys() >= KEYS and row["step"] < first_step]

    def values(self, step: int, name: str, of: dict[str, Any]) -> dict[str, float] | None:
        """What was measured at `step`; None if nothing was, or on another set of that name."""
        return next((row["values"] for row in self._rows if (row["step"], row["name"], row["of"]) == (step, name, of)), None)

    def add(self, step: int, name: str, of: dict[str, Any], values: dict[str, float]) -> None:
        """OSError if the file cannot be written; then it is as it was before."""
        self._rows.append({"step": step, "name": name, "of": of, "values": values})
        temporary = f"{self._path}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump({"evaluations": self._rows}, file)
            os.replace(temporary, self._path)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            raise
