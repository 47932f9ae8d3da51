"""Steps of the row optimizers that begin in backward, are skipped, or are clipped."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from partial_fc import RowAdamW, RowSGD
from tests.partial_fc.test_classifier import batch
from tests.partial_fc.test_optimizers import CLASSES, RULES, WIDTH, assert_same, classifier_of, draw, of, policy, set_sampled

__all__ = ["policy"]


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize(("ours", "theirs", "options"), RULES[1:])
@pytest.mark.parametrize(("rate", "unsampled"), [(1.0, "frozen"), (0.3, "frozen"), (0.3, "lazy")])
def test_chunks_consumed_in_backward_equal_the_step(ours, theirs, options, rate, unsampled, storage):
    classifiers = [classifier_of(rate, storage_dtype=storage) for _ in range(2)]
    early, late = (
        ours(classifier, lr=0.1, unsampled=unsampled, in_backward=backward, **options)
        for classifier, backward in zip(classifiers, (True, False), strict=True)
    )
    assert classifiers[0].consumer is early and classifiers[1].consumer is None
    for step in range(5):
        (sample, gradient), _ = (draw(classifier, step) for classifier in classifiers)
        early.begin_update()
        if rate == 1:
            for first in (20, 0, 40):
                rows = slice(first, min(first + 20, CLASSES))
                early.consume(rows, gradient[rows].float())
            classifiers[1].prototypes.grad = gradient
        else:
            for rows, is_real in zip(sample.rows_K.split(11), sample.is_real_K.split(11), strict=True):
                early.consume(rows, gradient[rows].float(), is_real)
            set_sampled(classifiers[1], gradient)
        early.step()
        late.step()
    assert classifiers[0].prototypes.grad is None
    early.flush()
    late.flush()
    assert_same(*([c.prototypes, *of(o, c.prototypes)] for c, o in zip(classifiers, (early, late), strict=True)), rtol=1e-5, atol=1e-6)


def trained(rate, in_backward, unsampled, storage):
    """Runs on every rank: losses, and the rows of this rank after training through the classifier."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    classifier = classifier_of(rate, torch.float32, storage_dtype=storage)
    optimizer = RowAdamW(classifier, lr=0.01, unsampled=unsampled, in_backward=in_backward)
    found = []
    for step in range(6):
        features, labels = batch(CLASSES, WIDTH, 6, seed=step)
        loss = classifier(features[rank * 6 // size :][: 6 // size], labels[rank * 6 // size :][: 6 // size])
        loss.backward()
        found.append(loss.detach())
        assert (classifier.prototypes.grad is None) == in_backward
        optimizer.step()
        optimizer.zero_grad()
    optimizer.flush()
    return torch.stack(found), classifier.prototypes.detach()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("rate", "unsampled"), [(1.0, "frozen"), (0.3, "frozen"), (0.3, "lazy")])
def test_training_in_backward_equals_training_in_steps(ranks, rate, unsampled, size):
    for storage, tolerance in (("float32", 1e-5), ("bfloat16", 1e-2)):  # gradients are bfloat16 too, but not in backward
        expected = trained(rate, False, unsampled, storage)
        results = ranks(size).run(trained, rate, True, unsampled, storage) if size > 1 else [trained(rate, True, unsampled, storage)]
        for result in results:
            torch.testing.assert_close(result[0], expected[0], rtol=tolerance, atol=tolerance)
        rows = torch.cat([result[1] for result in results])
        torch.testing.assert_close(rows, expected[1], rtol=tolerance, atol=tolerance)


def test_what_updates_in_backward_cannot_serve_is_refused():
    classifier = classifier_of(dtype=torch.float32)
    optimizer = RowSGD(classifier, lr=0.1, in_backward=True)
    optimizer.begin_update()
    with pytest.raises(ValueError, match="a second backward before RowSGD"):
        optimizer.begin_update()
    with pytest.raises(ValueError, match="the step is half done"):
        optimizer.state_dict()
    optimizer.step()
    with pytest.raises(ValueError, match="clip with in_backward=False"):
        optimizer.clip(1.0)
    classifier.prototypes.grad = torch.zeros_like(classifier.prototypes)
    for call in (optimizer.begin_update, optimizer.step):
        with pytest.raises(ValueError, match=r"prototypes.grad is set, .* call zero_grad\(\)"):
            call()
    classifier.prototypes.grad = None
    optimizer.begin_update()
    optimizer.consume(slice(0, CLASSES), torch.ones(CLASSES, WIDTH))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match="a GradScaler judges gradients after backward"):
        scaler.step(optimizer)

    sampled = classifier_of(0.3, torch.float32)
    optimizer = RowAdamW(sampled, lr=0.1, in_backward=True)
    for _ in range(2):
        sampled(*batch(CLASSES, WIDTH, 6))
    with pytest.raises(ValueError, match="2 samples of classes were drawn"):
        optimizer.begin_update()


@pytest.mark.parametrize("ours", [RowSGD, RowAdamW])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_closure_is_called_with_gradient_and_its_value_returned(ours, in_backward):
    """As Lightning always does."""
    features, labels = batch(CLASSES, WIDTH, 6)
    found = []
    for has_closure in (True, False):
        classifier = classifier_of(0.3, torch.float32)
        optimizer = ours(classifier, lr=0.1, in_backward=in_backward)

        def closure(classifier=classifier, optimizer=optimizer):
            optimizer.zero_grad()
            loss = classifier(features, labels)
            loss.backward()
            return loss

        if has_closure:
            loss = optimizer.step(closure)
        else:
            loss = closure()
            assert optimizer.step() is None
        found.append((loss.detach(), classifier.prototypes.detach()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


class NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), f"hidden wait: {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ours", [RowSGD, RowAdamW])
@pytest.mark.parametrize(("rate", "storage"), [(1.0, "float32"), (0.3, "bfloat16")])
def test_nothing_waits_for_the_device(ours, rate, storage):
    classifier = classifier_of(rate, storage_dtype=storage)
    optimizer = ours(classifier, lr=0.1, unsampled="lazy")
    for step in range(3):
        gradient = draw(classifier, step)[1]
        with NoWaiting():
            if rate < 1:
                optimizer.before_use(classifier.sample.rows_K)
                set_sampled(classifier, gradient)
            else:
                classifier.prototypes.grad = gradient
            optimizer.step()


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_with_bad_features_changes_nothing(rate, in_backward):
    classifier = classifier_of(rate, torch.float32, non_finite="skip")
    optimizer = RowSGD(classifier, lr=0.1, in_backward=in_backward, unsampled="lazy")
    features, labels = batch(CLASSES, WIDTH, 6)
    before = classifier.prototypes.detach().clone()
    features[2, 1] = math.nan
    classifier(features, labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(classifier.prototypes, before) and optimizer.state[classifier.prototypes]["step"] == 0
    assert not of(optimizer, classifier.prototypes)[0].any()
    classifier(*batch(CLASSES, WIDTH, 6)).backward()
    optimizer.step()
    assert not torch.equal(classifier.prototypes, before)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_grad_scaler_skips_steps_and_takes_its_scale_out(rate):
    scaled, plain = (classifier_of(rate, torch.float32) for _ in range(2))
    optimizers = [RowSGD(classifier, lr=0.1) for classifier in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(5):
        features, labels = batch(CLASSES, WIDTH, 6, seed=step)
        loss = scaled(features, labels) * (2.0**120 if step == 2 else 1.0)  # overflows
        scaler.scale(loss).backward()
        scaler.step(optimizers[0])
        scaler.update()
        plain(features, labels).backward()
        if step != 2:
            optimizers[1].step()
        plain.end_step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    torch.testing.assert_close(scaled.prototypes, plain.prototypes)


def clipped(rate, max_norm):
    """Runs on every rank: (norm, clipped gradient), after two micro-batches."""
    classifier = classifier_of(rate)
    optimizer = RowSGD(classifier, lr=0.1)
    sample, gradient = draw(classifier, 0)
    if rate == 1:
        classifier.prototypes.grad = 2 * gradient
    else:
        rows = torch.cat([sample.rows_K, sample.rows_K])[None]
        gradient = torch.where((sample.column_S >= 0)[:, None], gradient, 0.0)
        classifier.prototypes.grad = torch.sparse_coo_tensor(rows, gradient[rows[0]], gradient.shape, check_invariants=False)
    norm = optimizer.clip(max_norm)
    return norm, classifier.prototypes.grad.to_dense() if rate < 1 else classifier.prototypes.grad, 2 * gradient


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_clipping_sees_all_ranks(ranks, rate, max_norm):
    for results in ([clipped(rate, max_norm)], ranks(3).run(clipped, rate, max_norm)):
        found, gradient = (torch.cat([result[part] for result in results]) for part in (1, 2))
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        norm = nn.utils.clip_grad_norm_([parameter], max_norm)
        for result in results:
            torch.testing.assert_close(result[0], norm)
        torch.testing.assert_close(found, parameter.grad)
