"""Sample features in place of prototypes, from the gathered batch."""

from __future__ import annotations

import pytest
from torch.nn.functional import softplus

from partial_fc import PartialFC, losses
from tests.partial_fc.losses.parity import Dense, check, check_finite, check_finite_differences, substituted_cosines
from tests.partial_fc.losses.test_margins import cross_entropy


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_equals_dense_float64(ranks, rate):
    def cosface(dense: Dense, scale, margin):
        target, others = substituted_cosines(dense, rate)
        return cross_entropy(target - margin, others, scale)

    def uce(dense: Dense, scale, margin):
        target, others = substituted_cosines(dense, rate)
        b = dense.learned["threshold"]
        return (softplus(b - scale * (target - margin)) + softplus(scale * others - b).sum(dim=1)).mean()

    for name, oracle in (("cosface", cosface), ("uce", uce)):
        for scale in (16.0, 96.0):
            check(ranks, name, {"scale": scale, "margin": 0.3}, oracle, substitution_rate=rate)
        check(ranks, name, {"scale": 16.0, "margin": 0.3}, oracle, substitution_rate=rate, kernel="reference")
        check_finite(name, {"scale": 64.0, "margin": 0.3}, substitution_rate=rate)
        check_finite_differences(name, {"scale": 16.0, "margin": 0.3}, substitution_rate=rate)


def test_a_rate_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match="substitution_rate is 2"):
        PartialFC(10, 4, losses.build("cosface"), substitution_rate=2)
