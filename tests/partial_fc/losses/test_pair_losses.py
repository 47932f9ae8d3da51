"""Losses on all pairs of the batch."""

from __future__ import annotations

import pytest
import torch

from partial_fc import PartialFC, losses
from tests.partial_fc.losses.parity import Dense, check, check_finite, check_finite_differences, cosines, data, normalize, step
from tests.partial_fc.losses.test_margins import cosface, cross_entropy


def pairs(dense: Dense):
    """(unit features, positive pairs, negative pairs), bool [B, B] with both orders of a pair."""
    same = dense.labels[:, None] == dense.labels
    return normalize(dense.features), same & ~torch.eye(len(same), dtype=torch.bool), ~same


def euclidean(units):
    difference = units[:, None] - units[None, :]
    square = difference.square().sum(dim=2)
    return (square + torch.eye(len(units), dtype=square.dtype)).sqrt()  # the diagonal, which no loss uses, would have an infinite slope


def contrastive(dense: Dense, positive_margin=0.0, negative_margin=1.0):
    units, positive, negative = pairs(dense)
    distance = euclidean(units)
    far = (distance[positive] - positive_margin).clamp(min=0) ** 2
    near = (negative_margin - distance[negative]).clamp(min=0) ** 2
    return far.mean() / 2 + near.mean() / 2


def triplet(dense: Dense, margin=0.2, distance="squared"):
    units, positive, negative = pairs(dense)
    found = euclidean(units) ** (2 if distance == "squared" else 1)
    each = [found[i][positive[i]].max() - found[i][negative[i]].min() + margin for i in range(len(units)) if positive[i].any()]
    return torch.stack(each).clamp(min=0).mean()


def unpg(dense: Dense, scale, margin, base="cosface", whisker=1.5):
    target, others = cosines(dense)
    units, _, negative = pairs(dense)
    found = (units @ units.T)[negative.triu(1)]
    low, high = torch.quantile(found.detach(), torch.tensor([0.25, 0.75], dtype=found.dtype))
    found = found[(found >= low - whisker * (high - low)) & (found <= high + whisker * (high - low))]
    phi = target - margin if base == "cosface" else torch.cos(torch.arccos(target) + margin)
    return cross_entropy(phi, torch.cat([others, found.expand(len(target), -1)], dim=1), scale)


def anchorface(dense: Dense, scale, margin, far=1e-3, tau=0.01, far_weight=1000.0, tar_weight=1.0):
    units, positive, negative = pairs(dense)
    found = units @ units.T
    threshold = torch.quantile(found[negative.triu(1)].detach(), 1 - far)
    accepted = torch.sigmoid((found - threshold) / tau)
    pair_terms = far_weight * accepted[negative].mean() + tar_weight * (1 - accepted[positive].mean())
    return cosface(dense, scale, margin) + pair_terms


CASES = [
    ("contrastive", {}, contrastive),
    ("contrastive", {"positive_margin": 0.5, "negative_margin": 1.5}, contrastive),
    ("triplet", {}, triplet),
    ("triplet", {"margin": 0.3, "distance": "euclidean"}, triplet),
    ("unpg", {"scale": 16.0, "margin": 0.3}, unpg),
    ("unpg", {"scale": 16.0, "margin": 0.3, "whisker": 0.2}, unpg),
    ("unpg", {"scale": 80.0, "margin": 0.2, "whisker": float("inf")}, lambda dense, **fields: unpg(dense, **{**fields, "whisker": 1e9})),
    ("unpg", {"scale": 16.0, "margin": 0.2, "base": "arcface"}, unpg),
    ("anchorface", {"scale": 16.0, "margin": 0.3, "far": 0.1, "tau": 0.1, "far_weight": 10.0, "tar_weight": 2.0}, anchorface),
    ("anchorface", {"scale": 16.0, "margin": 0.3}, anchorface),
]


@pytest.mark.parametrize(("name", "parameters", "oracle"), CASES)
def test_equals_dense_float64(ranks, name, parameters, oracle):
    check(ranks, name, parameters, oracle)
    check_finite(name, parameters | ({"scale": 64.0} if "scale" in parameters else {}))
    if name != "anchorface":  # its threshold depends on the features and has no gradient
        check_finite_differences(name, parameters)


@pytest.mark.parametrize("name", ["contrastive", "triplet", "sample_softmax", "n_plus_1_tuplet", "range"])
def test_no_positive_and_no_negative_is_nothing(name):
    """13 identities of one image, and where a loss has no other term than that of negatives, 13 images of one identity."""
    features = data()[0].requires_grad_()
    for labels in (torch.arange(13), torch.full((13,), 4)):
        classifier = PartialFC(23, 6, losses.build(name)).double()
        features.grad = None
        loss = classifier(features, labels)
        loss.backward()
        assert loss.isfinite() and features.grad.isfinite().all()
        if name in ("triplet", "sample_softmax", "n_plus_1_tuplet"):
            assert loss == 0 and not features.grad.any()


def test_pairs_leave_a_base_alone_where_there_are_none():
    """With one identity UNPG is CosFace, and so are AnchorFace and IntraLoss without their term for positives."""
    values = {}
    for name, fields in (("cosface", {}), ("unpg", {}), ("anchorface", {"tar_weight": 0.0}), ("intra", {"intra_weight": 0.0})):
        loss = losses.build(name, scale=16.0, margin=0.4, **fields)
        values[name] = PartialFC(23, 6, loss, seed=3).double()(data()[0], torch.full((13,), 4)).item()
    assert max(values.values()) - min(values.values()) < 1e-12


def test_equal_features_have_finite_gradients():
    result = step("triplet", {"distance": "euclidean", "margin": 0.5}, torch.float32, 1.0, "right", {})
    assert result["features"].isfinite().all()


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("contrastive", {"positive_margin": -1.0}, "positive_margin is -1.0, but must lie in [0, 2]: it is a distance"),
        ("contrastive", {"negative_margin": 2.1}, "negative_margin is 2.1, but must lie in [0, 2]"),
        ("triplet", {"margin": -0.2}, "margin is -0.2, but must lie in [0, 4]"),
        ("triplet", {"distance": "cosine"}, "distance is 'cosine', but must be 'squared' or 'euclidean'"),
        ("unpg", {"scale": 0.0}, "scale is 0.0, but must be positive"),
        ("unpg", {"base": "softmax"}, "base is 'softmax', but must be 'cosface' or 'arcface'"),
        ("unpg", {"base": "arcface", "margin": 1.9}, "margin is 1.9, but must lie in [0, 1.57]: it is an angle"),
        ("unpg", {"margin": 2.5}, "margin is 2.5, but must lie in [0, 2]: cosines"),
        ("unpg", {"whisker": -1.0}, "whisker is -1.0, but must lie in [0, inf]"),
        ("anchorface", {"scale": 0.0}, "scale is 0.0, but must be positive"),
        ("anchorface", {"margin": 3.0}, "margin is 3.0, but must lie in [0, 2]"),
        ("anchorface", {"far": 1.5}, "far is 1.5, but must lie in [0, 1]: it is a share"),
        ("anchorface", {"tau": 0.0}, "tau is 0.0, but must lie in [0.0001, 2]"),
        ("anchorface", {"far_weight": -1.0}, "far_weight is -1.0, but must lie in [0, inf]"),
        ("anchorface", {"tar_weight": -1.0}, "tar_weight is -1.0, but must lie in [0, inf]"),
    ],
)
def test_bad_parameters_end_in_a_sentence(name, parameters, message):
    with pytest.raises(ValueError) as caught:
        losses.build(name, **parameters)
    assert message in str(caught.value)
