"""What an evaluation found: figures with intervals, thresholds, curves and tables, the same for every protocol.

Rates are fractions, thresholds are cosines; a pair is accepted when its cosine is at least the threshold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

FARS = {f"1e-{digits}": 10**digits for digits in range(1, 9)}  # the name of a false accept rate, and its inverse
ALWAYS = 6  # of these rates are in every report, as None where pairs do not suffice; the others where they do
HISTOGRAM_EDGES = np.linspace(-1.0, 1.0, 257)
ROC_POINTS = 2000


@dataclass(frozen=True, eq=False)
class Report:
    """Figures are attributes too: `report.eer`, and `report.tar_at_far["1e-3"]` for "tar_at_far/1e-3"; so are thresholds."""

    figures: dict[str, float | int | None]  # by name; None: too few pairs for it, or nothing that the protocol knows
    thresholds: dict[str, float | None]  # cosines by name; None: nothing can be accepted at that rate
    best: str  # name of the threshold to accept pairs at
    roc: tuple[np.ndarray, np.ndarray]  # FAR and TAR float64 [P], ascending, P <= 2000 points spaced evenly in log FAR
    genuine_histogram: np.ndarray  # int64 [256], pair counts between HISTOGRAM_EDGES
    impostor_histogram: np.ndarray
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)  # 95 %, by names of figures and thresholds
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # rows by name of the table
    groups: dict[str, Report] = field(default_factory=dict)  # of parts of the set, such as groups of people, whose curves are their own

    def __getattr__(self, name: str) -> Any:
        numbers = self.__dict__.get("figures", {}) | self.__dict__.get("thresholds", {})
        if name in numbers:
            return numbers[name]
        if group := {key.removeprefix(f"{name}/"): value for key, value in numbers.items() if key.startswith(f"{name}/")}:
            return group
        raise AttributeError(f"the report has no {name!r}, but {', '.join(numbers)}")

    @property
    def best_cosine(self) -> float:
        """The threshold to accept pairs at."""
        best = self.thresholds[self.best]
        assert best is not None
        return best

    def numbers(self) -> dict[str, float | int | None]:
        """Figures and thresholds by name; those of a group behind its name and a /."""
        of_groups = {f"{group}/{name}": value for group, report in self.groups.items() for name, value in report.numbers().items()}
        return {**self.figures, **self.thresholds, **of_groups}

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: figures and thresholds, where names with a / are nested; `intervals` and `tables`, where there are any; and each
        group below its name."""
        nested: dict[str, Any] = {group: report.as_dict() for group, report in self.groups.items()}
        for name, value in {**self.figures, **self.thresholds}.items():
            group, slash, key = name.partition("/")
            if slash:
                nested.setdefault(group, {})[key] = value
            else:
                nested[name] = value
        if self.intervals:
            nested["intervals"] = {name: list(interval) for name, interval in self.intervals.items()}
        if self.tables:
            nested["tables"] = self.tables
        return nested


@dataclass(frozen=True, eq=False)
class OperatingPoints:
    """The whole ROC: a point for each distinct score, from accepting nothing (threshold inf) to accepting everything."""

    threshold_P: np.ndarray  # float64, falling
    true_accepts_P: np.ndarray  # int64
    false_accepts_P: np.ndarray

    @classmethod
    def of_counts(cls, threshold_K: np.ndarray, genuine_K: np.ndarray, impostor_K: np.ndarray) -> OperatingPoints:
        """From numbers of pairs at rising thresholds; those without a pair are left out."""
        used = np.flatnonzero(genuine_K + impostor_K)[::-1]
        counts = (np.concatenate([[0], counts_K[used].cumsum()]) for counts_K in (genuine_K, impostor_K))
        return cls(np.concatenate([[np.inf], threshold_K[used]]), *counts)

    @classmethod
    def of_scores(cls, score_P: np.ndarray, same_P: np.ndarray) -> OperatingPoints:
        """From a score for each pair, and whether it is genuine."""
        distinct_K, place_P = np.unique(score_P, return_inverse=True)
        genuine_K, impostor_K = (np.bincount(place_P[kind], minlength=len(distinct_K)) for kind in (same_P, ~same_P))
        return cls.of_counts(distinct_K, genuine_K, impostor_K)

    @property
    def genuine_pairs(self) -> int:
        return int(self.true_accepts_P[-1])

    @property
    def impostor_pairs(self) -> int:
        return int(self.false_accepts_P[-1])

    def equal_error_rate(self) -> tuple[float, float]:
        """Where false accept and false reject rates are equal, linear between two points, and the threshold of the second of them."""
        tar_P, far_P = self._rates()
        excess_P = far_P - (1.0 - tar_P)
        at = int(np.argmax(excess_P >= 0))
        before = excess_P[at - 1]
        share = -before / (excess_P[at] - before)
        return float(far_P[at - 1] + share * (far_P[at] - far_P[at - 1])), float(self.threshold_P[at])

    def at_far(self, inverse: int, nearest: bool = False) -> tuple[float | None, float | None]:
        """TAR and threshold at a false accept rate of 1 / inverse: the best point with at most that rate or, with `nearest`, as the
        scripts for IJB have it, the corner of the curve whose rate is nearest (of several the one that accepts most). TAR is None below
        `inverse` impostor pairs, the threshold also where nothing can be accepted."""
        if self.impostor_pairs < inverse:
            return None, None
        if nearest:
            corner_n = self._corners()
            distance_n = np.abs(self.false_accepts_P[corner_n] - self.impostor_pairs / inverse)
            at = int(corner_n[len(corner_n) - 1 - int(np.argmin(distance_n[::-1]))])
        else:
            at = int(np.searchsorted(self.false_accepts_P, self.impostor_pairs // inverse, side="right")) - 1
        return self.true_accepts_P[at] / self.genuine_pairs, float(self.threshold_P[at]) if at else None

    def figures(self, nearest: bool = False) -> tuple[dict[str, float | int | None], dict[str, float | None]]:
        """`eer`, `tar_at_far/*`, `fnmr_at_fmr/*` and numbers of pairs; the thresholds. With `nearest` these take the point whose rate is
        nearest, and `tar_at_far_conservative/*` and `threshold_at_far_conservative/*` stand beside them."""
        eer, at = self.equal_error_rate()
        figures: dict[str, float | int | None] = {"eer": eer}
        thresholds: dict[str, float | None] = {"threshold_at_eer": at}
        for suffix, way in (("", nearest), ("_conservative", False))[: 1 + nearest]:
            found = {name: self.at_far(inverse, way) for name, inverse in FARS.items()}
            shown = {name: value for place, (name, value) in enumerate(found.items()) if place < ALWAYS or value[0] is not None}
            figures |= {f"tar_at_far{suffix}/{name}": None if tar is None else float(tar) for name, (tar, _) in shown.items()}
            if not suffix:
                figures |= {f"fnmr_at_fmr/{name}": None if tar is None else float(1 - tar) for name, (tar, _) in shown.items()}
            thresholds |= {f"threshold_at_far{suffix}/{name}": threshold for name, (_, threshold) in shown.items()}
        return figures | {"genuine_pairs": self.genuine_pairs, "impostor_pairs": self.impostor_pairs}, thresholds

    def roc(self) -> tuple[np.ndarray, np.ndarray]:
        """At most ROC_POINTS points: for FAR 0 and for FARs spaced evenly in log, the best TAR at no more than that FAR."""
        tar_P, far_P = self._rates()
        targets = np.concatenate([[0.0], np.geomspace(1 / self.impostor_pairs, 1.0, ROC_POINTS - 1)])
        targets[-1] = 1.0
        keep = np.unique(np.searchsorted(far_P, targets, side="right") - 1)
        return far_P[keep], tar_P[keep]

    def _corners(self) -> np.ndarray:
        """Numbers of the points that scikit-learn's roc_curve leaves, by which those scripts choose: not those in the middle of a straight
        line of equal steps. The point that accepts nothing stays."""
        bends = np.diff(self.false_accepts_P[1:], 2).astype(bool) | np.diff(self.true_accepts_P[1:], 2).astype(bool)
        last = len(self.threshold_P) - 1
        return np.unique(np.concatenate([[0, 1], np.flatnonzero(bends) + 2, [last]]))

    def _rates(self) -> tuple[np.ndarray, np.ndarray]:
        return self.true_accepts_P / self.genuine_pairs, self.false_accepts_P / self.impostor_pairs
