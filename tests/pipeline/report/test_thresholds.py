"""One threshold for several sets, against every threshold tried on the scores."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluation.curves_so_far import Curve
from pipeline.evaluation.report import HISTOGRAM_EDGES
from pipeline.report.thresholds import stability


@pytest.mark.parametrize("seed", range(5))
def test_the_common_threshold_balances_the_mean_rates_of_all_sets(seed):
    rng = np.random.default_rng(seed)
    scores = {}
    for name, pairs in (("small", 200), ("large", 5000)):
        shift = rng.uniform(-0.2, 0.2)
        scores[name] = np.clip(rng.normal(0.4 + shift, 0.2, pairs), -1, 1), np.clip(rng.normal(shift, 0.2, 3 * pairs), -1, 1)
    curves = {}
    for name, kinds in scores.items():
        histograms = np.stack([np.histogram(kind, HISTOGRAM_EDGES)[0] for kind in kinds])
        curves[name] = Curve(1, 0.1, len(kinds[0]), len(kinds[1]), (np.zeros(1), np.zeros(1)), 0.3, histograms)
    common, rows = stability(curves)

    def rates(threshold):
        return np.array([[(kind >= threshold).mean() for kind in kinds] for kinds in scores.values()])

    distances = [abs(rates(edge)[:, 1].mean() - (1 - rates(edge)[:, 0].mean())) for edge in HISTOGRAM_EDGES]
    assert distances[int(np.flatnonzero(common == HISTOGRAM_EDGES)[0])] == pytest.approx(min(distances), abs=1e-12)
    np.testing.assert_allclose([[row["tar_at_common"], row["far_at_common"]] for row in rows], rates(common))
    assert [row["group"] for row in rows] == ["small", "large"] and {row["threshold"] for row in rows} == {0.3}


def test_between_sets_that_are_apart_it_is_in_the_middle():
    histograms = np.zeros((2, 256), int)
    histograms[0, 200:] = histograms[1, :100] = 1
    common, _ = stability({"a": Curve(1, 0.0, 1, 1, (np.zeros(1), np.zeros(1)), 0.5, histograms)})
    assert common == HISTOGRAM_EDGES[150]
