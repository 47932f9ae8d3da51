"""PartialFC over 1 to 4 ranks against a dense float64 computation in one process; its optimizer against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

from partial_fc import LogSumExp, PartialFC, RowSGD, collectives, losses, of_classes, similarity_statistics
from partial_fc import classifier as classifier_module
from partial_fc.shards import ClassShard, initial_prototypes
from tests.partial_fc.oracle import loss_and_gradients, relative_error

CASES = [  # loss, margin, scale, classes, width, rows per rank; 5 classes on 4 ranks leave one shard empty, 9 leave one short
    ("cosface", 0.4, 64.0, 101, 16, 6),
    ("arcface", 0.5, 64.0, 101, 16, 6),
    ("cosface", 0.2, 24.0, 5, 8, 3),
    ("arcface", 0.3, 16.0, 9, 8, 1),
    ("cosface", 0.35, 96.0, 1500, 32, 5),
    ("arcface", 0.5, 64.0, 2, 8, 3),  # more ranks than classes
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


def uneven_step(rows, classes, width, rate, gather_dtype, is_told=False):
    """Runs on every rank: two steps, the second with the ranks' shares the other way round. Of the second: loss, gradient of this rank's
    features, cosines; and the prototypes after both."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    options = {"seed": 3, "feature_gradient": "global", "uneven_batches": len(rows) > 1 and not is_told, "gather_dtype": gather_dtype}
    classifier = PartialFC(classes, width, losses.build("cosface", scale=24.0), rate, **options)
    optimizer = RowSGD(classifier, lr=0.1)
    for seed, share in enumerate((rows, rows[::-1])):
        features, labels = (x.split(share)[rank] for x in batch(classes, width, sum(rows), seed))
        features, counts = features.clone().requires_grad_(), share if is_told else None
        if seed:
            classifier.begin_step(labels, counts)
        loss = classifier(features, labels, counts)
        loss.backward()
        cosines = torch.stack(classifier.cosines(features.detach(), labels, counts))
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach(), features.grad, cosines, classifier.prototypes.detach()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=4).filter(any),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from([1.0, 0.4]),
    st.sampled_from(["float32", "bfloat16"]),
    st.booleans(),
)
@example([0, 0, 3, 0], 1, 1, 0.4, "float32", False)
@example([0, 0, 3, 0], 1, 1, 0.4, "float32", True)
@example([4, 4], 40, 8, 1.0, "bfloat16", True)
def test_uneven_batches_equal_one_process_on_all_rows(ranks, rows, classes, width, rate, gather_dtype, is_told):
    results = ranks(len(rows)).run(uneven_step, rows, classes, width, rate, gather_dtype, is_told)
    loss, gradient, cosines, prototypes = uneven_step([sum(rows)], classes, width, rate, gather_dtype)
    for result in results:
        torch.testing.assert_close(result[0], loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result[2], cosines, rtol=1e-5, atol=1e-5)
    assert [len(result[1]) for result in results] == rows[::-1]
    for part, expected in ((1, gradient), (3, prototypes)):
        found = torch.cat([result[part] for result in results])
        assert (found - expected).norm() < 1e-4 * expected.norm() + 1e-5  # of one class or width 1 all gradients are rounding


def test_features_that_travel_as_bfloat16_are_rounded_once_and_nothing_else_is():
    features, labels = batch(50, 8, 6)
    exact, rounded = features.bfloat16().float().requires_grad_(), features.clone().requires_grad_()
    for x, gather_dtype in ((exact, "float32"), (rounded, "bfloat16")):
        PartialFC(50, 8, losses.build("cosface"), seed=3, gather_dtype=gather_dtype)(x, labels).backward()
    assert torch.equal(exact.grad, rounded.grad)


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
        of_classes(prototypes[shard.first : shard.first + shard.rows].double(), labels, shard.first),
        LogSumExp(),
        scale=features_BD.norm(dim=1),
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


def test_cosines_for_metrics_take_the_classifiers_own_products(monkeypatch):
    """A line of metrics in float32 would cost a run with bfloat16 products several steps."""
    options = []

    def seen(*arguments, **given):
        options.append(given)
        return similarity_statistics(*arguments, **given)

    monkeypatch.setattr(classifier_module, "similarity_statistics", seen)
    classifier = PartialFC(37, 8, losses.build("cosface"), dtype="bfloat16", kernel="chunked", tile_megabytes=3)
    target, hardest = classifier.cosines(*batch(37, 8, 12))
    assert options[0]["dtype"] == "bfloat16" and options[0]["kernel"] == "chunked" and options[0]["tile_megabytes"] == 3
    exact = PartialFC(37, 8, losses.build("cosface")).cosines(*batch(37, 8, 12))
    torch.testing.assert_close((target, hardest), exact, rtol=0, atol=1e-6)
