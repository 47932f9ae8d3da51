"""The baseline computes the right thing: its loss and gradients are those of a dense float64 computation, on any number of ranks."""

from __future__ import annotations

import pytest
import torch

from benchmarks.eager import EagerClassifier
from partial_fc.shards import ClassShard
from tests.partial_fc.oracle import loss_and_gradients, relative_error

CLASSES, BATCH, WIDTH, SCALE, MARGIN = 41, 12, 9, 16.0, 0.4  # a larger scale meets the clamp of probabilities at 1e-30


def inputs():
    generator = torch.Generator().manual_seed(1)
    features, prototypes = torch.randn(BATCH, WIDTH, generator=generator), torch.randn(CLASSES, WIDTH, generator=generator)
    return features, prototypes, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def step_of_rank(rank, size):
    features, prototypes, labels = inputs()
    shard = ClassShard.of_rank(CLASSES, rank, size)
    classifier = EagerClassifier(shard, prototypes[shard.first : shard.first + shard.rows].clone(), SCALE, MARGIN)
    mine = features.chunk(size)[rank].clone().requires_grad_()
    loss = classifier(mine, labels.chunk(size)[rank])
    loss.backward()
    return loss.detach(), mine.grad / size, classifier.prototypes.grad  # it sums over ranks what data-parallel engines average


def step_of_this_rank():
    return step_of_rank(torch.distributed.get_rank(), torch.distributed.get_world_size())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_loss_and_gradients_are_the_oracles(ranks, size):
    results = ranks(size).run(step_of_this_rank) if size > 1 else [step_of_rank(0, 1)]
    exact_loss, exact_features, exact_prototypes = loss_and_gradients("cosface", *inputs(), SCALE, MARGIN)
    for loss, _, _ in results:
        assert relative_error(loss, exact_loss) < 1e-6
    assert relative_error(torch.cat([features for _, features, _ in results]), exact_features) < 1e-5
    assert relative_error(torch.cat([prototypes for _, _, prototypes in results]), exact_prototypes) < 1e-5


def test_samples_hold_the_positives_and_their_gradient_is_dense():
    features, prototypes, labels = inputs()
    classifier = EagerClassifier(ClassShard.of_rank(CLASSES, 0, 1), prototypes.clone(), SCALE, MARGIN, sample_rate=0.5)
    drawn = []
    sample = classifier._sample
    classifier._sample = lambda positives: drawn.append(sample(positives)) or drawn[-1]
    loss = classifier(features, labels)
    loss.backward()
    (rows,) = drawn
    assert len(rows) == CLASSES // 2 and torch.isin(labels, rows).all() and (rows.diff() > 0).all()
    exact_loss, _, exact = loss_and_gradients("cosface", features, prototypes[rows], torch.searchsorted(rows, labels), SCALE, MARGIN)
    assert relative_error(loss.detach(), exact_loss) < 1e-6
    gradient = classifier.prototypes.grad
    assert not gradient.is_sparse and relative_error(gradient[rows], exact) < 1e-5
    assert gradient.count_nonzero() == gradient[rows].count_nonzero()


def test_a_sample_smaller_than_the_positives_is_the_positives():
    _, prototypes, labels = inputs()
    classifier = EagerClassifier(ClassShard.of_rank(CLASSES, 0, 1), prototypes, SCALE, MARGIN, sample_rate=0.05)
    assert classifier._sample(labels).equal(labels.unique())
