"""Growing and merging classifiers: where every prototype and every row of the optimizer's state ends up."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

from partial_fc import PartialFC, RowAdamW, RowSGD, copy_prototypes, grow, growing, losses, merge_identities
from partial_fc.shards import ClassShard, initial_prototypes
from tests.partial_fc.test_classifier import batch

WIDTH = 4


def trained(classes, steps=2, seed=3, kind=RowSGD, rate=1.0):
    """A classifier and its optimizer after some steps."""
    classifier = PartialFC(classes, WIDTH, losses.build("cosface", scale=16.0), rate, seed=seed)
    optimizer = kind(classifier, lr=0.1, unsampled="lazy")
    train(classifier, optimizer, range(steps))
    return classifier, optimizer


def train(classifier, optimizer, steps):
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = []
    for step in steps:
        features, labels = (x.chunk(size)[rank] for x in batch(classifier.shard.num_classes, WIDTH, 12, seed=step))
        loss = classifier(features.clone().requires_grad_(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss)
    return found


def state_of(classifier, optimizer):
    (parameter,) = optimizer.param_groups[0]["params"]
    assert parameter is classifier.prototypes and list(optimizer.state) == [parameter]
    return parameter.detach().clone(), optimizer.state[parameter]["momentum_buffer"].clone()


def before_and_after(classes, more, new_labels, block):
    """Runs on every rank: prototypes and momentum before and after growing, and losses of the steps before and after it."""
    classifier, optimizer = trained(classes, steps=0)
    found = train(classifier, optimizer, range(2))  # losses with their graphs, as a careless loop keeps them
    before = state_of(classifier, optimizer)
    with mock.patch.object(growing, "BLOCK_ELEMENTS", block):
        grow(classifier, optimizer, more, new_labels)
    after = state_of(classifier, optimizer)
    found += train(classifier, optimizer, range(2, 5))
    return before, after, torch.stack([loss.detach() for loss in found])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(1, 30), st.integers(0, 30), st.booleans(), st.integers(1, 40))
@example(4, 1, 0, False, 1)
@example(4, 2, 7, True, 1)
@example(3, 30, 1, False, 1000)
def test_old_rows_are_kept_and_new_ones_are_a_new_classifiers(ranks, size, classes, added, is_appended, block):
    more = classes + added
    new_labels = None if is_appended else np.random.default_rng(block).permutation(more)[:classes].astype(np.int64)
    results = ranks(size).run(before_and_after, classes, more, new_labels, block)
    kept = torch.arange(classes) if new_labels is None else torch.from_numpy(new_labels)
    for part in range(2):  # prototypes, momentum
        old, new = (torch.cat([result[when][part] for result in results]) for when in range(2))
        expected = initial_prototypes(ClassShard.of_rank(more, 0, 1), WIDTH, seed=3) if part == 0 else torch.zeros(more, WIDTH)
        expected[kept] = old
        assert torch.equal(new, expected)
    for rank, result in enumerate(results):
        assert len(result[1][0]) == ClassShard.of_rank(more, rank, size).rows
    _, _, losses_of_one = before_and_after(classes, more, new_labels, block)
    for result in results:
        torch.testing.assert_close(result[2], losses_of_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [RowSGD, RowAdamW])
def test_rows_that_are_behind_make_up_for_their_steps_before_they_move(kind):
    grown, ahead = (trained(20, steps=4, kind=kind, rate=0.2) for _ in range(2))
    ahead[1].flush()
    grow(*grown, 33)
    assert torch.equal(grown[0].prototypes[:20], ahead[0].prototypes)
    for name, value in ahead[1].state[ahead[0].prototypes].items():
        moved = grown[1].state[grown[0].prototypes][name]
        assert torch.equal(moved[:20], value) and not moved[20:].any() if value.ndim else torch.equal(moved, value)
    assert all(loss.isfinite() for loss in train(*grown, range(4, 8)))
    grown[1].flush()


def test_a_sampled_classifier_grows_in_bfloat16_and_without_optimizer():
    classifier = PartialFC(5, WIDTH, losses.build("cosface"), 0.5, storage_dtype="bfloat16")
    before = classifier.prototypes.detach().clone()
    grow(classifier, None, 9)
    assert classifier.prototypes.dtype == torch.bfloat16 and torch.equal(classifier.prototypes[:5], before)
    classifier.begin_step(torch.tensor([8]))
    with pytest.raises(ValueError, match="between two steps"):
        grow(classifier, None, 10)


def merged_prototypes(names_a, names_b):
    """Runs on every rank: prototypes of the two parts and of the whole."""
    names, maps = merge_identities([names_a, names_b])
    (a, _), (b, _), (merged, _) = trained(len(names_a)), trained(len(names_b), seed=4), trained(len(names), steps=0)
    copy_prototypes(b, merged, maps[1])
    copy_prototypes(a, merged, maps[0])
    return tuple(classifier.prototypes.detach() for classifier in (a, b, merged))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_merged_sets_keep_both_prototypes(ranks, size):
    names_a, names_b = ["ann", "bob", "cid"], ["dora", "bob", "eve", "ann", "fay", "gus"]
    a, b, merged = map(torch.cat, zip(*ranks(size).run(merged_prototypes, names_a, names_b), strict=True))
    names, _ = merge_identities([names_a, names_b])
    for name, prototype in zip(names, merged, strict=True):
        assert torch.equal(prototype, a[names_a.index(name)] if name in names_a else b[names_b.index(name)])


def test_merged_labels():
    names, maps = merge_identities([["ann", "bob"], ["cid", "ann"], []])
    assert names == ["ann", "bob", "cid"]
    assert [each.tolist() for each in maps] == [[0, 1], [2, 0], []]
    names, maps = merge_identities([["ann", "bob"], ["cid", "ann"]], same_name=False)
    assert names == ["0/ann", "0/bob", "1/cid", "1/ann"]
    assert [each.tolist() for each in maps] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: merge_identities([["ann"], ["bob", "bob"]]), "set 1 has 2 identities called 'bob'"),
        (lambda: grow(*trained(5), 4), "5 classes cannot become 4"),
        (lambda: grow(*trained(3), 4, np.array([0, 1])), r"new_labels is int64 of shape \(2,\), but must be int64 of shape \(3,\)"),
        (lambda: grow(*trained(2), 4, np.array([0.0, 1.0])), "new_labels is float64"),
        (lambda: grow(*trained(2), 4, np.array([1, 1])), "a label of its own"),
        (lambda: grow(*trained(2), 4, np.array([1, 4])), r"in \[0, 4\)"),
        (lambda: copy_prototypes(trained(2)[0], PartialFC(3, 5, losses.build("cosface")), np.arange(2)), "of width 4 cannot be copied"),
    ],
)
def test_bad_input_ends_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
