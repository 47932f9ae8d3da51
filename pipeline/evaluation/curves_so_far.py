"""The curves of a run's earlier evaluations that the newest is drawn beside: the first and the best. They survive a restart."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.report import HISTOGRAM_EDGES, Report

MOST = 1 << 26  # bytes of a file, unpacked; 100 groups have 4 MB


@dataclass(frozen=True, eq=False)
class Curve:
    """What figures need of a report. Files of earlier versions have no threshold and histograms."""

    step: int
    eer: float
    genuine_pairs: int
    impostor_pairs: int
    roc: tuple[np.ndarray, np.ndarray]  # FAR and TAR float64 [P]
    threshold_at_eer: float | None = None
    histograms: np.ndarray | None = None  # int64 [2, 256], of genuine and impostor pairs between HISTOGRAM_EDGES
    groups: dict[str, Curve] = field(default_factory=dict)  # of parts of the set; of the newest evaluation only

    @classmethod
    def of(cls, step: int, report: Report) -> Curve:
        histograms = np.stack([report.genuine_histogram, report.impostor_histogram])
        pairs = int(report.genuine_pairs), int(report.impostor_pairs)
        groups = {name: cls.of(step, group) for name, group in report.groups.items()}
        return cls(step, float(report.eer), *pairs, report.roc, float(report.threshold_at_eer), histograms, groups)

    @property
    def genuine_histogram(self) -> np.ndarray:
        assert self.histograms is not None
        return self.histograms[0]

    @property
    def impostor_histogram(self) -> np.ndarray:
        assert self.histograms is not None
        return self.histograms[1]


class CurvesSoFar:
    """Of one set, kept in the file `path`: what of it cannot be read is forgotten, and drawn no more.

    of: what the set is; curves of another one are forgotten too"""

    def __init__(self, path: Path, of: Any = None) -> None:
        self._path, self._of = path, json.dumps(of)
        self._curves: dict[int, Curve] | None = None  # by step

    def with_newest(self, step: int, report: Report) -> dict[str, Any]:
        """The first, the best and the newest Curve, by what a legend calls them. What an earlier start of the run left of `step` and later
        steps, which are repeated now, is forgotten."""
        known = _known(self._path, self._of) if self._curves is None else self._curves
        curves = {at: replace(curve, groups={}) for at, curve in known.items() if at < step}
        curves[step] = Curve.of(step, report)
        self._curves = {at: curves[at] for at in sorted({min(curves), best_of(curves), step})}
        return labelled(self._curves)

    def write(self) -> None:
        """OSError where the file is not written; then it holds what it did."""
        arrays: dict[str, Any] = {"of": np.array(self._of)}
        for at, curve in (self._curves or {}).items():
            arrays |= _arrays(f"{at}", curve)
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        new = self._path.with_name(f"{self._path.name}.tmp")
        new.write_bytes(content.getvalue())
        new.replace(self._path)


def best_of(curves: Mapping[int, Curve]) -> int:
    """The step of the lowest EER, of equal ones the first."""
    return min(curves, key=lambda at: (curves[at].eer, at))


def labelled(curves: Mapping[int, Curve]) -> dict[str, Curve]:
    """Curves of rising steps by what a legend calls them."""
    best, newest = best_of(curves), max(curves)
    return {f"step {at:,}{', the best' if at == best != newest else ''}": curve for at, curve in curves.items()}


def read(path: Path) -> tuple[str, dict[int, Curve]]:
    """What the set is, as JSON, and its curves by step; "" and none where the file cannot be read, or holds what is no curve."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if sum(part.file_size for part in arrays.zip.infolist()) > MOST:
                return "", {}
            steps = sorted(int(name.split("/")[0]) for name in arrays.files if name.count("/") == 1 and name.endswith("/numbers"))
            return str(arrays["of"]), {at: _curve(f"{at}", arrays) for at in steps}
    except Exception:  # of zipfile, zlib, tokenize, numpy: no list holds all that they raise of a damaged archive
        return "", {}


def checked(curve: Curve) -> Curve:
    """The same. ValueError where figures could not draw it, as of a file that was damaged."""
    far_P, tar_P = curve.roc
    rates_2P = np.stack([far_P, tar_P])
    if rates_2P.ndim != 2 or rates_2P.dtype.kind != "f" or not rates_2P.size:
        raise ValueError("the ROC is no list of points")
    # Also false of NaN.
    if not ((rates_2P >= 0) & (rates_2P <= 1)).all() or not (np.diff(rates_2P) >= 0).all() or far_P[0] != 0:
        raise ValueError("the ROC does not rise from a false accept rate of 0 within 0 and 1")
    if not 0 <= curve.eer <= 1 or not -1.01 <= (curve.threshold_at_eer or 0) <= 1.01:
        raise ValueError("the EER is no rate, or its threshold no cosine")
    pairs = curve.genuine_pairs, curve.impostor_pairs
    if not all(1 <= number < 2**53 for number in pairs):
        raise ValueError("there are no pairs")
    if (counts := curve.histograms) is not None:
        if counts.shape != (2, len(HISTOGRAM_EDGES) - 1) or counts.dtype.kind != "i":
            raise ValueError("the histograms have other bins")
        if counts.min() < 0 or (counts.max(axis=1) > pairs).any():
            raise ValueError("the histograms count other pairs")
    return curve


def _known(path: Path, of: str) -> dict[int, Curve]:
    written_of, curves = read(path)
    return curves if written_of == of else {}


def _arrays(place: str, curve: Curve) -> dict[str, Any]:
    threshold = [] if curve.threshold_at_eer is None else [curve.threshold_at_eer]
    arrays: dict[str, Any] = {
        f"{place}/numbers": np.array([curve.eer, curve.genuine_pairs, curve.impostor_pairs, *threshold]),
        f"{place}/roc": np.stack(curve.roc),
    }
    if curve.histograms is not None:
        arrays[f"{place}/histograms"] = curve.histograms
    if curve.groups:
        arrays[f"{place}/groups"] = np.array(json.dumps(list(curve.groups)))
        for number, group in enumerate(curve.groups.values()):
            arrays |= _arrays(f"{place}/{number}", group)
    return arrays


def _curve(place: str, arrays: Any) -> Curve:
    eer, genuine, impostors, *threshold = arrays[f"{place}/numbers"].tolist()
    far_P, tar_P = arrays[f"{place}/roc"]
    histograms = arrays.get(f"{place}/histograms")
    names = json.loads(str(arrays[f"{place}/groups"])) if f"{place}/groups" in arrays else []
    groups = {str(name): _curve(f"{place}/{number}", arrays) for number, name in enumerate(names)}
    step = int(place.split("/")[0])
    curve = Curve(step, eer, int(genuine), int(impostors), (far_P, tar_P), threshold[0] if threshold else None, histograms, groups)
    return checked(curve)
