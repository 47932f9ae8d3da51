"""Losses that draw an identity's images together."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import softplus

from partial_fc import losses
from tests.partial_fc.losses.parity import Dense, check, check_finite, check_finite_differences, normalize
from tests.partial_fc.losses.test_margins import cosface


def center(dense: Dense, scale, margin, center_weight=1.0):
    difference = normalize(dense.features) - normalize(dense.prototypes)[dense.labels]
    return cosface(dense, scale, margin) + center_weight * (difference**2).sum(dim=1).mean() / 2


def range_loss(dense: Dense, k=2, margin=1.0, intra_weight=0.5, inter_weight=0.5):
    units = normalize(dense.features)
    intra, centers = [], []
    for label in sorted(set(dense.labels.tolist())):
        own = units[dense.labels == label]
        centers.append(own.mean(dim=0) / own.mean(dim=0).norm())
        found = [((a - b) ** 2).sum() for a, b in itertools.combinations(own, 2)]
        if found:
            largest = sorted(found, key=torch.Tensor.item, reverse=True)[:k]
            intra.append(len(largest) / sum(1 / x for x in largest))
    nearest = min((((a - b) ** 2).sum() for a, b in itertools.combinations(centers, 2)), key=torch.Tensor.item)
    return intra_weight * sum(intra) / len(intra) + inter_weight * (margin - nearest).clamp(min=0)


def intra(dense: Dense, scale, margin, intra_weight=1.0, sharpness=16.0):
    units, labels = normalize(dense.features), dense.labels.tolist()
    farthest = []
    for i, label in enumerate(labels):
        own = [units[i] @ units[k] for k, other in enumerate(labels) if other == label and k != i]
        if own:
            farthest.append(-torch.log((-sharpness * torch.stack(own)).exp().mean()) / sharpness)
    found = torch.stack(farthest)
    return cosface(dense, scale, margin) + intra_weight * (softplus(sharpness * (found.mean().detach() - found)) / sharpness).mean()


CASES = [
    ("center", {"scale": 16.0, "margin": 0.3, "center_weight": 0.7}, center),
    ("range", {}, range_loss),
    ("range", {"k": 5, "margin": 2.0, "intra_weight": 0.3, "inter_weight": 2.0}, range_loss),
    ("range", {"k": 1, "margin": 1.5}, range_loss),
    ("range", {"k": 20, "margin": 1.5}, range_loss),  # more than the batch has samples
    ("intra", {"scale": 16.0, "margin": 0.3}, intra),
    ("intra", {"scale": 16.0, "margin": 0.3, "intra_weight": 5.0, "sharpness": 4.0}, intra),
]


@pytest.mark.parametrize(("name", "parameters", "oracle"), CASES)
def test_equals_dense_float64(ranks, name, parameters, oracle):
    check(ranks, name, parameters, oracle)
    check_finite(name, parameters | ({"scale": 64.0} if "scale" in parameters else {}))
    if name != "intra":  # its average depends on the features and has no gradient
        check_finite_differences(name, parameters)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("center", {"scale": 0.0}, "scale is 0.0, but must be positive"),
        ("center", {"margin": -1.0}, "margin is -1.0, but must lie in [0, 2]"),
        ("center", {"center_weight": -1.0}, "center_weight is -1.0, but must lie in [0, inf]"),
        ("range", {"k": 0}, "k is 0, but must lie in [1, 64]"),
        ("range", {"margin": 5.0}, "margin is 5.0, but must lie in [0, 4]"),
        ("range", {"intra_weight": -1.0}, "intra_weight is -1.0, but must lie in [0, inf]"),
        ("range", {"inter_weight": -1.0}, "inter_weight is -1.0, but must lie in [0, inf]"),
        ("intra", {"scale": -2.0}, "scale is -2.0, but must be positive"),
        ("intra", {"margin": 2.5}, "margin is 2.5, but must lie in [0, 2]"),
        ("intra", {"intra_weight": -1.0}, "intra_weight is -1.0, but must lie in [0, inf]"),
        ("intra", {"sharpness": 0.0}, "sharpness is 0.0, but must lie in [0.001, 1000]: it scales cosines"),
    ],
)
def test_bad_parameters_end_in_a_sentence(name, parameters, message):
    with pytest.raises(ValueError) as caught:
        losses.build(name, **parameters)
    assert message in str(caught.value)
