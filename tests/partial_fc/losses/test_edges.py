"""Losses with options of the classifier and batches at the edge."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch

from partial_fc import PartialFC, RowSGD, losses
from partial_fc.losses import register
from tests.partial_fc.losses.parity import CLASSES, WIDTH, data


def classifier_of(name, parameters=None, **options):
    _, _, counts = data()
    return PartialFC(CLASSES, WIDTH, losses.build(name, **(parameters or {})), seed=3, class_counts=counts, **options)


def batch():
    features, labels, _ = data()
    return features.float().requires_grad_(), labels


OPTIONS = {
    "corrected rate, prototypes in bfloat16": {"sample_rate": 0.4, "correct_rate": True, "storage_dtype": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16", "gather_dtype": "bfloat16"},
    "substitution": {"substitution_rate": 0.5, "sample_rate": 0.6},
    "substitution from the bank": {"substitution_rate": 0.5, "substitution_source": "bank"},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", sorted(losses.REGISTRY))
def test_every_loss_trains_with_every_option(name, option):
    if name == "broadface" and "substitution_rate" in OPTIONS[option]:
        pytest.skip("refuses substitution")
    if name in ("uce", "sphereface2") and "correct_rate" in OPTIONS[option]:
        pytest.skip("refuses the correction of log-sum-exps")
    classifier = classifier_of(name, {"queue": 30} if name == "broadface" else None, **OPTIONS[option])
    optimizer = RowSGD(classifier, lr=0.01)
    for _ in range(3):
        features, labels = batch()
        loss = classifier(features, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite() and features.grad.isfinite().all()
    assert all(parameter.isfinite().all() for parameter in classifier.parameters())


@pytest.mark.parametrize("name", sorted(losses.REGISTRY))
def test_mixed_precision_around_the_loop_changes_no_loss(name):
    """torch.autocast turns products into bfloat16, in backward too if that lies within it."""
    found = []
    for is_mixed in (False, True):
        classifier = classifier_of(name)
        features, labels = batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            loss = classifier(features, labels)
            loss.backward()
        found.append([loss, features.grad, *(parameter.grad for parameter in classifier.parameters() if parameter.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("name", sorted(losses.REGISTRY))
def test_deterministic_algorithms_train_twice_to_the_same_bits(name, rate):
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            classifier = classifier_of(name, sample_rate=rate)
            optimizer = RowSGD(classifier, lr=0.01)
            for _ in range(3):
                features, labels = batch()
                classifier(features, labels).backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append([features.grad, *classifier.parameters(), *classifier.buffers()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["uss", "unitsface", "sample_bce"])
def test_a_batch_of_one_identity_does_not_start_a_threshold(name):
    classifier = classifier_of(name)
    features, labels = batch()
    classifier(features, torch.full_like(labels, 4))
    (threshold,) = classifier.learned.values()
    assert not threshold.any()
    classifier(features, labels)
    assert (threshold > 0).all()


def test_the_correction_of_the_rate_does_not_rank_nearest_prototypes():
    found = []
    for correct in (False, True):
        classifier = classifier_of("npt", {"k": 2}, sample_rate=0.4, correct_rate=correct)
        found.append(classifier(*batch()).item())
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["uce", "sphereface2"])
def test_sums_of_softplus_refuse_the_correction_of_the_rate(name):
    """It is a factor 1 / rate under an exponential only."""
    classifier = classifier_of(name, sample_rate=0.4, correct_rate=True)
    with pytest.raises(ValueError, match="correct_rate corrects log-sum-exps, which this loss does not ask for"):
        classifier(*batch())


def test_more_nearest_prototypes_than_classes():
    for zero in (False, True):
        most, all_of_them = (classifier_of("npt", {"k": k, "zero_negative": zero})(*batch()).item() for k in (10**9, CLASSES))
        assert most == all_of_them


def test_prototypes_that_move_in_backward_serve_once():
    classifier = classifier_of("sum", {"parts": ({"name": "cosface"}, {"name": "gce"})})
    optimizer = RowSGD(classifier, lr=0.1, in_backward=True)
    before = classifier.prototypes.detach().clone()
    with pytest.raises(ValueError, match="looks at prototypes twice in a step"):
        classifier(*batch())
    assert torch.equal(classifier.prototypes, before)
    with torch.no_grad():
        assert classifier(*batch()).isfinite()
    del optimizer


def test_running_figures_move_without_gradient_to_features():
    classifier = classifier_of("curricularface")
    features, labels = batch()
    classifier(features.detach(), labels)
    moved = classifier.tracked_mean_target.clone()
    assert moved != 0
    with torch.no_grad():
        classifier(features, labels)
    assert classifier.tracked_mean_target == moved


def test_zero_features_among_products():
    classifier = classifier_of("n_plus_1_tuplet", {"normalizes": False})
    features, labels = batch()
    features = features.detach().clone()
    features[2] = 0
    features.requires_grad_()
    loss = classifier(features, labels)
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all()


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"parts": (3,)}, "each part a 'name'"),
        ({"parts": ({"name": 3},)}, "each part a 'name'"),
        ({"parts": ({"name": "cosface", "scale": "64"},)}, "a part of a sum has a value of the wrong type"),
        ({"parts": ({"name": "cosface"},), "weights": (-2.0,)}, "a sum's weights are"),
    ],
)
def test_parts_of_a_sum_that_cannot_be_built(parameters, sentence):
    with pytest.raises(ValueError, match=sentence):
        losses.build("sum", **parameters)


@pytest.mark.parametrize("decorate", [lambda cls: cls, dataclass(frozen=True)])
def test_register_takes_a_class_and_a_dataclass(decorate, monkeypatch):
    monkeypatch.setattr(losses.base, "REGISTRY", dict(losses.REGISTRY))

    class Scaled(losses.Loss):
        factor: losses.Weight = 2.0

        def __call__(self, batch):
            return self.factor * batch.against_classes(scale=4.0).target_B.mean()

    register("test_scaled")(decorate(Scaled))
    loss = losses.build("test_scaled", factor=3.0)
    assert losses.name_of(loss) == "test_scaled" and loss == losses.base.REGISTRY["test_scaled"](3.0)
    with pytest.raises(FrozenInstanceError):
        loss.factor = 1.0
    with pytest.raises(ValueError, match=r"factor is -1.0, but must lie in \[0, inf\]: it is a weight"):
        losses.build("test_scaled", factor=-1.0)
    assert PartialFC(5, 3, loss)(torch.randn(4, 3), torch.arange(4)).isfinite()
