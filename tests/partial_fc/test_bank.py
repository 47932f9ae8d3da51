"""The bank of last features: who wins, when it is written, what is refused, where it goes."""

from __future__ import annotations

import copy
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st

from partial_fc import PartialFC, RowSGD, bank, grow, losses
from partial_fc.bank import Bank, check_fits, last_of_each
from partial_fc.prototype_sources import AllRows, MixedRows, SampledRows

WIDTH = 4
BANK = {"substitution_rate": 0.5, "substitution_source": "bank"}


@given(st.lists(st.integers(-1, 4), max_size=20))
@example([])
@example([3, 3, 3])
def test_the_last_of_several_samples_wins(keys):
    expected = [max(place for place, other in enumerate(keys) if other == key) for key in keys]
    assert last_of_each(torch.tensor(keys, dtype=torch.int64)).tolist() == expected


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=4), st.integers(0, 9), st.integers(0, 6), st.integers(0, 100))
@example([[5, 5], [5]], 5, 0, 0)  # a rank without classes
@example([[1, 2], [9, 9]], 3, 4, 0)  # a batch without classes of this rank
def test_a_bank_holds_the_last_feature_of_each_of_its_classes(batches, first, rows, seed):
    rows = min(rows, 10 - first)
    generator = torch.Generator().manual_seed(seed)
    found = Bank(torch.zeros(rows, WIDTH), torch.full((rows,), -1))
    expected, steps = found.features_SD.clone(), [-1] * rows
    for step, labels in enumerate(batches):
        features = torch.randn(len(labels), WIDTH, generator=generator)
        features[2:3] = 0  # no direction: as if it were not there
        found.write(features, torch.tensor(labels, dtype=torch.int64), first, step)
        for place, label in enumerate(labels):
            if place != 2 and first <= label < first + rows:
                expected[label - first], steps[label - first] = features[place] / features[place].norm(), step
    torch.testing.assert_close(found.features_SD, expected)
    assert found.steps_S.tolist() == steps


def test_a_feature_is_fresh_up_to_its_age():
    found = Bank(torch.zeros(4, WIDTH), torch.tensor([-1, 0, 7, 9]))
    assert found.fresh(10).tolist() == [False, True, True, True]
    assert found.fresh(10, 3).tolist() == [False, False, True, True]
    assert found.fresh(10, 2).tolist() == [False, False, False, True]
    assert found.fresh(1, 200).tolist()[0] is False


def classifier_of(classes=6, rate=1.0, loss="cosface", **options):
    classifier = PartialFC(classes, WIDTH, losses.build(loss), rate, seed=1, **(BANK | options))
    return classifier, RowSGD(classifier, 0.1)


def features_of(*labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(labels), WIDTH, generator=generator).requires_grad_(), torch.tensor(labels)


def test_it_is_there_only_where_somebody_asks_for_it():
    assert "bank_features" in dict(classifier_of()[0].named_buffers())
    assert "bank_steps" in PartialFC(6, WIDTH, losses.build("vpl")).state_dict()
    assert "bank_steps" in PartialFC(6, WIDTH, losses.build("uss", source="bank")).state_dict()
    for other in (
        PartialFC(6, WIDTH, losses.build("uss")),
        classifier_of(substitution_rate=0.0)[0],
        classifier_of(substitution_source="batch")[0],
    ):
        assert other.bank is None and not any("bank" in name for name in other.state_dict())


def test_it_is_written_when_the_step_ends():
    classifier, optimizer = classifier_of()
    features, labels = features_of(2, 3, 2)
    loss = classifier(features, labels)
    assert (classifier.bank_steps == -1).all()
    loss.backward()
    optimizer.step()
    assert classifier.bank_steps.tolist() == [-1, -1, 0, 0, -1, -1]
    torch.testing.assert_close(classifier.bank_features[2], (features[2] / features[2].norm()).detach())
    assert not classifier.bank_features.requires_grad
    with torch.no_grad():
        classifier(*features_of(1))
    classifier.end_step()  # of a validation loss
    assert classifier.bank_steps.tolist() == [-1, -1, 0, 0, -1, -1]


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_micro_batches_are_of_one_step_and_the_last_wins(rate):
    classifier, optimizer = classifier_of(rate=rate)
    for step in range(2):
        parts = [features_of(1, 4, seed=step), features_of(4, 5, seed=step + 10)]
        classifier.begin_step(torch.cat([labels for _, labels in parts]))
        for part in parts:
            classifier(*part).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert classifier.bank_steps.tolist() == [-1, step, -1, -1, step, step]
        torch.testing.assert_close(classifier.bank_features[4], (parts[1][0][0] / parts[1][0][0].norm()).detach())


def test_a_bad_step_leaves_it_as_it_was():
    classifier, optimizer = classifier_of(non_finite="skip")
    for part in (features_of(1), (torch.full((1, WIDTH), torch.nan).requires_grad_(), torch.tensor([2]))):
        classifier(*part).backward()
    optimizer.step()
    assert (classifier.bank_steps == -1).all() and not classifier.bank_features.any()
    classifier(*features_of(3)).backward()
    optimizer.step()
    assert classifier.bank_steps.tolist() == [-1, -1, -1, 1, -1, -1]


def test_backward_after_the_bank_was_written_is_an_error():
    classifier, _ = classifier_of(substitution_rate=1.0)
    loss = classifier(*features_of(1))
    classifier.end_step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_an_end_of_the_step_little_is_kept():
    classifier, _ = classifier_of()
    for _ in range(100):
        classifier(*features_of(1))
    assert len(classifier.current.brought) == 64
    assert not copy.deepcopy(classifier).current.brought


def test_it_is_saved_and_loaded():
    classifier, optimizer = classifier_of()
    classifier(*features_of(2, 3)).backward()
    optimizer.step()
    other, _ = classifier_of()
    other.load_state_dict(classifier.state_dict())
    assert torch.equal(other.bank_features, classifier.bank_features) and torch.equal(other.bank_steps, classifier.bank_steps)


def test_more_than_fits_is_refused():
    check_fits(1000, 512, 1000 * (4 * 512 + 8))
    with pytest.raises(ValueError, match="needs 206 GB on this rank, for 100000000 classes of width 512, but only 64 GB are free"):
        check_fits(100_000_000, 512, 64e9)
    assert bank.available_bytes(torch.device("cpu")) > 1e6
    assert bank.available_bytes(torch.device("meta")) == torch.inf
    with mock.patch.object(bank, "available_bytes", return_value=100.0), pytest.raises(ValueError, match="the bank of last features needs"):
        classifier_of()
    classifier, optimizer = classifier_of()
    with mock.patch.object(bank, "available_bytes", return_value=100.0), pytest.raises(ValueError, match="the bank of last features needs"):
        grow(classifier, optimizer, 7)
    assert classifier.shard.num_classes == 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"substitution_source": "queue"}, "substitution_source is 'queue'"),
        ({"substitution_staleness": 0}, "substitution_staleness is 0"),
    ],
)
def test_bad_options_end_in_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        classifier_of(**options)


@pytest.mark.parametrize("is_sampled", [False, True])
def test_mixed_prototypes_and_their_gradient_equal_autograd(is_sampled):
    generator = torch.Generator().manual_seed(2)
    prototypes, features, wanted = (torch.randn(7, WIDTH, dtype=torch.float64, generator=generator) for _ in range(3))
    prototypes[3] = 0  # no direction: no gradient
    prototypes.requires_grad_()
    rows = torch.tensor([5, 0, 3, 6]) if is_sampled else torch.arange(7)
    share = torch.tensor([0.0, 1.0, 0.3, 0.5, 0.2, 1.0, 0.7], dtype=torch.float64)[rows]
    inner = SampledRows(prototypes, rows, torch.ones(4, dtype=torch.bool)) if is_sampled else AllRows(prototypes)
    source = MixedRows(inner, features, rows if is_sampled else None, share)
    chosen = prototypes[rows]
    units = chosen / chosen.norm(dim=1, keepdim=True).clamp(min=1e-12)
    expected = (1 - share[:, None]) * units + share[:, None] * features[rows]
    torch.testing.assert_close(source.load(torch.tensor([2, 1, 2])), expected[[2, 1, 2]])
    collector = source.collector(source.gradient_memory())
    for part in (slice(0, 2), slice(2, 3), slice(3, len(rows))):
        torch.testing.assert_close(source.load(part), expected[part])
        collector.store(part, wanted[rows][part].clone())
    found, of_bank = collector.gradients()
    (right,) = torch.autograd.grad((expected * wanted[rows]).sum(), prototypes)
    torch.testing.assert_close(found.to_dense(), right.where(prototypes.detach().any(dim=1, keepdim=True), 0))
    assert of_bank is None


def third_step(dtype, rate, share):
    """Features with gradient of a step before a bank that two steps in float32 have filled: loss, and gradients."""
    (classifier, optimizer), (other, _) = (classifier_of(40, rate, substitution_rate=share, dtype=kind) for kind in ("float32", dtype))
    for step in range(2):
        classifier(*features_of(*range(step, 40, 3), *range(5), seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    other.load_state_dict(classifier.state_dict())
    other.step = classifier.step
    features, labels = features_of(*range(2, 40, 3), *range(5), seed=2)
    loss = other(features, labels)
    loss.backward()
    return loss.detach(), features.grad, other.prototypes.grad.to_dense()


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_products_in_bfloat16_err_no_more_than_with_prototypes_alone(rate):
    errors = []
    for share in (0.0, 0.5):
        both = zip(third_step("bfloat16", rate, share), third_step("float32", rate, share), strict=True)
        errors.append(torch.stack([(found - right).norm() / right.norm() for found, right in both]))
    assert (errors[1] < 2 * errors[0] + 1e-3).all() and (errors[1] < 0.1).all(), errors


def grown_bank(new_labels):
    """Runs on every rank: the bank before and after."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    classifier, optimizer = classifier_of(11, loss="uce", class_counts=torch.arange(11))
    features, labels = features_of(0, 3, 3, 10, 7, 8, 1, 4, 9, 2, 5, 6)
    features, labels = features.detach().chunk(size)[rank].requires_grad_(), labels.chunk(size)[rank]
    classifier(features, labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    threshold, before = classifier.learned["threshold"].detach().clone(), (classifier.bank_features.clone(), classifier.bank_steps.clone())
    with pytest.raises(ValueError, match=r"give grow class_counts=, int64 \[17\]"):
        grow(classifier, optimizer, 17, new_labels)
    grow(classifier, optimizer, 17, new_labels, torch.arange(17) * 2)
    assert torch.equal(classifier.learned["threshold"], threshold)
    after = classifier.bank_features.clone(), classifier.bank_steps.clone()
    assert torch.equal(classifier.class_counts_S, (2.0 * torch.arange(17))[classifier.shard.first :][: classifier.shard.rows])
    classifier(features, labels).backward()
    optimizer.step()
    return *before, *after


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("new_labels", [None, np.array([16, 0, 1, 14, 13, 3, 2, 5, 6, 7, 8])])
def test_a_grown_classifier_keeps_its_bank(ranks, size, new_labels):
    results = ranks(size).run(grown_bank, new_labels) if size > 1 else [grown_bank(new_labels)]
    old, old_steps, new, new_steps = (torch.cat(parts) for parts in zip(*results, strict=True))
    places = torch.arange(11) if new_labels is None else torch.from_numpy(new_labels)
    expected, expected_steps = torch.zeros(17, WIDTH), torch.full((17,), -1)
    expected[places], expected_steps[places] = old, old_steps
    assert torch.equal(new, expected) and torch.equal(new_steps, expected_steps) and (old_steps == 0).sum() == 11


def test_numbers_learned_by_class_move_with_their_classes():
    class Biased(type(losses.build("cosface"))):
        def learned_by_class(self, num_classes):
            return {"bias": 0.25}

        def __call__(self, batch):
            statistics = batch.against_classes(scale=8.0, class_bias_S=batch.parameter("bias"))
            return (statistics.non_target_B - 8.0 * statistics.target_B).mean()

    classifier = PartialFC(4, WIDTH, Biased())
    optimizer = RowSGD(classifier, 0.1)
    classifier(*features_of(0, 1)).backward()
    optimizer.step()
    optimizer.zero_grad()
    bias, momentum = classifier.learned["bias"], optimizer.state[classifier.learned["bias"]]["momentum_buffer"]
    grow(classifier, optimizer, 6, np.array([5, 0, 1, 3]))
    moved = classifier.learned["bias"]
    assert torch.equal(moved[[5, 0, 1, 3]], bias) and (moved[[2, 4]] == 0.25).all()
    kept = optimizer.state[moved]["momentum_buffer"]
    assert torch.equal(kept[[5, 0, 1, 3]], momentum) and not kept[[2, 4]].any()
    assert any(parameter is moved for parameter in optimizer.param_groups[0]["params"]) and bias not in optimizer.state
    classifier(*features_of(4, 1)).backward()
    optimizer.step()


def test_a_queue_of_labels_does_not_follow_new_labels():
    classifier, optimizer = classifier_of(loss="broadface", substitution_rate=0.0)
    with pytest.raises(ValueError, match="keeps samples of earlier steps by their labels"):
        grow(classifier, optimizer, 7, np.arange(1, 7))
    grow(classifier, optimizer, 7)
