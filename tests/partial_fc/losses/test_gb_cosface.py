"""GB-CosFace."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from partial_fc import PartialFC, losses
from tests.partial_fc.losses.parity import Dense, check, check_finite, cosines, data, error, steps


def parts(dense: Dense, scale):
    target, others = cosines(dense)
    nearest = torch.logsumexp(scale * others, dim=1) / scale
    return target, nearest, ((target + nearest) / 2).detach()


def loss_at(dense: Dense, boundary, scale, margin, pull):
    target, nearest, middle = parts(dense, scale)
    own = (1 - pull) * middle + pull * boundary
    return (softplus(2 * scale * (own - target + margin)) / 2 + softplus(2 * scale * (nearest - own + margin)) / 2).mean()


def gb_cosface(dense: Dense, scale=32.0, margin=0.16, pull=0.15, share=0.01, least=0.5, most=0.7):
    return loss_at(dense, parts(dense, scale)[2].mean().clamp(least, most), scale, margin, pull)


CASES = [
    {},
    {"scale": 16.0, "margin": 0.1, "pull": 0.5, "least": -1.0, "most": 1.0},  # the first batch's own mean
    {"scale": 70.0, "pull": 0.0},
]


@pytest.mark.parametrize("parameters", CASES)
def test_equals_dense_float64(ranks, parameters):
    check(ranks, "gb_cosface", parameters, gb_cosface)
    check_finite("gb_cosface", parameters | {"scale": 64.0})
    check_finite("gb_cosface", parameters | {"scale": 64.0}, dtype="bfloat16")


def test_a_batch_sees_the_boundary_that_those_before_it_left(ranks):
    call = ("gb_cosface", {"least": -1.0}, torch.float64, 1.0, "random", {})
    (alone,) = steps([call])
    for of_rank in ranks(3).run(steps, [call]):
        assert error(of_rank[0]["tracked"]["boundary"], alone["tracked"]["boundary"]) < 1e-12

    features, labels, _ = data()
    classifier = PartialFC(23, 6, losses.build("gb_cosface", share=0.25), seed=3).double()
    included = torch.ones(23, dtype=torch.bool)
    dense = Dense(features.requires_grad_(), classifier.prototypes.detach(), labels, included, {}, labels)
    mean, boundary = parts(dense, 32.0)[2].mean(), torch.tensor(0.5, dtype=torch.float64)
    assert mean < 0.5  # so that it starts at `least`, and every batch pulls it below
    for _ in range(3):
        with torch.no_grad():
            assert error(classifier(features, labels), loss_at(dense, boundary, 32.0, 0.16, 0.15)) < 1e-12
        assert error(classifier(features, labels).detach(), loss_at(dense, boundary, 32.0, 0.16, 0.15).detach()) < 1e-12
        assert abs(classifier.tracked_boundary - (0.75 * boundary + 0.25 * mean)) < 1e-12


def test_one_class_is_finite():
    classifier = PartialFC(1, 4, losses.build("gb_cosface"))
    features = torch.randn(5, 4, requires_grad=True)
    loss = classifier(features, torch.zeros(5, dtype=torch.int64))
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all() and classifier.tracked_boundary.isfinite()


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"scale": -1.0}, "scale is -1.0, but must be positive"),
        ({"margin": -0.1}, "margin is -0.1, but must lie in"),
        ({"pull": 1.1}, "pull is 1.1, but must lie in"),
        ({"share": -0.1}, "share is -0.1, but must lie in"),
        ({"most": 1.5}, "most is 1.5, but must lie in"),
        ({"least": 0.8}, r"least is 0.8, but must lie in \[-1, 0.7\]"),
    ],
)
def test_bad_parameters_are_refused(parameters, sentence):
    with pytest.raises(ValueError, match=sentence):
        losses.build("gb_cosface", **parameters)
