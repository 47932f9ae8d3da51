"""Losses with a learned threshold."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from tests.partial_fc.losses.parity import Dense, check, check_finite, check_finite_differences, cosines, sample_cosines


def uce(dense: Dense, scale, margin=0.4, threshold=None, weight=1.0):
    target, others = cosines(dense)
    b = dense.learned["threshold"]
    return (softplus(b - scale * (target - margin)) + weight * softplus(scale * others - b).sum(dim=1)).mean()


def uss(dense: Dense, scale, margin=0.1, threshold=None):
    target, has_positive, others = sample_cosines(dense)
    b = dense.learned["threshold"]
    if threshold is None:
        b = b + (torch.logsumexp(scale * others, dim=1).mean() - b).detach()
    return (softplus(b - scale * (target - margin)).where(has_positive, 0) + softplus(scale * others - b).sum(dim=1)).mean()


CASES = [
    ("uce", {"scale": 16.0, "margin": 0.3}, uce),
    ("uce", {"scale": 24.0, "margin": 0.4, "threshold": 0.2, "weight": 0.7}, uce),
    ("uss", {"scale": 16.0, "margin": 0.1}, uss),
    ("uss", {"scale": 32.0, "margin": 0.0, "threshold": 0.3}, uss),
]


@pytest.mark.parametrize(("name", "parameters", "oracle"), CASES)
def test_equals_dense_float64(ranks, name, parameters, oracle):
    check(ranks, name, parameters, oracle)
    check_finite(name, parameters | {"scale": 64.0})
    check_finite_differences(name, parameters)
