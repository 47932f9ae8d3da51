"""Sampled classes: the draw itself, then loss, gradients and updates against a dense float64 computation over the same classes."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_fc import PartialFC, RowSGD, losses, sampling
from partial_fc.shards import ClassShard, initial_prototypes
from tests.partial_fc.oracle import relative_error
from tests.partial_fc.test_classifier import batch


def sampled_ids(shard, sample):
    return (sample.rows_K[sample.is_real_K] + shard.first).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 9), st.integers(0, 30), st.floats(0.001, 0.999), st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_sample_does_not_depend_on_the_ranks(classes, ranks, size, rate, seed, step):
    ranks = min(ranks, classes)
    labels = torch.randint(0, classes, (size,), generator=torch.Generator().manual_seed(seed))
    whole = ClassShard.of_rank(classes, 0, 1)
    expected = sampled_ids(whole, sampling.draw(whole, labels, rate, seed, step))
    found = []
    for rank in range(ranks):
        shard = ClassShard.of_rank(classes, rank, ranks)
        sample = sampling.draw(shard, labels, rate, seed, step)
        assert len(sample.rows_K) == sampling.capacity(shard.rows, rate, size) <= shard.rows
        assert len(set(sample.rows_K.tolist())) == len(sample.rows_K)  # padding is of other rows than the sample
        real = sample.rows_K[sample.is_real_K]
        assert torch.equal(sample.column_S[real], torch.arange(len(real)))
        assert int((sample.column_S >= 0).sum()) == len(real)
        positive = set((sample.rows_K[sample.is_certain_K & sample.is_real_K] + shard.first).tolist())
        assert positive == {label for label in labels.tolist() if shard.first <= label < shard.first + shard.rows}
        found += sampled_ids(shard, sample)
    assert found == expected


@pytest.mark.parametrize(
    ("rows", "rate", "certain", "share"), [(10, 0.3, 4, 1.0), (40, 0.05, 30, 0.1), (300, 0.01, 64, 0.25), (500, 0.2, 9, 0.5)]
)
def test_more_columns_than_the_capacity_are_rare(rows, rate, certain, share):
    """The exact distribution: certain classes on this rank, and the others by chance; all certain ones are other classes."""

    def binomial(count, probability):
        exact = Fraction(probability).limit_denominator(100)
        found = [float(Fraction(math.comb(count, k)) * exact**k * (1 - exact) ** (count - k)) for k in range(count + 1)]
        return np.array(found)

    size = sampling.capacity(rows, rate, certain, share)
    assert min(certain, rows) <= size <= rows
    assert size <= sampling.capacity(rows, rate, certain)
    beyond = 0.0
    for mine, likelihood in enumerate(binomial(certain, share)):
        mine = min(mine, rows)
        beyond += likelihood * binomial(rows - mine, rate)[max(0, size - mine + 1) :].sum()
    assert beyond < 1e-9


def test_a_rank_leaves_room_for_its_share_of_the_labels():
    """webface42m on 32 ranks at rate 0.2: 6 % of the columns are unused, not 37 %."""
    rows, batch = 64_373, 4096
    assert sampling.capacity(rows, 0.2, batch, share=1 / 32) < 1.06 * (0.2 * rows + 0.8 * batch / 32)
    counts = torch.full((320,), 7)
    classifier = PartialFC(320, 4, losses.build("cosface"), 0.2, class_counts=counts.index_fill(0, torch.arange(80), 100))
    assert classifier.label_share == 1.0  # one rank has them all
    assert PartialFC(320, 4, losses.build("cosface"), 0.2).label_share == 1.0


def share_on_rank(counts, **options):
    return PartialFC(len(counts), 4, losses.build("cosface"), 0.2, class_counts=counts, **options).label_share


def test_the_share_of_labels_on_ranks(ranks):
    counts = torch.tensor([6, 2, 1, 1, 1, 1])
    assert ranks(3).run(share_on_rank, counts) == pytest.approx([8 / 12, 1 / 3, 1 / 3])  # drawn by image or by identity
    assert ranks(3).run(partial(share_on_rank, hard_negatives=1), counts) == [1.0] * 3


def test_rate_steps_and_seeds():
    shard = ClassShard.of_rank(200_000, 0, 1)
    none = torch.zeros(0, dtype=torch.int64)
    drawn = [set(sampled_ids(shard, sampling.draw(shard, none, 0.1, seed, step))) for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))]
    deviation = math.sqrt(200_000 * 0.1 * 0.9)
    assert all(abs(len(ids) - 20_000) < 5 * deviation for ids in drawn)
    assert drawn[0] == drawn[3]
    for other in drawn[1:3]:  # independent samples share a tenth of a tenth
        assert abs(len(drawn[0] & other) - 2_000) < 5 * math.sqrt(2_000)


def test_uniform_numbers_are_uniform():
    numbers = sampling.uniform(torch.arange(1 << 20), seed=3, step=7)
    counts = torch.histc(numbers.float(), 256, 0, 1).double()
    assert float(((counts - 4096) ** 2 / 4096).sum()) < 255 + 5 * math.sqrt(2 * 255)
    assert abs(float(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1])) < 5e-3


CLASSES, WIDTH, ROWS, RATE = 301, 16, 6, 0.2


def train(steps, correct=False, micro=1):
    """Runs on every rank: (losses, gradient of this rank's first features, prototypes after the steps, momentum)."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    classifier = PartialFC(
        CLASSES, WIDTH, losses.build("cosface", scale=32.0), RATE, correct_rate=correct, seed=3, feature_gradient="global"
    )
    optimizer = RowSGD(classifier, lr=0.3, momentum=0.9, weight_decay=1e-2)
    found, first = [], None
    rows = 12 // size  # 12 rows in all, however many ranks
    for step in range(steps):
        features, labels = batch(CLASSES, WIDTH, 12, seed=step)
        mine = slice(rank * rows, (rank + 1) * rows)
        x, y = features[mine].clone().requires_grad_(), labels[mine]
        if micro > 1:
            classifier.begin_step(y)
        total = 0.0
        for part_x, part_y in zip(x.chunk(micro), y.chunk(micro), strict=True):
            loss = classifier(part_x, part_y) / micro
            loss.backward()
            total += float(loss.detach())
        found.append(total)
        first = x.grad if first is None else first
        optimizer.step()
        optimizer.zero_grad()
    return found, first, classifier.prototypes.detach(), optimizer.state[classifier.prototypes]["momentum_buffer"]


def dense(steps, correct):
    """The same in float64, with the full matrix and a mask, frozen rows put back after each step."""
    whole = ClassShard.of_rank(CLASSES, 0, 1)
    prototypes = initial_prototypes(whole, WIDTH, seed=3).double()
    momentum = torch.zeros_like(prototypes)
    found, first = [], None
    for step in range(steps):
        features, labels = batch(CLASSES, WIDTH, 12, seed=step)
        sample = sampling.draw(whole, labels, RATE, 3, step)
        real = sample.column_S >= 0
        negatives = torch.ones(CLASSES).scatter(0, labels, 0).bool() & real
        x, w = features.double().requires_grad_(), prototypes.clone().requires_grad_()
        cosines = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).T
        logits = 32 * cosines.scatter_add(1, labels[:, None], torch.full((12, 1), -0.4, dtype=torch.float64))
        weights = torch.where(negatives, -math.log(RATE) if correct else 0.0, 0.0).masked_fill(~real, -torch.inf)
        loss = torch.nn.functional.cross_entropy(logits + weights, labels)
        loss.backward()
        found.append(float(loss))
        first = x.grad if first is None else first
        moved = 0.9 * momentum + w.grad + 1e-2 * prototypes
        momentum = torch.where(real[:, None], moved, momentum)
        prototypes = torch.where(real[:, None], prototypes - 0.3 * moved, prototypes)
    return found, first, prototypes, momentum


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("correct", "micro"), [(False, 1), (True, 1), (False, 3)])
def test_training_on_samples_equals_dense_float64(ranks, size, correct, micro):
    if size * micro > 4:
        size = 4 // micro + 1  # 12 rows in all
    results = ranks(size).run(train, 8, correct, micro) if size > 1 else [train(8, correct, micro)]
    found, first, prototypes, momentum = dense(8, correct)
    for result in results:
        assert result[0] == pytest.approx(found, rel=1e-5)
    assert relative_error(torch.cat([result[1] for result in results]), first) < 1e-5
    assert relative_error(torch.cat([result[2] for result in results]), prototypes) < 1e-5
    assert relative_error(torch.cat([result[3] for result in results]), momentum) < 1e-5


def test_rows_that_were_not_sampled_are_not_written():
    classifier = PartialFC(CLASSES, WIDTH, losses.build("cosface"), RATE)
    optimizer = RowSGD(classifier, lr=0.1)
    before = classifier.prototypes.detach().clone()
    features, labels = batch(CLASSES, WIDTH, 12)
    classifier(features, labels).backward()
    optimizer.step()
    changed = (classifier.prototypes != before).any(dim=1)
    assert torch.equal(changed, classifier.sample.column_S >= 0)


def test_two_samples_in_one_step_end_in_a_sentence():
    classifier = PartialFC(CLASSES, WIDTH, losses.build("cosface"), RATE)
    optimizer = RowSGD(classifier, lr=0.1)
    for seed in (0, 1):
        classifier(*batch(CLASSES, WIDTH, 12, seed=seed)).backward()
    with pytest.raises(ValueError, match="2 samples of classes were drawn"):
        optimizer.step()


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01])
def test_bad_rate(rate):
    with pytest.raises(ValueError, match="sample_rate is"):
        PartialFC(10, 4, losses.build("cosface"), rate)


def nearest_in_sample(k):
    classifier = PartialFC(CLASSES, WIDTH, losses.build("cosface", scale=32.0), 0.05, hard_negatives=k, correct_rate=True, seed=3)
    labels = torch.tensor([5, 17, 17, CLASSES - 1])
    mine = labels[dist.get_rank() :: dist.get_world_size()]
    classifier(torch.randn(len(mine), WIDTH), mine).backward()
    return sampled_ids(classifier.shard, classifier.sample), int(classifier.sample.is_certain_K.sum())


@pytest.mark.parametrize("k", [1, 5])
def test_hard_negatives_are_always_in(ranks, k):
    whole = ClassShard.of_rank(CLASSES, 0, 1)
    units = torch.nn.functional.normalize(initial_prototypes(whole, WIDTH, 3))
    labels = torch.tensor([5, 17, CLASSES - 1])
    cosines = (units[labels] @ units.T).scatter(1, labels[:, None], -2)
    certain = {*labels.tolist(), *cosines.topk(k, dim=1).indices.flatten().tolist()}
    by_size = [ranks(size).run(nearest_in_sample, k) for size in (1, 2, 4)]
    for found in by_size:
        ids = [identity for sampled, _ in found for identity in sampled]
        assert certain <= set(ids)
        assert ids == by_size[0][0][0]
        assert sum(count for _, count in found) == len(certain)


def test_hard_negatives_need_sampling():
    with pytest.raises(ValueError, match="hard_negatives is 2, but must be 0 or more, and above 0 only with a sample_rate below 1"):
        PartialFC(9, 4, losses.build("cosface"), hard_negatives=2)


def test_a_validation_loss_leaves_no_trace():
    torch.manual_seed(0)
    results = []
    for validates in (False, True):
        classifier = PartialFC(CLASSES, WIDTH, losses.build("cosface", scale=32.0), RATE, seed=3)
        optimizer = RowSGD(classifier, lr=0.1)
        for step in range(3):
            features, labels = batch(CLASSES, WIDTH, 8, seed=step)
            if validates:
                with torch.no_grad():
                    assert torch.isfinite(classifier(features, labels))
            classifier(features, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(classifier.prototypes.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("options", [{"unsampled": "lazy"}, {"in_backward": True}])
def test_a_copy_has_no_optimizer(options):
    classifier = PartialFC(CLASSES, WIDTH, losses.build("cosface", scale=32.0), RATE, seed=3)
    optimizer = RowSGD(classifier, lr=0.1, **options)
    twin, optimizer_twin = copy.deepcopy(classifier), copy.deepcopy(optimizer)
    for other in (twin, optimizer_twin.classifier):
        features, labels = batch(CLASSES, WIDTH, 8)
        other(features, labels).backward()
    assert torch.equal(twin.prototypes, classifier.prototypes) and twin.prototypes.grad is not None
