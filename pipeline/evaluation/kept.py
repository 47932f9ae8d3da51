"""evaluations.json in a run's folder: what was measured, on which set, at which step. So a restart neither measures anything again nor
forgets the first curve, beside which the newest is drawn."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

FILE = "evaluations.json"
KEYS = {"step", "name", "of", "values"}  # of a row


class Curved(Protocol):
    """What a ROC curve is drawn from: the reports have it, and `Curve`."""

    @property
    def eer(self) -> float: ...
    @property
    def impostor_pairs(self) -> int: ...
    @property
    def roc(self) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True, eq=False)
class Curve:
    """roc: FAR and TAR, float64 [P] each, ascending"""

    eer: float
    impostor_pairs: int
    roc: tuple[np.ndarray, np.ndarray]


class Kept:
    """Rows of one evaluation of one set each: step, name of the results, what the set is, values as metrics name them, and for the first
    row of a set its curve. What the file holds of `first_step` and later steps, which will be trained again, is forgotten, and so is a file
    that is not whole."""

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

    def first(self, name: str, of: dict[str, Any]) -> tuple[int, Curve] | None:
        """The step of the first evaluation of this set, and its curve."""
        for row in self._rows:
            if (row["name"], row["of"]) == (name, of) and "curve" in row:
                curve = row["curve"]
                return row["step"], Curve(curve["eer"], curve["impostor_pairs"], (np.array(curve["far"]), np.array(curve["tar"])))
        return None

    def add(self, step: int, name: str, of: dict[str, Any], values: dict[str, float], report: Curved) -> None:
        """OSError if the file cannot be written; then it is as it was before."""
        row = {"step": step, "name": name, "of": of, "values": values}
        if self.first(name, of) is None:
            far_P, tar_P = report.roc
            row["curve"] = {"eer": report.eer, "impostor_pairs": report.impostor_pairs, "far": far_P.tolist(), "tar": tar_P.tolist()}
        self._rows.append(row)
        temporary = f"{self._path}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump({"evaluations": self._rows}, file)
            os.replace(temporary, self._path)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            raise
