"""Margins on the target similarity."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from tests.partial_fc.losses.parity import Dense, check, check_finite, check_finite_differences, cosines


def cross_entropy(phi, others, scale):
    """Softmax cross-entropy with the target's similarity phi [B] beside the others [B, C]."""
    logits = scale * torch.cat([phi[:, None], others], dim=1)
    return functional.cross_entropy(logits, torch.zeros(len(phi), dtype=torch.int64))


def cosface(dense: Dense, scale, margin):
    target, others = cosines(dense)
    return cross_entropy(target - margin, others, scale)


def combined(dense: Dense, scale, angle_factor, angle_margin, margin, slope="exact"):
    target, others = cosines(dense)
    angle = angle_factor * torch.arccos(target) + angle_margin
    beyond = target - angle_margin * math.sin(angle_margin) if angle_factor == 1 else -2 - torch.cos(angle)
    phi = torch.where(angle < math.pi, torch.cos(angle), beyond)
    if slope == "straight_through":
        phi = target + (phi - target).detach()
    return cross_entropy(phi - margin, others, scale)


def arcface(dense: Dense, scale, margin, slope="exact"):
    return combined(dense, scale, 1.0, margin, 0.0, slope)


CASES = [
    ("cosface", {"scale": 64.0, "margin": 0.4}, cosface),
    ("cosface", {"scale": 96.0, "margin": 0.1}, cosface),  # beyond what needs no maximum
    ("arcface", {"scale": 16.0, "margin": 0.5}, arcface),
    ("arcface", {"scale": 16.0, "margin": 0.5, "slope": "straight_through"}, arcface),
    ("combined", {"scale": 32.0, "angle_factor": 1.0, "angle_margin": 0.3, "margin": 0.2}, combined),
    ("combined", {"scale": 32.0, "angle_factor": 0.9, "angle_margin": 0.4, "margin": 0.15}, combined),
    ("combined", {"scale": 32.0, "angle_factor": 1.6, "angle_margin": 0.4, "margin": 0.0}, combined),
]


@pytest.mark.parametrize(("name", "parameters", "oracle"), CASES)
def test_equals_dense_float64(ranks, name, parameters, oracle):
    check(ranks, name, parameters, oracle)
    check_finite(name, parameters | {"scale": 64.0})
    if parameters.get("slope") != "straight_through":
        check_finite_differences(name, parameters)
