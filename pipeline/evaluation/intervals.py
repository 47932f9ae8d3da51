"""How sure figures are: 95 % intervals by a bootstrap over identities, since pairs of one identity are not independent of each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from dali_loaders.progress import progress
from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.report import FARS, OperatingPoints

FEWEST = 10  # units below which there are no intervals: 2.5 % of so few draws say nothing
_BLOCK = 2**21  # weights of pairs held at a time


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of a set that is small enough to keep them. What is drawn anew, a unit, is an identity; where a set does not say who is in its
    images, a pair."""

    score_P: np.ndarray  # float64
    same_P: np.ndarray  # bool
    first_P: np.ndarray  # int64, units of the two images; both are the pair's own number where units are pairs
    second_P: np.ndarray
    units: int


def bootstrap(
    pairs: Pairs,
    points: OperatingPoints,
    shares: Mapping[str, tuple[np.ndarray, np.ndarray]],
    resamples: int,
    *,
    seed: int = 0,
    breaks: Breaks | None = None,
) -> dict[str, tuple[float, float]]:
    """The `percentiles` of what `draws` gives."""
    return percentiles(draws(pairs, points, shares, resamples, seed=seed, breaks=breaks), resamples)


def percentiles(drawn: Mapping[str, np.ndarray], resamples: int) -> dict[str, tuple[float, float]]:
    """Percentiles 2.5 and 97.5 by name of the figure; none for what half of the draws do not allow."""
    intervals = {}
    for name, value_R in drawn.items():
        value_R = value_R[np.isfinite(value_R)]
        if len(value_R) * 2 > resamples:
            low, high = np.quantile(value_R, (0.025, 0.975))
            intervals[name] = (float(low), float(high))
    return intervals


def draws(
    pairs: Pairs,
    points: OperatingPoints,
    shares: Mapping[str, tuple[np.ndarray, np.ndarray]],
    resamples: int,
    *,
    seed: int = 0,
    breaks: Breaks | None = None,
) -> dict[str, np.ndarray]:
    """Figures float64 [resamples] of as many sets, each of as many units, drawn with replacement; by name, NaN where a draw has none.

    `points` are those of `pairs`. `shares`: figures that are the mean of a value for each image or pair: float or bool [n], its unit [n] or
    the units [n, 2] of a pair.
    An identity drawn w times is w identities: its genuine pairs count w times, an impostor pair of two identities the product of theirs,
    and copies of one identity are not compared with each other. Who is the nearest impostor of an image does not change. A drawn pair
    counts as often as it was drawn.
    All ranks may call it and get the same. Nothing for fewer than FEWEST units, and for a figure that the set does not reach.
    """
    if resamples < 1 or pairs.units < FEWEST:
        return {}
    curves = _Curves(pairs, points)
    drawn: dict[str, list[np.ndarray]] = {}
    with progress("drawing for intervals", resamples) as done:
        for weight_RU in _weights(pairs.units, resamples, max(1, _BLOCK // max(1, len(pairs.score_P))), seed):
            if breaks and breaks.wanted():
                break
            found = curves.figures(weight_RU)
            for name, (value_n, unit_n) in shares.items():
                found[name] = _share(weight_RU, value_n, unit_n)
            for name, value_R in found.items():
                drawn.setdefault(name, []).append(value_R)
            done.add(len(weight_RU))
    if breaks:
        breaks.agree()
    return {name: np.concatenate(parts) for name, parts in drawn.items()}


def _weights(units: int, resamples: int, rows: int, seed: int) -> Iterator[np.ndarray]:
    """int32 [R, units]: how often each unit was drawn, for `rows` draws at a time."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, rows):
        yield rng.multinomial(units, np.full(units, 1 / units), size=min(rows, resamples - start)).astype(np.int32)


def _share(weight_RU: np.ndarray, value_n: np.ndarray, unit_n: np.ndarray) -> np.ndarray:
    """float64 [R]: the mean of `value_n`, weighted by how often each image or pair was drawn; NaN where none was."""
    with np.errstate(invalid="ignore"):
        if unit_n.ndim == 1:
            sum_U, number_U = (np.bincount(unit_n, values, weight_RU.shape[1]) for values in (value_n, None))
            return (weight_RU @ sum_U) / (weight_RU @ number_U)
        first_n, second_n = unit_n.T
        weight_Rn = weight_RU[:, first_n] * np.where(first_n == second_n, 1, weight_RU[:, second_n])
        return (weight_Rn @ value_n.astype(float)) / weight_Rn.sum(axis=1)


class _Curves:
    """The operating points of the set, whose accepted pairs are summed with other weights for each draw."""

    def __init__(self, pairs: Pairs, points: OperatingPoints) -> None:
        order = np.argsort(-pairs.score_P, kind="stable")
        genuine, impostor = order[pairs.same_P[order]], order[~pairs.same_P[order]]
        self.genuine_G, self.first_I, self.second_I = pairs.first_P[genuine], pairs.first_P[impostor], pairs.second_P[impostor]
        self.whole = np.array_equal(self.first_I, self.second_I)  # units are pairs
        self.points = points
        # Impostor pairs down to the last one of each score, and the point that accepts these and every genuine pair above the next one.
        self.ends_K = np.flatnonzero(np.append(np.diff(-pairs.score_P[impostor]) > 0, True)) + 1
        self.point_K = np.searchsorted(points.false_accepts_P, np.append(0, self.ends_K), side="right") - 1

    def figures(self, weight_RU: np.ndarray) -> dict[str, np.ndarray]:
        """float64 [R] by name; NaN where the draw does not have it."""
        weight_RI = np.take(weight_RU, self.first_I, axis=1)
        if not self.whole:
            weight_RI *= np.take(weight_RU, self.second_I, axis=1)
        false_RI = _from_zero(weight_RI)
        true_RG = _from_zero(np.take(weight_RU, self.genuine_G, axis=1))
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._equal_error_rate(true_RG, false_RI) | self._at_fars(true_RG, false_RI)

    def _at_fars(self, true_RG: np.ndarray, false_RI: np.ndarray) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        reached = [name for name in FARS if FARS[name] <= self.points.impostor_pairs]
        genuine_R, impostor_R = true_RG[:, -1], false_RI[:, -1]
        none_R = (genuine_R == 0) | (impostor_R == 0)
        false_RK = false_RI[:, np.append(0, self.ends_K)] if len(self.ends_K) + 1 < false_RI.shape[1] else false_RI
        allowed_RF = impostor_R[:, None] / np.array([FARS[name] for name in reached])
        at_RF = np.stack([np.searchsorted(row, allowed, side="right") - 1 for row, allowed in zip(false_RK, allowed_RF, strict=True)])
        point_RF = self.point_K[at_RF]
        tar_RF = np.take_along_axis(true_RG, self.points.true_accepts_P[point_RF], axis=1) / genuine_R[:, None]
        threshold_RF = self.points.threshold_P[point_RF]
        for place, name in enumerate(reached):
            tar_R = np.where(none_R, np.nan, tar_RF[:, place])
            found |= {f"tar_at_far/{name}": tar_R, f"fnmr_at_fmr/{name}": 1 - tar_R}
            found[f"threshold_at_far/{name}"] = np.where(none_R, np.nan, threshold_RF[:, place])
        return found

    def _equal_error_rate(self, true_RG: np.ndarray, false_RI: np.ndarray) -> dict[str, np.ndarray]:
        """As OperatingPoints.equal_error_rate, whose first point with an excess is found by halving."""
        rows = np.arange(len(true_RG))

        def rates(at_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            far_R = false_RI[rows, self.points.false_accepts_P[at_R]] / false_RI[:, -1]
            return far_R, far_R - 1 + true_RG[rows, self.points.true_accepts_P[at_R]] / true_RG[:, -1]

        low_R, high_R = np.zeros(len(rows), int), np.full(len(rows), len(self.points.threshold_P) - 1)
        while (high_R - low_R).max() > 1:
            middle_R = (low_R + high_R) // 2
            enough_R = rates(middle_R)[1] >= 0
            low_R, high_R = np.where(enough_R, low_R, middle_R), np.where(enough_R, middle_R, high_R)
        (far_low_R, before_R), (far_R, excess_R) = rates(low_R), rates(high_R)
        eer_R = far_low_R - before_R / (excess_R - before_R) * (far_R - far_low_R)
        return {"eer": eer_R, "threshold_at_eer": np.where(np.isnan(eer_R), np.nan, self.points.threshold_P[high_R])}


def _from_zero(weight_RP: np.ndarray) -> np.ndarray:
    """int64 [R, P + 1]: sums of the first 0, 1, ..., P weights."""
    sums_RP = np.zeros((len(weight_RP), weight_RP.shape[1] + 1), np.int64)
    np.cumsum(weight_RP, axis=1, out=sums_RP[:, 1:])
    return sums_RP
