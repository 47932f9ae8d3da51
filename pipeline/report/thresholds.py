"""Whether one threshold serves several sets, or several groups of a set, from the score histograms that a run keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.evaluation.curves_so_far import Curve
from pipeline.evaluation.report import HISTOGRAM_EDGES


def stability(curves: Mapping[str, Curve]) -> tuple[float, list[dict[str, Any]]]:
    """The common threshold of sets or groups that all have histograms, and a row for each, as `evaluation.opis.stability` has them: its own
    threshold and EER, and its FAR and TAR at the common one. That is the edge of a bin, of width 1/128, at which the mean FAR and the mean
    false reject rate are nearest to each other; every set counts alike, however many pairs it has."""
    histograms_S2K = np.stack([np.stack([curve.genuine_histogram, curve.impostor_histogram]) for curve in curves.values()]).astype(float)
    share_S2K = histograms_S2K / histograms_S2K.sum(axis=2, keepdims=True)
    above_S2K = np.zeros((len(curves), 2, len(HISTOGRAM_EDGES)))  # the share from each edge on
    above_S2K[:, :, :-1] = share_S2K[:, :, ::-1].cumsum(axis=2)[:, :, ::-1]
    tar_K, far_K = above_S2K.mean(axis=0)
    distance_K = np.abs(far_K - (1 - tar_K))
    # Between sets that are apart many edges are as good: the middle one is the safest.
    best = np.flatnonzero(distance_K <= distance_K.min() + 1e-12)
    at = int(best[len(best) // 2])
    rows = [
        {
            "group": name,
            "threshold": curve.threshold_at_eer,
            "eer": curve.eer,
            "far_at_common": float(above_S2K[place, 1, at]),
            "tar_at_common": float(above_S2K[place, 0, at]),
        }
        for place, (name, curve) in enumerate(curves.items())
    ]
    return float(HISTOGRAM_EDGES[at]), rows
