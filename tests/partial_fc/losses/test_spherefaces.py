"""Plain softmax and the SphereFace family."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from partial_fc import PartialFC, losses
from partial_fc.losses.spherefaces import falling_cosine
from tests.partial_fc.losses.parity import CLASSES, WIDTH, Dense, check, check_finite, check_finite_differences, cosines, data, normalize
from tests.partial_fc.losses.test_margins import cross_entropy


def softmax(dense: Dense):
    logits = (dense.features @ dense.prototypes.T).masked_fill(~dense.included, -torch.inf)
    return functional.cross_entropy(logits, dense.labels)


def normalized_softmax(dense: Dense):
    logits = (dense.features @ normalize(dense.prototypes).T).masked_fill(~dense.included, -torch.inf)
    return functional.cross_entropy(logits, dense.labels)


def straight_through(phi, target, slope):
    return phi if slope == "exact" else target + (phi - target).detach()


def sphereface(dense: Dense, angle_factor=4, first_lambda=1000.0, least_lambda=5.0, slope="exact"):
    """The first step: lambda is at its first value."""
    target, others = cosines(dense)
    angle = torch.arccos(target)
    k = (angle_factor * angle / math.pi).floor().detach()
    psi = (-1) ** k * torch.cos(angle_factor * angle) - 2 * k
    weight = max(least_lambda, first_lambda)
    phi = straight_through((weight * target + psi) / (1 + weight), target, slope)
    return cross_entropy(phi, others, dense.features.norm(dim=1)[:, None])


def sphereface_r(dense: Dense, scale, angle_factor=1.5, version="v1", slope="straight_through"):
    target, others = cosines(dense)
    if version == "v1":
        target = straight_through(torch.cos((angle_factor * torch.arccos(target)).clamp(max=math.pi)), target, slope)
    else:
        is_other = others > -torch.inf
        finite = others.where(is_other, 0)
        mapped = straight_through(torch.cos(torch.arccos(finite) / angle_factor), finite, slope)
        others = mapped.masked_fill(~is_other, -torch.inf)
    return cross_entropy(target, others, scale)


CASES = [
    ("softmax", {}, softmax),
    ("normalized_softmax", {}, normalized_softmax),
    ("sphereface", {}, sphereface),
    ("sphereface", {"first_lambda": 2.0, "least_lambda": 0.0}, sphereface),
    ("sphereface", {"angle_factor": 3, "first_lambda": 0.0, "least_lambda": 0.0}, sphereface),
    ("sphereface", {"first_lambda": 1.0, "least_lambda": 3.0, "slope": "straight_through"}, sphereface),
    ("sphereface_r", {"scale": 16.0}, sphereface_r),
    ("sphereface_r", {"scale": 16.0, "slope": "exact"}, sphereface_r),
    ("sphereface_r", {"scale": 16.0, "version": "v2"}, sphereface_r),
    ("sphereface_r", {"scale": 16.0, "version": "v2", "angle_factor": 1.3, "slope": "exact"}, sphereface_r),
]


@pytest.mark.parametrize(("name", "parameters", "oracle"), CASES)
def test_equals_dense_float64(ranks, name, parameters, oracle):
    check(ranks, name, parameters, oracle)
    check_finite(name, parameters | {"scale": 64.0} if "scale" in parameters else parameters)
    slope = parameters.get("slope", "straight_through" if name == "sphereface_r" else "exact")
    if slope == "exact":
        check_finite_differences(name, parameters)


def of_one_step(name, parameters):
    """(loss, its gradients by features and prototypes) in float64."""
    features, labels, _ = data()
    classifier = PartialFC(CLASSES, WIDTH, losses.build(name, **parameters), seed=3).double()
    loss = classifier(features.requires_grad_(), labels)
    loss.backward()
    return loss.detach(), features.grad, classifier.prototypes.grad


PLAIN = {"angle_factor": 1, "slope": "exact"}
IDENTITIES = [
    ("sphereface", {"angle_factor": 1}, "normalized_softmax", {}),
    ("sphereface", {"angle_factor": 1, "first_lambda": 0.0, "least_lambda": 0.0}, "normalized_softmax", {}),
    ("sphereface_r", {"scale": 24.0, "version": "v1", **PLAIN}, "cosface", {"scale": 24.0, "margin": 0.0}),
    ("sphereface_r", {"scale": 24.0, "version": "v2", **PLAIN}, "cosface", {"scale": 24.0, "margin": 0.0}),
    ("combined", {"scale": 24.0, "angle_factor": 1.0, "angle_margin": 0.0, "margin": 0.35}, "cosface", {"scale": 24.0, "margin": 0.35}),
    ("combined", {"scale": 24.0, "angle_factor": 1.0, "angle_margin": 0.5, "margin": 0.0}, "arcface", {"scale": 24.0, "margin": 0.5}),
]


@pytest.mark.parametrize(("name", "parameters", "other", "other_parameters"), IDENTITIES)
def test_identities(name, parameters, other, other_parameters):
    for found, right in zip(of_one_step(name, parameters), of_one_step(other, other_parameters), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
def test_psi_falls_with_the_angle_without_a_jump(factor):
    angle = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    cosine = torch.cos(angle).requires_grad_()
    psi = falling_cosine(cosine, factor)
    (slope,) = torch.autograd.grad(psi.sum(), cosine)
    steps = psi.detach().diff()
    assert (steps <= 1e-12).all() and (steps > -factor * math.pi / 1900).all()
    assert (slope >= -1e-9).all() and slope.isfinite().all()
    torch.testing.assert_close(psi[[0, -1]].detach(), torch.tensor([1.0, 1.0 - 2 * factor], dtype=torch.float64))


def test_the_margin_comes_in_as_steps_go_by():
    features, labels, _ = data()
    classifier = PartialFC(CLASSES, WIDTH, losses.build("sphereface", least_lambda=0.5), seed=3).double()

    def at(step):
        classifier.step = step
        with torch.no_grad():
            return classifier(features, labels)

    weights = [1000 / (1 + 0.12 * 1000), 0.5]
    for step, weight in zip((1000, 10**6), weights, strict=True):
        fixed = of_one_step("sphereface", {"first_lambda": weight, "least_lambda": 0.0})[0]
        torch.testing.assert_close(at(step), fixed, rtol=1e-12, atol=0)
    assert at(0) < at(1000) < at(10**6)


def test_the_step_of_micro_batches_is_that_of_one_batch():
    features, labels, _ = data()
    classifier = PartialFC(CLASSES, WIDTH, losses.build("sphereface", least_lambda=0.0, first_lambda=1.0), 0.4, seed=3).double()
    right = classifier(features.clone().requires_grad_(), labels)
    classifier.step = 0
    classifier.begin_step(labels)
    torch.testing.assert_close(classifier(features.clone().requires_grad_(), labels), right, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["softmax", "normalized_softmax", "sphereface"])
def test_a_feature_without_direction_is_no_fault(name):
    features, labels, _ = data()
    features[4] = 0
    features = features.float().requires_grad_()
    classifier = PartialFC(CLASSES, WIDTH, losses.build(name), seed=3)
    loss = classifier(features, labels)
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all() and not features.grad[4].any()


REFUSED = [
    ("sphereface", {"angle_factor": 1.5}, "angle_factor is 1.5, but must be a whole number"),
    ("sphereface", {"angle_factor": 0}, "angle_factor is 0, but must lie in"),
    ("sphereface", {"least_lambda": -1.0}, "least_lambda is -1.0, but must lie in"),
    ("sphereface", {"first_lambda": math.nan}, "first_lambda is nan, but must lie in"),
    ("sphereface", {"lambda_decay": -0.1}, "lambda_decay is -0.1, but must lie in"),
    ("sphereface", {"slope": "caffe"}, "slope is 'caffe', but must be"),
    ("sphereface_r", {"scale": 0.0}, "scale is 0.0, but must be positive"),
    ("sphereface_r", {"angle_factor": 0.5}, "angle_factor is 0.5, but must lie in"),
    ("sphereface_r", {"version": "v3"}, "version is 'v3', but must be 'v1' or 'v2'"),
    ("sphereface_r", {"slope": "none"}, "slope is 'none', but must be"),
]


@pytest.mark.parametrize(("name", "parameters", "sentence"), REFUSED)
def test_refuses(name, parameters, sentence):
    with pytest.raises(ValueError, match=sentence):
        losses.build(name, **parameters)
