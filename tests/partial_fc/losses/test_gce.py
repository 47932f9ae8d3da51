"""GCE: against loops over all samples and pairs, against numbers of another program, on ranks, with its queue."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_fc import PartialFC, losses
from partial_fc.losses.global_thresholds import log_sum_of_others
from tests.partial_fc.losses.parity import CLASSES, Dense, check, check_finite, check_finite_differences, cosines, data, substituted_cosines


def gce_of(target, others, labels, parameters):
    """The formula of docs/losses-reference.md, sample by sample."""
    chosen = {"target_margin": 0.4, "non_target_margin": 0.05, "out_sample_weight": 1.0, "alpha": 0.5, "out_samples": "mean"}
    chosen |= {"out_sample_gradient": False} | parameters
    scale, weight = chosen["scale"], chosen["out_sample_weight"]
    total = 0.0
    for i, label in enumerate(labels.tolist()):
        foreign = [k for k, other in enumerate(labels.tolist()) if other != label]
        below, above = torch.exp(scale * others[i]).sum(), torch.exp(-scale * target[i])
        all_below, all_above = below, above
        if foreign and weight:
            share = weight / len(foreign) if chosen["out_samples"] == "mean" else weight
            out_below, out_above = share * torch.exp(scale * others[foreign]).sum(), share * torch.exp(-scale * target[foreign]).sum()
            keep = chosen["out_sample_gradient"]
            all_below = below + (out_below if keep else out_below.detach())
            all_above = above + (out_above if keep else out_above.detach())
        correct = torch.exp(scale * (target[i] - chosen["target_margin"]))
        first = -torch.log(correct / (correct + all_below))
        second = torch.log(1 + math.exp(scale * chosen["non_target_margin"]) * below * all_above)
        total = total + chosen["alpha"] * first + (1 - chosen["alpha"]) * second
    return total / len(labels)


def gce(dense: Dense, **parameters):
    return gce_of(*cosines(dense), dense.labels, parameters)


CASES = [
    {"scale": 16.0},
    {"scale": 8.0, "out_sample_gradient": True},
    {"scale": 16.0, "out_sample_gradient": True, "out_samples": "sum", "out_sample_weight": 0.3, "alpha": 0.7},
    {"scale": 12.0, "out_sample_weight": 5.0, "target_margin": 0.2, "non_target_margin": 0.0},
]


@pytest.mark.parametrize("parameters", CASES)
def test_equals_dense_float64(ranks, parameters):
    check(ranks, "gce", parameters, gce)
    check_finite("gce", parameters | {"scale": 64.0})
    if parameters.get("out_sample_gradient"):
        check_finite_differences("gce", parameters)


def test_with_substitution(ranks):
    def substituted(dense: Dense, **parameters):
        return gce_of(*substituted_cosines(dense, 0.5), dense.labels, parameters)

    for parameters in ({"scale": 16.0}, {"scale": 12.0, "out_sample_gradient": True}):
        check(ranks, "gce", parameters, substituted, substitution_rate=0.5)


@pytest.mark.parametrize(
    ("weight", "out_samples", "scale", "expected"),
    [
        (0.0, "mean", 4.0, 4.5754572883),
        (1.0, "mean", 4.0, 6.0331035174),
        (1.0, "mean", 16.0, 20.8767540530),
        (0.3, "mean", 16.0, 20.0448865375),
        (1.0, "sum", 16.0, 22.6276573434),
    ],
)
def test_numbers_of_another_program(weight, out_samples, scale, expected):
    """Of a dense float64 program written apart from this one, with the same random numbers."""
    generator = np.random.default_rng(0)
    features, prototypes, labels = generator.normal(size=(10, 6)), generator.normal(size=(17, 6)), generator.integers(0, 17, 10)
    labels[3], labels[7] = labels[0], labels[1]
    options = {"scale": scale, "target_margin": 0.35, "non_target_margin": 0.1, "out_sample_weight": weight, "out_samples": out_samples}
    classifier = PartialFC(17, 6, losses.build("gce", **options)).double()
    classifier.prototypes.data.copy_(torch.from_numpy(prototypes))
    loss = classifier(torch.from_numpy(features), torch.from_numpy(labels))
    assert loss.item() == pytest.approx(expected, abs=1e-9)


def test_without_other_samples_and_with_equal_margins_it_is_cosface():
    features, labels, _ = data()
    found = []
    equal_margins = {"target_margin": 0.3, "non_target_margin": 0.3, "out_sample_weight": 0.0}
    for name, parameters in (("gce", equal_margins), ("cosface", {"margin": 0.3})):
        classifier = PartialFC(CLASSES, 6, losses.build(name, scale=20.0, **parameters), seed=3).double()
        x = features.clone().requires_grad_()
        loss = classifier(x, labels)
        loss.backward()
        found.append((loss.detach(), x.grad, classifier.prototypes.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def queue_steps(queue):
    """On every rank: losses of three steps on different rows of the data."""
    import torch.distributed as dist

    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    features, labels, _ = data()
    classifier = PartialFC(CLASSES, 6, losses.build("gce", scale=16.0, queue=queue), seed=3).double()
    found = []
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        x, y = features[rows].chunk(size)[rank].clone().requires_grad_(), labels[rows].chunk(size)[rank]
        loss = classifier(x, y)
        with torch.no_grad():
            classifier(features[:1], labels[:1])  # a validation loss leaves no trace
        found.append(loss.detach())
    return found


@pytest.mark.parametrize("queue", [3, 6, 100])
def test_queue_makes_earlier_samples_other_samples(ranks, queue):
    features, labels, _ = data()
    prototypes = PartialFC(CLASSES, 6, losses.build("gce"), seed=3).double().prototypes.detach()
    kept_t, kept_a, kept_y, expected = [], [], [], []
    for first in (0, 4, 8):
        x, y = features[first : first + 4], labels[first : first + 4]
        dense = Dense(x, prototypes, y, torch.ones(CLASSES, dtype=torch.bool), {}, torch.ones(CLASSES))
        target, others = cosines(dense)
        below = torch.logsumexp(16.0 * others, dim=1)
        total = 0.0
        for i in range(4):
            pool = [(target[k], below[k], int(y[k])) for k in range(4)] + list(zip(kept_t, kept_a, kept_y, strict=True))
            foreign = [(t, a) for t, a, label in pool if label != int(y[i])]
            a_out = torch.logsumexp(torch.stack([a for _, a in foreign]), 0) - math.log(len(foreign))
            r_out = torch.logsumexp(torch.stack([-16.0 * t for t, _ in foreign]), 0) - math.log(len(foreign))
            u1 = torch.logaddexp(below[i], a_out) - 16.0 * (target[i] - 0.4)
            u2 = below[i] + 16.0 * 0.05 + torch.logaddexp(-16.0 * target[i], r_out)
            total += 0.5 * (torch.log1p(torch.exp(u1)) + torch.log1p(torch.exp(u2)))
        expected.append(total / 4)
        kept_t, kept_a, kept_y = [*target, *kept_t][:queue], [*below, *kept_a][:queue], [*y.tolist(), *kept_y][:queue]
    for result in [queue_steps(queue), *ranks(2).run(queue_steps, queue)]:
        torch.testing.assert_close(torch.stack(result), torch.stack(expected), rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-1, 3), st.floats(-80, 80)), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
)
def test_log_sum_of_others(pool, mine):
    labels, values = torch.tensor([label for label, _ in pool]), torch.tensor([value for _, value in pool], dtype=torch.float64)
    found, counts = log_sum_of_others(values, labels, torch.tensor(mine))
    for label, value, count in zip(mine, found, counts, strict=True):
        others = values[(labels != label) & (labels >= 0)]
        assert int(count) == len(others)
        if len(others):
            torch.testing.assert_close(value, torch.logsumexp(others, 0), rtol=1e-12, atol=1e-12)
        else:
            assert value < -1e29


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"alpha": 1.5}, "alpha is 1.5, but must lie in"),
        ({"out_sample_weight": -1.0}, "out_sample_weight is -1.0, but must lie in"),
        ({"out_samples": "max"}, "out_samples is 'max', but must be 'mean' or 'sum'"),
        ({"queue": -5}, "queue is -5, but must lie in"),
        ({"scale": 0.0}, "scale is 0.0, but must be positive"),
    ],
)
def test_bad_parameters(parameters, sentence):
    with pytest.raises(ValueError, match=sentence):
        losses.build("gce", **parameters)
