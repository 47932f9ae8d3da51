"""Which rank owns which classes: nothing a rank computes depends on it, not even where it owns none."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from partial_fc import PartialFC, RowSGD, losses
from partial_fc.shards import INIT_BLOCK, ClassShard, initial_prototypes
from tests.partial_fc.test_classifier import batch


@pytest.mark.parametrize(("classes", "size"), [(10, 6), (7, 7), (1, 1), (2, 5), (3000, 4)])
def test_shards_cover_the_classes_and_prototypes_do_not_depend_on_them(classes, size):
    shards = [ClassShard.of_rank(classes, rank, size) for rank in range(size)]
    assert [len(part) for part in torch.arange(classes).chunk(size)] == [shard.rows for shard in shards if shard.rows]
    assert torch.equal(
        torch.cat([initial_prototypes(shard, 4, seed=5) for shard in shards]),
        initial_prototypes(ClassShard.of_rank(classes, 0, 1), 4, seed=5),
    )


def test_prototypes_differ_between_classes_blocks_and_seeds():
    whole = ClassShard.of_rank(3 * INIT_BLOCK, 0, 1)
    drawn = initial_prototypes(whole, 8, seed=0)
    assert len(torch.unique(drawn, dim=0)) == 3 * INIT_BLOCK
    assert abs(float(drawn.std()) - 0.01) < 1e-3 and abs(float(drawn.mean())) < 1e-3
    assert not torch.equal(drawn, initial_prototypes(whole, 8, seed=1))


def train(classes, rate, scale, micro):
    """Runs on every rank: losses of five steps, cosines, prototypes and momentum after them."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    classifier = PartialFC(classes, 8, losses.build("arcface", scale=scale), rate, seed=3)
    optimizer = RowSGD(classifier, lr=0.1)
    found = []
    for step in range(5):
        features, labels = (x.chunk(size)[rank] for x in batch(classes, 8, 24, seed=step))
        if micro > 1:
            classifier.begin_step(labels)
        for x, y in zip(features.chunk(micro), labels.chunk(micro), strict=True):
            loss = classifier(x.clone().requires_grad_(), y) / micro
            loss.backward()
            found.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    cosines = torch.stack(classifier.cosines(*batch(classes, 8, 1)))[:, 0]
    return torch.tensor(found), cosines, classifier.prototypes.detach(), optimizer.state[classifier.prototypes]["momentum_buffer"]


@pytest.mark.parametrize("classes", [1, 2, 5])  # 5 over 4 ranks: 2, 2, 1, 0
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize(("rate", "scale", "micro"), [(1.0, 64.0, 1), (1.0, 96.0, 1), (0.4, 64.0, 1), (0.4, 64.0, 2)])
def test_more_ranks_than_classes(ranks, size, classes, rate, scale, micro):
    results, expected = ranks(size).run(train, classes, rate, scale, micro), train(classes, rate, scale, micro)
    for result in results:
        if micro == 1:  # micro-batches of one process hold other rows than those of several
            torch.testing.assert_close(result[0], expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result[1], expected[1], rtol=1e-4, atol=1e-5)
    for part in (2, 3):
        torch.testing.assert_close(torch.cat([result[part] for result in results]), expected[part], rtol=1e-4, atol=1e-5)
