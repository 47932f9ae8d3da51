"""Sums of losses."""

from __future__ import annotations

import pytest
import torch

from partial_fc import losses
from tests.partial_fc.losses.parity import Dense, check, check_finite, check_finite_differences, substituted_cosines
from tests.partial_fc.losses.test_gce import gce
from tests.partial_fc.losses.test_margins import cosface, cross_entropy
from tests.partial_fc.losses.test_thresholds import uss


def of_part(dense: Dense, name: str) -> Dense:
    learned = {key.removeprefix(f"{name}_"): value for key, value in dense.learned.items() if key.startswith(f"{name}_")}
    return dense._replace(learned=learned)


def unitsface(dense: Dense, scale, margin=0.4, sample_margin=0.1, threshold=None, weighting="sum"):
    total = cosface(dense, scale, margin) + uss(of_part(dense, "uss"), scale, sample_margin, threshold)
    return total if weighting == "sum" else total / 2


def weighted(dense: Dense, parts, weights):
    first, second, third = (dict(part) for part in parts)
    for part in (first, second, third):
        part.pop("name")
    terms = [gce(dense, **first), uss(of_part(dense, "1"), **second), uss(of_part(dense, "2"), **third)]
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


PARTS = {
    "parts": ({"name": "gce", "scale": 12.0}, {"name": "uss", "scale": 16.0}, {"name": "uss", "scale": 20.0, "threshold": 0.1}),
    "weights": (0.5, 2.0, 0.25),
}
CASES = [
    ("unitsface", {"scale": 16.0}, unitsface),
    ("unitsface", {"scale": 24.0, "margin": 0.2, "sample_margin": 0.0, "threshold": 0.2, "weighting": "average"}, unitsface),
    ("sum", PARTS, weighted),
]


@pytest.mark.parametrize(("name", "parameters", "oracle"), CASES)
def test_equals_dense_float64(ranks, name, parameters, oracle):
    check(ranks, name, parameters, oracle)
    check_finite(name, parameters)
    if name != "sum":  # GCE's threshold is detached
        check_finite_differences(name, parameters)


def test_unitsface_with_substitution(ranks):
    def oracle(dense: Dense, scale, margin, sample_margin):
        target, others = substituted_cosines(dense, 0.5)
        return cross_entropy(target - margin, others, scale) + uss(of_part(dense, "uss"), scale, sample_margin)

    check(ranks, "unitsface", {"scale": 16.0, "margin": 0.3, "sample_margin": 0.1}, oracle, substitution_rate=0.5)


def test_margins_of_all_parts_are_warmed_up():
    assert losses.build("unitsface").with_margins(0.5) == losses.build("unitsface", margin=0.2, sample_margin=0.05)
    parts = losses.build("sum", parts=({"name": "cosface", "margin": 0.4}, {"name": "gce"})).with_margins(0.5).parts
    assert parts[0]["margin"] == 0.2
    assert (parts[1]["target_margin"], parts[1]["non_target_margin"]) == (0.2, 0.025)
    assert losses.build("sum", parts=parts) == losses.build("sum", parts=parts)


@pytest.mark.parametrize(
    ("name", "parameters", "sentence"),
    [
        ("unitsface", {"weighting": "mean"}, "weighting is 'mean', but must be 'sum' or 'average'"),
        ("unitsface", {"sample_margin": -1.0}, "margin is -1.0, but must lie in"),
        ("sum", {"parts": ({"scale": 1.0},)}, "each part a 'name'"),
        ("sum", {"weights": (1.0,)}, "a sum of 2 parts got 1 weights"),
        ("sum", {"parts": ({"name": "cosfaze"},)}, "loss 'cosfaze' is unknown: did you mean 'cosface'?"),
    ],
)
def test_bad_parameters(name, parameters, sentence):
    with pytest.raises(ValueError, match=sentence.replace("?", r"\?")):
        losses.build(name, **parameters)


def test_learned_thresholds_of_parts_have_names_of_their_own():
    assert losses.build("sum", **PARTS).learned(10) == {"1_threshold": 0.0, "2_threshold": pytest.approx(2.0)}
    assert torch.is_tensor(losses.build("sum", parts=({"name": "gce", "queue": 4},)).tracked()["0_queue"])
