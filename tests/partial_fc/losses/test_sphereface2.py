"""SphereFace2, type C."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from partial_fc import losses
from tests.partial_fc.losses.parity import Dense, check, check_finite, check_finite_differences, cosines


def shaped(cosine, power, slope):
    exact = 2 * ((cosine + 1) / 2) ** power - 1
    return exact if slope == "exact" else cosine + (exact - cosine).detach()


def sphereface2(dense: Dense, scale=40.0, margin=0.4, power=3.0, target_weight=0.7, weight=50.0, slope="straight_through"):
    """As the authors' code: the mean of B C weighted binary cross-entropies, times weight C / scale."""
    target, others = cosines(dense)
    is_other = others > -torch.inf
    others = shaped(others.where(is_other, 0), power, slope)
    b = dense.learned["bias"]
    of_targets = functional.binary_cross_entropy_with_logits(
        scale * (shaped(target, power, slope) - margin) + b, torch.ones_like(target), reduction="sum"
    )
    logits = scale * (others + margin) + b
    of_others = functional.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), weight=is_other.to(logits), reduction="sum")
    classes = others.shape[1]
    mean = (target_weight * of_targets + (1 - target_weight) * of_others) / (len(target) * classes)
    return weight * classes / scale * mean


CASES = [
    {},
    {"slope": "exact"},
    {"scale": 16.0, "margin": 0.2, "power": 1.0, "target_weight": 0.5, "weight": 10.0},
    {"scale": 16.0, "margin": 0.2, "power": 2.5, "target_weight": 0.8, "weight": 1.0, "slope": "exact"},
]


@pytest.mark.parametrize("parameters", CASES)
def test_equals_dense_float64(ranks, parameters):
    check(ranks, "sphereface2", parameters, sphereface2)
    check_finite("sphereface2", parameters | {"scale": 64.0})
    check_finite("sphereface2", parameters | {"scale": 64.0}, dtype="bfloat16")
    if parameters.get("slope") == "exact" or parameters.get("power") == 1.0:
        check_finite_differences("sphereface2", parameters)


@pytest.mark.parametrize("slope", ["exact", "straight_through"])
def test_cosines_that_rounding_puts_below_minus_1_have_a_value(slope):
    loss = losses.build("sphereface2", power=2.5, slope=slope)
    below = torch.tensor([-1.0000002, -1.0, 1.0000002], requires_grad=True)
    loss._shape(below).sum().backward()
    assert loss._shape(below).isfinite().all() and below.grad.isfinite().all()


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 23, 10_572, 2_000_000])
@pytest.mark.parametrize(
    ("scale", "margin", "power", "target_weight"), [(40.0, 0.4, 3.0, 0.7), (64.0, 0.5, 3.0, 0.8), (8.0, 0.1, 1.0, 0.5)]
)
def test_the_bias_starts_where_the_loss_of_orthogonal_features_is_smallest(classes, scale, margin, power, target_weight):
    loss = losses.build("sphereface2", scale=scale, margin=margin, power=power, target_weight=target_weight)
    b = torch.tensor(loss.learned(classes)["bias"], dtype=torch.float64)
    middle = 2 * 0.5**power - 1
    down = target_weight * torch.sigmoid(-(scale * (middle - margin) + b))
    up = (1 - target_weight) * max(1, classes - 1) * torch.sigmoid(scale * (middle + margin) + b)
    assert abs(down / up - 1) < 1e-6


def test_the_bias_starts_as_in_the_authors_code():
    ratio, target, others = 0.7 / (0.3 * 22), 40 * (2 * 0.5**3 - 1.4), 40 * (2 * 0.5**3 - 0.6)
    ratio, target, others = (torch.tensor(x, dtype=torch.float64) for x in (ratio, target, others))
    root = torch.sqrt((1 - ratio) ** 2 + 4 * ratio * torch.exp(target - others))
    right = torch.log(2 * ratio) - others - torch.log(1 - ratio + root)
    assert abs(losses.build("sphereface2").learned(23)["bias"] - right) < 1e-9


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"scale": 0.0}, "scale is 0.0, but must be positive"),
        ({"margin": -0.4}, "margin is -0.4, but must lie in"),
        ({"power": 0.5}, "power is 0.5, but must lie in"),
        ({"weight": -1.0}, "weight is -1.0, but must lie in"),
        ({"target_weight": 1.0}, "target_weight is 1.0, but must lie between 0 and 1"),
        ({"slope": "none"}, "slope is 'none', but must be"),
    ],
)
def test_bad_parameters_are_refused(parameters, sentence):
    with pytest.raises(ValueError, match=sentence):
        losses.build("sphereface2", **parameters)
