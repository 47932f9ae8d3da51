"""Losses that compare samples with one sample of every identity."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from partial_fc import losses
from tests.partial_fc.losses.parity import Dense, check, check_finite, check_finite_differences, sample_cosines
from tests.partial_fc.losses.test_margins import cross_entropy


def sample_softmax(dense: Dense, scale, margin=0.1):
    target, has_positive, others = sample_cosines(dense)
    each = [cross_entropy(target[i : i + 1] - margin, others[i : i + 1], scale) for i in range(len(target)) if has_positive[i]]
    return torch.stack(each).sum() / len(target)


def sample_bce(dense: Dense, scale, margin=0.1, threshold=None):
    target, has_positive, others = sample_cosines(dense)
    by_class = dense.learned["thresholds"]
    if threshold is None:
        by_class = by_class + (torch.logsumexp(scale * others, dim=1).mean() - by_class).detach()
    b = by_class[dense.labels]
    positive = softplus(b - scale * (target - margin))[has_positive].sum()
    return (positive + softplus(scale * others - b[None, :]).sum()) / len(target)


def n_plus_1_tuplet(dense: Dense, scale, normalizes=True, norm_weight=0.0):
    target, has_positive, others = sample_cosines(dense)
    if not normalizes:
        labels, scale = dense.labels.tolist(), 1.0
        products = dense.features @ dense.features.T
        others = products.masked_fill(others == -torch.inf, -torch.inf)
        fellows = [[k for k, other in enumerate(labels) if other == label and k != i] for i, label in enumerate(labels)]
        target = torch.stack([products[i, k[0]] if k else products.new_zeros(()) for i, k in enumerate(fellows)])
    exponentials = (scale * (others - target[:, None])).exp().sum(dim=1)
    return torch.log1p(exponentials)[has_positive].sum() / len(target) + norm_weight / 2 * (dense.features**2).sum(dim=1).mean()


CASES = [
    ("sample_softmax", {"scale": 16.0, "margin": 0.1}, sample_softmax),
    ("sample_softmax", {"scale": 80.0, "margin": 0.0}, sample_softmax),
    ("sample_bce", {"scale": 16.0, "margin": 0.1}, sample_bce),
    ("sample_bce", {"scale": 32.0, "margin": 0.2, "threshold": 0.3}, sample_bce),
    ("n_plus_1_tuplet", {"scale": 16.0}, n_plus_1_tuplet),
    ("n_plus_1_tuplet", {"scale": 16.0, "normalizes": False, "norm_weight": 0.3}, n_plus_1_tuplet),
]


@pytest.mark.parametrize(("name", "parameters", "oracle"), CASES)
def test_equals_dense_float64(ranks, name, parameters, oracle):
    check(ranks, name, parameters, oracle)
    check_finite(name, parameters | {"scale": 64.0})
    check_finite_differences(name, parameters)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("sample_softmax", {"scale": 0.0}, "scale is 0.0, but must be positive"),
        ("sample_softmax", {"margin": 2.5}, "margin is 2.5, but must lie in [0, 2]: cosines"),
        ("sample_bce", {"margin": -0.1}, "margin is -0.1, but must lie in [0, 2]"),
        ("sample_bce", {"threshold": 1.5}, "threshold is 1.5, but must lie in [-1, 1]: it is a cosine"),
        ("sample_bce", {"scale": -1.0}, "scale is -1.0, but must be positive"),
        ("n_plus_1_tuplet", {"scale": float("nan")}, "scale is nan, but must be positive"),
        ("n_plus_1_tuplet", {"norm_weight": -1.0}, "norm_weight is -1.0, but must lie in [0, inf]"),
    ],
)
def test_bad_parameters_end_in_a_sentence(name, parameters, message):
    with pytest.raises(ValueError) as caught:
        losses.build(name, **parameters)
    assert message in str(caught.value)
