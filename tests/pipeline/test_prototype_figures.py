"""Figures of prototypes against a plain computation on all of them, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from partial_fc import PartialFC, RowAdamW, RowSGD
from pipeline import prototype_figures as module
from pipeline.prototype_figures import prototype_figures

CLASSES, WIDTH = 37, 8


def classifier_after(steps, sample_rate, kind="sgd", **options):
    """Runs on every rank. Prototypes of different lengths, of which only those of labels 0 to 4, and what was sampled with them, moved."""
    classifier = PartialFC(CLASSES, WIDTH, "cosface", sample_rate, seed=3)
    with torch.no_grad():
        ids = torch.arange(classifier.shard.first, classifier.shard.first + classifier.shard.rows)
        classifier.prototypes.mul_(1 + ids[:, None])
    optimizer = RowSGD(classifier, 0.1, **options) if kind == "sgd" else RowAdamW(classifier, 0.1, **options)
    ranks = classifier.made[1]
    for _ in range(steps):
        features = torch.randn(12 // ranks, WIDTH, requires_grad=True)
        classifier(features, torch.arange(12 // ranks) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
    return classifier, optimizer


def measure(steps, sample_rate, most, kind="sgd", options=None):
    """Runs on every rank."""
    module.CLASSES = most
    classifier, optimizer = classifier_after(steps, sample_rate, kind, **(options or {}))
    values, histograms = prototype_figures(classifier, optimizer)
    moved = (classifier.prototypes.detach() != PartialFC(CLASSES, WIDTH, "cosface", seed=3).prototypes.detach()).any(dim=1)
    return values, histograms, classifier.prototypes.detach().clone(), moved


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("most", [9, 1024])  # neither 9 nor 37 classes are as many for each of 2 ranks
def test_norms_and_nearest_cosines(ranks, size, most):
    results = ranks(size).run(measure, 1, 1.0, most)
    prototypes = torch.cat([result[2] for result in results]).double()
    unit = normalize(prototypes)
    cosines = (unit @ unit.T).fill_diagonal_(-2).amax(dim=1)
    chosen = np.linspace(0, CLASSES - 1, min(most, CLASSES)).round().astype(int)
    for values, histograms, *_ in results:
        assert values.keys() == {"prototypes/norm", "prototypes/nearest_cosine"}
        assert values["prototypes/norm"] == pytest.approx(float(prototypes.norm(dim=1).mean()), rel=1e-5)
        assert values["prototypes/nearest_cosine"] == pytest.approx(float(cosines[chosen].mean()), abs=1e-5)
        norms = histograms["prototypes/norms"]
        assert norms.counts_k.sum() == CLASSES
        assert norms.edges[[0, -1]] == pytest.approx([float(prototypes.norm(dim=1).min()), float(prototypes.norm(dim=1).max())], rel=1e-5)
        assert histograms["prototypes/nearest_cosines"].counts_k.sum() == len(chosen)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("kind", "options"), [("sgd", {"weight_decay": 5e-4}), ("adamw", {})])
def test_the_share_of_classes_that_were_never_sampled(ranks, size, kind, options):
    counted = []
    for steps in (0, 1, 4, 60):
        results = ranks(size).run(never_sampled, steps, kind, options)
        shares = {result[0] for result in results}
        assert len(shares) == 1
        counted.append(shares.pop())
        assert counted[-1] == pytest.approx(1 - sum(result[1] for result in results) / CLASSES)
    assert counted[0] == 1 and counted == sorted(counted, reverse=True) and counted[-1] == 0


def never_sampled(steps, kind, options):
    """Runs on every rank. The share that is reported, and how many rows of this rank really were in a sample."""
    classifier = PartialFC(CLASSES, WIDTH, "cosface", 0.1, seed=3)
    optimizer = RowSGD(classifier, 0.1, **options) if kind == "sgd" else RowAdamW(classifier, 0.1, **options)
    sampled = torch.zeros(classifier.shard.rows, dtype=torch.bool)
    share = 12 // classifier.made[1]
    for _ in range(steps):
        classifier(torch.randn(share, WIDTH, requires_grad=True), torch.arange(share) % 5).backward()
        sampled |= classifier.sample.column_S >= 0
        optimizer.step()
        optimizer.zero_grad()
    return prototype_figures(classifier, optimizer)[0]["prototypes/never_sampled"], int(sampled.sum())


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"unsampled": "lazy"}])
def test_a_share_that_cannot_be_told_is_left_out(options):
    classifier = PartialFC(CLASSES, WIDTH, "cosface", 0.1)
    assert "prototypes/never_sampled" not in prototype_figures(classifier, RowSGD(classifier, 0.1, **options))[0]


def test_one_class_and_numbers_that_are_not_finite():
    classifier = PartialFC(1, WIDTH, "cosface")
    with torch.no_grad():
        classifier.prototypes.fill_(float("nan"))
    values, histograms = prototype_figures(classifier, RowSGD(classifier, 0.1))
    assert values.keys() == {"prototypes/norm"} and histograms["prototypes/norms"].counts_k.sum() == 0


def test_training_goes_on_the_same(ranks):
    """It draws no random numbers and leaves no trace in the classifier."""
    plain, looked = (ranks(2).run(losses, looks) for looks in (False, True))
    assert plain == looked


def losses(looks):
    """Runs on every rank."""
    torch.manual_seed(0)
    classifier, optimizer = classifier_after(0, 0.5)
    found = []
    for _ in range(3):
        loss = classifier(torch.randn(6, WIDTH, requires_grad=True), torch.arange(6))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
        if looks:
            prototype_figures(classifier, optimizer)
    return found
