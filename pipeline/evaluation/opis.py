"""Whether one threshold suits everybody: OPIS over identities, and the best threshold of each of several groups beside the common one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.evaluation.intervals import Pairs
from pipeline.evaluation.report import OperatingPoints

FOLDS = 10
RANGE = (100, 10)  # inverse false accept rates between whose thresholds OPIS looks
_STEPS = 100  # thresholds of that range


def consistency(pairs: Pairs, points: OperatingPoints) -> tuple[dict[str, float | int | None], dict[str, list[dict[str, Any]]]]:
    """Figures `opis` and `threshold_std` (None where pairs do not suffice), and the table `thresholds`, whose rows are folds that share no
    identity. `points` are those of `pairs`."""
    rows = stability(_folds(pairs), points.equal_error_rate()[1])
    spread = float(np.std([row["threshold"] for row in rows])) if len(rows) > 1 else None
    return {"opis": opis(pairs, points), "threshold_std": spread}, {"thresholds": rows} if rows else {}


def opis(pairs: Pairs, points: OperatingPoints, inverse_fars: tuple[int, int] = RANGE) -> float | None:
    """The operating-point inconsistency score (arXiv 2307.04047): the variance over identities of their utility at a threshold, mean over
    the thresholds between those of two false accept rates of the whole set. 0: every identity is served alike by any of them.

    The utility of an identity is the harmonic mean of its true accept rate and of 1 - its false accept rate, whose pairs are all that have
    an image of it. Identities without a pair of both kinds are left out. 100 thresholds stand for the integral. None if fewer than two
    identities are left, or a rate is not reached. The range is a choice of this project.
    """
    ends = [points.at_far(inverse)[1] for inverse in inverse_fars]
    high, low = ends
    if high is None or low is None:
        return None
    threshold_T = np.linspace(low, high, _STEPS)
    true_UT, genuine_U = _accepts(pairs, pairs.same_P, threshold_T)
    false_UT, impostor_U = _accepts(pairs, ~pairs.same_P, threshold_T)
    whole_U = (genuine_U > 0) & (impostor_U > 0)
    if whole_U.sum() < 2:
        return None
    tar_UT = true_UT[whole_U] / genuine_U[whole_U, None]
    tnr_UT = 1 - false_UT[whole_U] / impostor_U[whole_U, None]
    total_UT = tar_UT + tnr_UT
    utility_UT = np.divide(2 * tar_UT * tnr_UT, total_UT, out=np.zeros_like(total_UT), where=total_UT > 0)
    return float(utility_UT.var(axis=0).mean())


def stability(groups: Mapping[str, tuple[np.ndarray, np.ndarray]], common: float) -> list[dict[str, Any]]:
    """A row for each group (a fold, a set, a part of the people) of scores [n] and whether they are genuine [n]: its own threshold, that of
    its EER, and what the `common` threshold means to it. Groups without a genuine or an impostor pair have none."""
    rows = []
    for name, (score_n, same_n) in groups.items():
        if 0 < same_n.sum() < len(same_n):
            eer, threshold = OperatingPoints.of_scores(score_n, same_n).equal_error_rate()
            accepted_n = score_n >= common
            far, tar = float(accepted_n[~same_n].mean()), float(accepted_n[same_n].mean())
            rows.append({"group": name, "threshold": threshold, "eer": eer, "far_at_common": far, "tar_at_common": tar})
    return rows


def _folds(pairs: Pairs) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scores of the pairs inside each of FOLDS random parts of the identities; the same identities give the same parts."""
    fold_U = np.random.default_rng(0).permutation(pairs.units) % FOLDS
    fold_P = np.where(fold_U[pairs.first_P] == fold_U[pairs.second_P], fold_U[pairs.first_P], -1)
    return {f"fold {fold + 1}": (pairs.score_P[fold_P == fold], pairs.same_P[fold_P == fold]) for fold in range(FOLDS)}


def _accepts(pairs: Pairs, kind_P: np.ndarray, threshold_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each unit, int64 [U, T] and [U]: its pairs of that kind with a score from each rising threshold on, and all of them."""
    score_n, first_n, second_n = pairs.score_P[kind_P], pairs.first_P[kind_P], pairs.second_P[kind_P]
    bin_n = np.searchsorted(threshold_T, score_n, side="right")  # reaches that many of the thresholds
    bins = len(threshold_T) + 1
    counts = np.bincount(first_n * bins + bin_n, minlength=pairs.units * bins)
    other_n = first_n != second_n
    counts = counts + np.bincount(second_n[other_n] * bins + bin_n[other_n], minlength=pairs.units * bins)
    counts_UB = counts.reshape(pairs.units, bins)
    return counts_UB[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:], counts_UB.sum(axis=1)
