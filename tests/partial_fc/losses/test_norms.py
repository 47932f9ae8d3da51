"""Margins that depend on the feature norm, or on how rare an identity is."""

from __future__ import annotations

import math

import pytest
import torch

from partial_fc import PartialFC, losses
from partial_fc.losses.margins import angular
from tests.partial_fc.losses.parity import CLASSES, WIDTH, Dense, check, check_finite, check_finite_differences, cosines, data, step
from tests.partial_fc.losses.test_margins import cross_entropy


def added(target, margin):
    """cos(theta + margin), a margin per sample: falling past pi, 1 below 0."""
    angle = torch.arccos(target) + margin
    beyond = target - margin * torch.sin(margin)
    return torch.where(angle > math.pi, beyond, torch.cos(angle.clamp(min=0)))


def magface(dense: Dense, scale, lower_norm=10.0, upper_norm=110.0, lower_margin=0.45, upper_margin=0.8, weight=35.0, easy=False):
    target, others = cosines(dense)
    a = dense.features.norm(dim=1).clamp(lower_norm, upper_norm)
    phi = added(target, lower_margin + (upper_margin - lower_margin) * (a - lower_norm) / (upper_norm - lower_norm))
    if easy:
        phi = torch.where(target > 0, phi, target)
    return cross_entropy(phi, others, scale) + weight * (a / upper_norm**2 + 1 / a).mean()


def adaface(dense: Dense, scale, margin=0.4, concentration=0.333, share=0.01):
    """The first step: running figures move from 20 and 100."""
    target, others = cosines(dense)
    norms = dense.features.norm(dim=1).detach().clamp(0.001, 100)
    mean = share * norms.mean() + (1 - share) * 20
    deviation = share * norms.std() + (1 - share) * 100
    z = (concentration * (norms - mean) / (deviation + 0.001)).clamp(-1, 1)
    return cross_entropy(added(target, -margin * z) - (margin + margin * z), others, scale)


def frequency_margin(dense: Dense, scale, margin=0.5, common_margin=0.0, rarest=1, power=0.25):
    target, others = cosines(dense)
    counts = dense.counts[dense.labels].to(target.dtype)
    share = torch.where(counts < rarest, 1.0, (counts / rarest) ** -power)
    return cross_entropy(target - common_margin - (margin - common_margin) * share, others, scale)


NARROW = {"lower_norm": 2.0, "upper_norm": 5.0}  # than the norms in the data
CASES = [
    ("magface", {"scale": 16.0}, magface),
    ("magface", {"scale": 16.0, **NARROW, "weight": 3.0}, magface),
    ("magface", {"scale": 16.0, **NARROW, "lower_margin": 0.1, "upper_margin": 1.2, "easy": True}, magface),
    ("adaface", {"scale": 16.0}, adaface),
    ("adaface", {"scale": 16.0, "share": 1.0, "concentration": 1.0}, adaface),
    ("adaface", {"scale": 16.0, "margin": 0.9, "share": 0.9, "concentration": 3.0}, adaface),
    ("frequency_margin", {"scale": 16.0}, frequency_margin),
    ("frequency_margin", {"scale": 16.0, "margin": 0.6, "common_margin": 0.2, "rarest": 50, "power": 0.5}, frequency_margin),
]


@pytest.mark.parametrize(("name", "parameters", "oracle"), CASES)
def test_equals_dense_float64(ranks, name, parameters, oracle):
    check(ranks, name, parameters, oracle)
    check_finite(name, parameters | {"scale": 64.0})
    if name != "adaface":  # where z changes the value and has no gradient
        check_finite_differences(name, parameters)


def test_a_margin_per_sample_falls_with_the_angle():
    angle = torch.linspace(0, math.pi, 1001, dtype=torch.float64)
    for margin in (-0.4, 0.0, 0.4):
        phi = angular(torch.cos(angle), 1.0, torch.full_like(angle, margin))
        assert (phi.diff() <= 1e-12).all() and phi.max() <= 1
        torch.testing.assert_close(phi, angular(torch.cos(angle), 1.0, margin))
    torch.testing.assert_close(angular(torch.cos(angle), 1.0, -0.4 * torch.ones_like(angle)), torch.cos((angle - 0.4).clamp(min=0)))


def test_adaface_runs_its_figures_over_training_steps_alone():
    features, labels, _ = data()
    norms = features.norm(dim=1)
    classifier = PartialFC(CLASSES, WIDTH, losses.build("adaface", share=0.25), seed=3).double()
    mean, deviation = 20.0, 100.0
    for _ in range(3):
        classifier(features.clone().requires_grad_(), labels)
        with torch.no_grad():
            classifier(10 * features, labels)
        mean, deviation = 0.75 * mean + 0.25 * norms.mean(), 0.75 * deviation + 0.25 * norms.std()
    torch.testing.assert_close(classifier.tracked_norm_mean, mean)
    torch.testing.assert_close(classifier.tracked_norm_deviation, deviation)


def test_adaface_has_the_same_figures_on_every_rank(ranks):
    alone = step("adaface", {}, torch.float64, 1.0, "random", {})["tracked"]
    for result in ranks(3).run(step, "adaface", {}, torch.float64, 1.0, "random", {}):
        for key, value in result["tracked"].items():
            torch.testing.assert_close(value, alone[key], rtol=1e-12, atol=0)


def test_adaface_takes_a_batch_of_one():
    classifier = PartialFC(CLASSES, WIDTH, losses.build("adaface"), seed=3)
    features = torch.ones(1, WIDTH, requires_grad=True)
    classifier(features, torch.tensor([2])).backward()
    assert features.grad.isfinite().all() and classifier.tracked_norm_deviation == 99


def of_one_step(name, parameters):
    features, labels, counts = data()
    classifier = PartialFC(CLASSES, WIDTH, losses.build(name, **parameters), seed=3, class_counts=counts).double()
    loss = classifier(features.requires_grad_(), labels)
    loss.backward()
    return loss.detach(), features.grad, classifier.prototypes.grad


IDENTITIES = [
    ("magface", {"scale": 24.0, "lower_margin": 0.5, "upper_margin": 0.5, "weight": 0.0}, "arcface", {"scale": 24.0, "margin": 0.5}),
    ("adaface", {"scale": 24.0, "margin": 0.35, "concentration": 0.0}, "cosface", {"scale": 24.0, "margin": 0.35}),
    ("frequency_margin", {"scale": 24.0, "margin": 0.35, "power": 0.0}, "cosface", {"scale": 24.0, "margin": 0.35}),
    ("frequency_margin", {"scale": 24.0, "margin": 0.35, "rarest": 1000}, "cosface", {"scale": 24.0, "margin": 0.35}),
]


@pytest.mark.parametrize(("name", "parameters", "other", "other_parameters"), IDENTITIES)
def test_identities(name, parameters, other, other_parameters):
    for found, right in zip(of_one_step(name, parameters), of_one_step(other, other_parameters), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


REFUSED = [
    ("magface", {"lower_norm": 0.0}, "lower_norm is 0.0, but must lie in"),
    ("magface", {"upper_norm": 5.0}, "upper_norm is 5.0, but must be above lower_norm, which is 10.0"),
    ("magface", {"upper_margin": 2.0}, "upper_margin is 2.0, but must lie in"),
    ("magface", {"lower_margin": 0.9}, "lower_margin is 0.9, but must lie in"),
    ("magface", {"weight": -1.0}, "weight is -1.0, but must lie in"),
    ("adaface", {"scale": -1.0}, "scale is -1.0, but must be positive"),
    ("adaface", {"margin": 1.2}, "margin is 1.2, but must lie in"),
    ("adaface", {"concentration": -0.1}, "concentration is -0.1, but must lie in"),
    ("adaface", {"share": 1.5}, "share is 1.5, but must lie in"),
    ("frequency_margin", {"margin": -0.1}, "margin is -0.1, but must lie in"),
    ("frequency_margin", {"common_margin": 0.6}, "common_margin is 0.6, but must lie in"),
    ("frequency_margin", {"rarest": 0}, "rarest is 0, but must lie in"),
    ("frequency_margin", {"power": -1.0}, "power is -1.0, but must lie in"),
]


@pytest.mark.parametrize(("name", "parameters", "sentence"), REFUSED)
def test_refuses(name, parameters, sentence):
    with pytest.raises(ValueError, match=sentence):
        losses.build(name, **parameters)


def test_a_frequency_margin_needs_the_number_of_images():
    classifier = PartialFC(CLASSES, WIDTH, losses.build("frequency_margin"))
    with pytest.raises(ValueError, match="give PartialFC class_counts="):
        classifier(data()[0].float(), data()[1])
