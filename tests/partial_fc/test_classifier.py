"""PartialFC over 1 to 4 ranks against a dense float64 computation in one process; its optimizer against torch's."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from partial_fc import PartialFC, RowSGD, collectives, losses, similarity_statistics
from partial_fc.shards import INIT_BLOCK, ClassShard, initial_prototypes
from tests.partial_fc.oracle import loss_and_gradients, relative_error

CASES = [  # loss, margin, scale, classes, width, rows per rank; 5 classes on 4 ranks leave one shard empty, 9 leave one short
    ("cosface", 0.4, 64.0, 101, 16, 6),
    ("arcface", 0.5, 64.0, 101, 16, 6),
    ("cosface", 0.2, 24.0, 5, 8, 3),
    ("arcface", 0.3, 16.0, 9, 8, 1),
    ("cosface", 0.35, 96.0, 1500, 32, 5),
]


def batch(classes, width, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, width, generator=generator), torch.randint(0, classes, (size,), generator=generator)


def one_step(name, margin, scale, classes, width, rows, gradient="global"):
    """Runs on every rank: (loss, gradient of this rank's features, gradient of this rank's prototypes)."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    features, labels = batch(classes, width, rows * size)
    mine = slice(rank * rows, (rank + 1) * rows)
    features_bD = features[mine].clone().requires_grad_()
    classifier = PartialFC(classes, width, losses.build(name, scale=scale, margin=margin), seed=3, feature_gradient=gradient)
    loss = classifier(features_bD, labels[mine])
    loss.backward()
    return loss.detach(), features_bD.grad, classifier.prototypes.grad


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_dense_float64(ranks, size, case):
    name, margin, scale, classes, width, rows = case
    results = ranks(size).run(one_step, *case) if size > 1 else [one_step(*case)]
    features, labels = batch(classes, width, rows * size)
    prototypes = initial_prototypes(ClassShard.of_rank(classes, 0, 1), width, seed=3)
    loss, grad_features, grad_prototypes = loss_and_gradients(name, features, prototypes, labels, scale, margin)
    errors = [
        max(relative_error(result[0], loss) for result in results),
        relative_error(torch.cat([result[1] for result in results]), grad_features),
        relative_error(torch.cat([result[2] for result in results]), grad_prototypes),
    ]
    print("relative error of loss, feature gradient, prototype gradient: " + ", ".join(f"{error:.1e}" for error in errors))
    assert max(errors) < 1e-5


def test_averaged_feature_gradient_is_the_world_size_times_the_global_one(ranks):
    summed, averaged = (ranks(3).run(one_step, *CASES[0], mode) for mode in ("global", "averaged"))
    for one, other in zip(summed, averaged, strict=True):
        torch.testing.assert_close(other[1], 3 * one[1])
        torch.testing.assert_close(other[2], one[2])


def norms_step(classes, width, rows):
    """Runs on every rank: a loss that uses the norms as its scale and by themselves; (loss, gradient of this rank's features)."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    features, labels = batch(classes, width, rows * size)
    prototypes = initial_prototypes(ClassShard.of_rank(classes, 0, 1), width, seed=3)
    shard = ClassShard.of_rank(classes, rank, size)
    mine = slice(rank * rows, (rank + 1) * rows)
    features_bD = features[mine].double().requires_grad_()
    features_BD = collectives.gather_rows(features_bD)
    statistics = similarity_statistics(
        features_BD,
        prototypes[shard.first : shard.first + shard.rows].double(),
        labels,
        scale=features_BD.norm(dim=1),
        first_class=shard.first,
    )
    loss = (statistics.non_target_B - statistics.target_B + 0.1 * statistics.norms_B).mean()
    loss.backward()
    return loss.detach(), features_bD.grad


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_through_norms_and_a_vector_scale_are_counted_once(ranks, size):
    results = ranks(size).run(norms_step, 101, 16, 6)
    features, labels = batch(101, 16, 6 * size)
    features = features.double().requires_grad_()
    prototypes = initial_prototypes(ClassShard.of_rank(101, 0, 1), 16, seed=3).double()
    norms = features.norm(dim=1)
    cosines = features @ torch.nn.functional.normalize(prototypes).T / norms[:, None]
    others = (norms[:, None] * cosines).scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1)
    loss = (others - cosines.gather(1, labels[:, None])[:, 0] + 0.1 * norms).mean()
    loss.backward()
    assert all(relative_error(result[0], loss.detach()) < 1e-12 for result in results)
    assert relative_error(torch.cat([result[1] for result in results]), features.grad) < 1e-12


def count_collectives():
    """Runs on every rank: the calls of one step, with the number of elements that this rank puts into each."""
    calls = Counter()

    def counting(kind, original, position):
        def call(*arguments, **keywords):
            calls[kind, arguments[position].numel()] += 1
            return original(*arguments, **keywords)

        return call

    with (
        mock.patch.object(collectives, "_all_gather", counting("all_gather", collectives._all_gather, 1)),
        mock.patch.object(collectives, "_reduce_scatter", counting("reduce_scatter", collectives._reduce_scatter, 1)),
        mock.patch.object(dist, "all_reduce", counting("all_reduce", dist.all_reduce, 0)),
    ):
        one_step("cosface", 0.4, 64.0, 101, 16, 6)
    return calls


def test_collectives_of_a_step_are_those_of_the_docstring(ranks):
    for calls in ranks(2).run(count_collectives):
        # features [6, 16] and labels [6] gathered; 2 B floats reduced; gradients [B, 16] scattered
        assert calls == {("all_gather", 96): 1, ("all_gather", 6): 1, ("all_reduce", 24): 1, ("reduce_scatter", 192): 1}


@pytest.mark.parametrize(("classes", "size"), [(10, 6), (7, 7), (1, 1), (3000, 4)])
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


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_row_sgd_equals_torch_sgd(nesterov, momentum, monkeypatch):
    monkeypatch.setattr("partial_fc.optimizers.CHUNK_ELEMENTS", 100)  # several chunks, the last one short
    ours, theirs = (PartialFC(57, 8, losses.build("cosface", scale=16.0)) for _ in range(2))
    options = {"lr": 0.3, "momentum": momentum, "weight_decay": 1e-2, "nesterov": nesterov}
    optimizers = [RowSGD(ours, **options), torch.optim.SGD(theirs.parameters(), **options)]
    for step in range(20):
        features, labels = batch(57, 8, 12, seed=step)
        for classifier, optimizer in zip((ours, theirs), optimizers, strict=True):
            classifier(features, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.prototypes, theirs.prototypes, rtol=1e-6, atol=1e-7)


def test_cosines_for_monitoring():
    classifier = PartialFC(5, 5, losses.build("cosface"))
    classifier.prototypes.data = torch.eye(5)
    features = torch.tensor([[2.0, 0, 0, 0, 0], [0, 3.0, 4.0, 0, 0]])
    target, hardest = classifier.cosines(features, torch.tensor([0, 1]))
    torch.testing.assert_close(target, torch.tensor([1.0, 0.6]))
    torch.testing.assert_close(hardest, torch.tensor([0.0, 0.8]))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: ClassShard.of_rank(3, 0, 4), "4 ranks cannot share 3 classes"),
        (lambda: ClassShard.of_rank(0, 0, 1), "at least 1 class"),
        (lambda: losses.build("cosfase"), "did you mean 'cosface'"),
        (lambda: losses.build("cosface", margn=1), "has no parameter 'margn'"),
        (lambda: losses.build("cosface", margin=-0.1), "margin is -0.1"),
        (lambda: losses.build("arcface", margin=2.0), "margin is 2.0"),
        (lambda: losses.build("arcface", scale=0.0), "scale is 0.0"),
        (lambda: PartialFC(4, 2, losses.build("cosface"), feature_gradient="summed"), "'averaged' or 'global'"),
        (lambda: RowSGD(PartialFC(4, 2, losses.build("cosface")), lr=0.1, momentum=1.5), "momentum < 1"),
        (lambda: RowSGD(PartialFC(4, 2, losses.build("cosface")), lr=0.1, momentum=0.0, nesterov=True), "momentum above 0"),
    ],
)
def test_bad_input_ends_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
