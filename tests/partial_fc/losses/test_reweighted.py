"""Hard non-targets, or the whole probability, weighed anew."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from partial_fc import PartialFC, losses
from partial_fc.losses.reweighted import curriculum, emphasis_on_hard, modulated
from tests.partial_fc.losses.parity import (
    Dense,
    check,
    check_finite,
    check_finite_differences,
    cosines,
    data,
    error,
    step,
    steps,
    substituted_cosines,
)
from tests.partial_fc.losses.test_margins import cross_entropy


def with_margin(target, margin, kind):
    if kind == "cosine":
        return target - margin
    angle = torch.arccos(target) + margin
    return torch.where(angle < math.pi, torch.cos(angle), target - margin * math.sin(margin))


def emphasised(others, limit, hardness, emphasis):
    hard = others * (hardness + 1) + hardness if emphasis == "adaptive" else others + hardness
    return torch.where(others > limit.detach()[:, None], hard, others)


def sv(dense: Dense, scale, margin=0.0, hardness=0.2, emphasis="adaptive", target="cosine"):
    own, others = cosines(dense)
    return cross_entropy(with_margin(own, margin, target), emphasised(others, own, hardness, emphasis), scale)


def mv(dense: Dense, scale, margin=0.35, hardness=0.2, emphasis="adaptive", target="cosine", easy=False):
    own, others = cosines(dense)
    phi = with_margin(own, margin, target)
    others = emphasised(others, phi, hardness, emphasis)
    return cross_entropy(torch.where(own > 0, phi, own) if easy else phi, others, scale)


def curricular(dense: Dense, scale, margin=0.5, share=0.01):
    own, others = cosines(dense)
    mean = share * own.detach().mean()  # the running mean starts at 0
    is_hard = others > torch.cos(torch.arccos(own.detach()) + margin)[:, None]
    return cross_entropy(with_margin(own, margin, "arc"), torch.where(is_hard, others * (mean + others), others), scale)


def search(dense: Dense, scale, modulation):
    own, others = cosines(dense)
    p = torch.exp(scale * own) / (torch.exp(scale * own) + torch.exp(scale * others).sum(dim=1))
    a = torch.tensor(modulation, dtype=p.dtype).reshape(-1)
    a = a[(torch.ceil(p.detach() * len(a)).long() - 1).clamp(min=0)]
    return -torch.log(p / (a * p + 1 - a)).mean()


CASES = [
    ("sv_softmax", {"scale": 16.0}, sv),
    ("sv_softmax", {"scale": 50.0, "margin": 0.3, "hardness": 0.4}, sv),  # 1.8 x 50 is beyond what needs no maximum
    ("sv_softmax", {"scale": 16.0, "margin": 0.3, "emphasis": "fixed", "target": "arc"}, sv),
    ("mv_softmax", {"scale": 16.0, "margin": 0.35}, mv),
    ("mv_softmax", {"scale": 16.0, "margin": 0.3, "hardness": 0.3, "emphasis": "fixed"}, mv),
    ("mv_softmax", {"scale": 60.0, "margin": 0.5, "target": "arc"}, mv),
    ("mv_softmax", {"scale": 16.0, "margin": 0.5, "target": "arc", "emphasis": "fixed", "easy": True}, mv),
    ("curricularface", {"scale": 16.0}, curricular),
    ("curricularface", {"scale": 64.0, "margin": 0.3, "share": 0.5}, curricular),
    ("search_softmax", {"scale": 8.0, "modulation": -50.0}, search),
    ("search_softmax", {"scale": 8.0, "modulation": (-20.0, -3.0, -5.0, 0.0)}, search),
]


@pytest.mark.parametrize(("name", "parameters", "oracle"), CASES)
def test_equals_dense_float64(ranks, name, parameters, oracle):
    check(ranks, name, parameters, oracle)
    check_finite(name, parameters | {"scale": 64.0})
    if name != "curricularface":  # its running mean has moved before the differences are taken
        check_finite_differences(name, parameters)


def test_the_comparison_is_with_a_target_that_is_a_sample_where_one_stands_in(ranks):
    def oracle(dense: Dense, scale):
        own, others = substituted_cosines(dense, 0.5)
        return cross_entropy(own - 0.35, emphasised(others, own - 0.35, 0.2, "adaptive"), scale)

    for kernel in ("chunked", "reference"):
        check(ranks, "mv_softmax", {"scale": 16.0}, oracle, substitution_rate=0.5, kernel=kernel)


@pytest.mark.parametrize("name", ["sv_softmax", "mv_softmax", "curricularface", "search_softmax"])
def test_bfloat16_is_finite(name):
    check_finite(name, {"scale": 64.0}, dtype="bfloat16")


@pytest.mark.parametrize("parameter", [-1.0, 0.0, 0.9])
def test_maps_reach_their_bound_and_no_further(parameter):
    grid, limit = torch.linspace(-1, 1, 401, dtype=torch.float64)[None], torch.full((1, 1), parameter, dtype=torch.float64)
    for kind in ("adaptive", "fixed"):
        map = emphasis_on_hard(0.3, kind, torch.zeros(1))
        assert abs(map.function(grid, limit).abs().max() - map.bound) < 1e-12
    for mean in (-1.0, 0.3, 1.0):
        map = curriculum(torch.tensor(mean), torch.zeros(1))
        assert map.function(grid, limit).abs().max() <= map.bound
    assert curriculum(torch.tensor(1.0), torch.zeros(1)).function(grid, limit).max() == curriculum(torch.tensor(1.0), torch.zeros(1)).bound


@given(st.integers(0, 10**6), st.floats(-1, 1), st.sampled_from(["adaptive", "fixed", "curriculum"]))
def test_maps_in_place_are_their_functions(seed, mean, kind):
    generator = torch.Generator().manual_seed(seed)
    cosines, limits = (2 * torch.rand(5, columns, generator=generator, dtype=torch.float64) - 1 for columns in (9, 1))
    limit = limits[:, 0]
    map = curriculum(torch.tensor(mean), limit) if kind == "curriculum" else emphasis_on_hard(0.3, kind, limit)
    mapped, slope = map.with_slope(cosines.clone())
    found, found_slope = map.with_slope(cosines.clone(), memory=(torch.full_like(cosines, 7), torch.full_like(cosines, 7)))
    torch.testing.assert_close(found, mapped, rtol=0, atol=1e-14)
    torch.testing.assert_close(found_slope, slope, rtol=0, atol=1e-14)


def same(one, other):
    return max(error(one[key], other[key]) for key in ("loss", "features", "prototypes"))


def one_step(name, **parameters):
    return step(name, parameters, torch.float64, 1.0, "random", {})


@pytest.mark.parametrize("emphasis", ["adaptive", "fixed"])
def test_without_hardness_they_are_their_base(emphasis):
    plain = {"hardness": 0.0, "emphasis": emphasis}
    assert same(one_step("mv_softmax", scale=32.0, margin=0.35, **plain), one_step("cosface", scale=32.0, margin=0.35)) < 1e-12
    assert same(one_step("sv_softmax", scale=32.0, margin=0.35, **plain), one_step("cosface", scale=32.0, margin=0.35)) < 1e-12
    assert same(one_step("mv_softmax", margin=0.5, target="arc", **plain), one_step("arcface", scale=32.0, margin=0.5)) < 1e-12


def test_one_modulation_is_a_margin():
    a = 1 - math.exp(32.0 * 0.35)
    assert same(one_step("search_softmax", modulation=a), one_step("cosface", scale=32.0, margin=0.35)) < 1e-12
    assert same(one_step("search_softmax", modulation=0.0), one_step("cosface", scale=32.0, margin=0.0)) < 1e-12


@pytest.mark.parametrize("scale", [16.0, 64.0])
@pytest.mark.parametrize("kind", ["cosine", "arc"])
def test_a_modulation_for_each_sample_is_any_margin(scale, kind):
    features, labels, _ = data()
    prototypes = torch.randn(23, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    dense = Dense(features.requires_grad_(), prototypes, labels, torch.ones(23, dtype=torch.bool), {}, labels)
    own, others = cosines(dense)
    phi = with_margin(own, 0.4, kind)
    plain = functional.softplus(torch.logsumexp(scale * others, dim=1) - scale * own, threshold=40.0)
    found = modulated(plain, 1 - torch.exp(scale * (own - phi))).mean()
    right = cross_entropy(phi, others, scale)
    assert error(found.detach(), right.detach()) < 1e-12
    gradients = [torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in (found, right)]
    assert error(*gradients) < 1e-9


def test_modulation_keeps_small_losses_and_large_ones():
    plain = torch.tensor([1e-30, 1e-12, 1e-3, 1.0, 120.0], requires_grad=True)
    loss = modulated(plain, -8000.0)
    loss.sum().backward()
    exact = plain.detach().double()
    right = exact + torch.log1p(8000 * -torch.expm1(-exact))
    assert torch.allclose(loss.detach().double(), right, rtol=1e-6, atol=0)
    assert plain.grad[0] == 8001 and plain.grad[-1] == 1


def test_the_running_mean_moves_in_training_alone_and_alike_on_every_rank(ranks):
    call = ("curricularface", {"share": 0.25}, torch.float64, 1.0, "random", {})
    (alone,) = steps([call])
    for of_rank in ranks(3).run(steps, [call]):
        assert error(of_rank[0]["tracked"]["mean_target"], alone["tracked"]["mean_target"]) < 1e-12

    features, labels, _ = data()
    classifier = PartialFC(23, 6, losses.build("curricularface", share=0.25), seed=3).double()
    own = cosines(Dense(features, classifier.prototypes.detach(), labels, torch.ones(23, dtype=torch.bool), {}, labels))[0].mean()
    with torch.no_grad():
        classifier(features, labels)
    assert classifier.tracked_mean_target == 0
    for moved in (0.25, 0.25 + 0.75 * 0.25):
        classifier(features.requires_grad_(), labels)
        assert abs(classifier.tracked_mean_target - moved * own) < 1e-12


BAD = [
    ("sv_softmax", {"scale": 0.0}, "scale is 0.0, but must be positive"),
    ("sv_softmax", {"hardness": -0.1}, "hardness is -0.1, but must lie in"),
    ("sv_softmax", {"margin": 1.7, "target": "arc"}, "margin is 1.7.*an angle in radians"),
    ("mv_softmax", {"margin": -0.1}, "margin is -0.1, but must lie in"),
    ("mv_softmax", {"target": "angle"}, "target is 'angle', but must be 'cosine' or 'arc'"),
    ("mv_softmax", {"emphasis": "none"}, "emphasis is 'none', but must be 'adaptive' or 'fixed'"),
    ("curricularface", {"margin": 2.0}, "margin is 2.0.*an angle in radians"),
    ("curricularface", {"share": 1.5}, "share is 1.5, but must lie in"),
    ("search_softmax", {"scale": math.inf}, "scale is inf, but must be positive"),
    ("search_softmax", {"modulation": 0.5}, "modulation is 0.5, but must be negative, or 0"),
    ("search_softmax", {"modulation": (-1.0, math.nan)}, "modulation is nan, but must be negative, or 0"),
    ("search_softmax", {"modulation": ()}, "modulation is empty"),
]


@pytest.mark.parametrize(("name", "parameters", "sentence"), BAD)
def test_bad_parameters_are_refused(name, parameters, sentence):
    with pytest.raises(ValueError, match=sentence):
        losses.build(name, **parameters)
