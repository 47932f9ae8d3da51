"""The curves of a run's earlier evaluations that the newest is drawn beside: the first and the best. They survive a restart."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Curve:
    """What figures need of a report."""

    step: int
    eer: float
    genuine_pairs: int
    impostor_pairs: int
    roc: tuple[np.ndarray, np.ndarray]  # FAR and TAR float64 [P]


class CurvesSoFar:
    """Of one set, kept in the file `path`: what of it cannot be read is forgotten, and drawn no more.

    of: what the set is; curves of another one are forgotten too"""

    def __init__(self, path: Path, of: Any = None) -> None:
        self._path, self._of = path, json.dumps(of)
        self._curves: dict[int, Curve] | None = None  # by step

    def with_newest(self, step: int, report: Any) -> dict[str, Any]:
        """The first, the best and the newest Curve, by what a legend calls them. What an earlier start of the run left of `step` and later
        steps, which are repeated now, is forgotten."""
        known = _read(self._path, self._of) if self._curves is None else self._curves
        curves = {at: curve for at, curve in known.items() if at < step}
        curves[step] = Curve(step, float(report.eer), int(report.genuine_pairs), int(report.impostor_pairs), report.roc)
        first, best = min(curves), min(curves, key=lambda at: (curves[at].eer, at))
        self._curves = {at: curves[at] for at in sorted({first, best, step})}
        return {f"step {at:,}{', the best' if at == best != step else ''}": curve for at, curve in self._curves.items()}

    def write(self) -> None:
        """OSError where the file is not written; then it holds what it did."""
        arrays: dict[str, Any] = {"of": np.array(self._of)}
        for at, curve in (self._curves or {}).items():
            arrays |= {f"{at}/numbers": np.array([curve.eer, curve.genuine_pairs, curve.impostor_pairs]), f"{at}/roc": np.stack(curve.roc)}
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        new = self._path.with_name(f"{self._path.name}.tmp")
        new.write_bytes(content.getvalue())
        new.replace(self._path)


def _read(path: Path, of: str) -> dict[int, Curve]:
    curves: dict[int, Curve] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files if str(arrays["of"]) == of else ():
                step, _, part = name.partition("/")
                if part == "numbers":
                    eer, genuine, impostors = arrays[name].tolist()
                    far_P, tar_P = arrays[f"{step}/roc"]
                    curves[int(step)] = Curve(int(step), eer, int(genuine), int(impostors), (far_P, tar_P))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    return curves
