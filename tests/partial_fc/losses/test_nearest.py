"""NPT-Loss."""

from __future__ import annotations

import math

import pytest
import torch

from partial_fc import PartialFC, losses
from tests.partial_fc.losses.parity import CLASSES, Dense, check, check_finite, check_finite_differences, cosines, error, step


def npt(dense: Dense, margin=0.5, k=1, zero_negative=False):
    target, others = cosines(dense)
    if zero_negative:
        others = torch.cat([others, torch.zeros(len(others), 1, dtype=others.dtype)], dim=1)
    nearest = others.sort(dim=1, descending=True).values[:, :k]
    return (nearest - target[:, None] + margin).clamp(min=0).sum(dim=1).mean()


CASES = [
    {"margin": 0.5},
    {"margin": 0.2, "k": 6},
    {"margin": 2.0, "k": 30},  # more than there are classes
    {"margin": 0.5, "zero_negative": True},
    {"margin": 1.0, "k": 20, "zero_negative": True},
]


@pytest.mark.parametrize("parameters", CASES)
def test_equals_dense_float64(ranks, parameters):
    check(ranks, "npt", parameters, npt)
    check_finite("npt", parameters)
    check_finite("npt", parameters, dtype="bfloat16")
    check_finite_differences("npt", parameters)


@pytest.mark.parametrize("scale", [1e3, 1e4, 1e5])
def test_is_the_limit_of_cosface(scale):
    limit = step("npt", {"margin": 0.5}, torch.float64, 1.0, "random", {})
    cosface = step("cosface", {"scale": scale, "margin": 0.5}, torch.float64, 1.0, "random", {})
    assert -1e-12 < cosface["loss"] / scale - limit["loss"] < math.log(CLASSES) / scale
    if scale == 1e5:  # of the gradients, where no second prototype is as near as the nearest
        assert all(error(cosface[key] / scale, limit[key]) < 1e-6 for key in ("features", "prototypes"))


@pytest.mark.parametrize("k", [1, 3])
def test_one_class_has_nothing_near(k):
    classifier = PartialFC(1, 4, losses.build("npt", margin=2.0, k=k))
    features = torch.randn(5, 4, requires_grad=True)
    loss = classifier(features, torch.zeros(5, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and not features.grad.any() and not classifier.prototypes.grad.any()


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"margin": -0.5}, "margin is -0.5, but must lie in"),
        ({"margin": 2.5}, "margin is 2.5"),
        ({"k": 0}, "k is 0, but must lie in .*: it is the number of nearest prototypes"),
    ],
)
def test_bad_parameters_are_refused(parameters, sentence):
    with pytest.raises(ValueError, match=sentence):
        losses.build("npt", **parameters)
