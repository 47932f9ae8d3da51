"""Bad input: a sentence that names the place, before an optimizer touches anything; or a step that is left out."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
import torch.distributed as dist

from partial_fc import ClassifierConfig, PartialFC, RowSGD, losses
from partial_fc.classifier import MOST_CHECKS
from partial_fc.device_policy import GPU, forced
from tests.partial_fc.test_classifier import batch

CLASSES, WIDTH = 37, 8
NAN, INF = float("nan"), float("inf")


def build(rate=1.0, **options):
    classifier = PartialFC(CLASSES, WIDTH, losses.build("cosface", scale=16.0), rate, seed=3, **options)
    return classifier, RowSGD(classifier, lr=0.1)


def knowing(is_late):
    """Late is as on a GPU: the host learns what is in a batch when it asks."""
    return forced(GPU) if is_late else contextlib.nullcontext()


def parameters(classifier, optimizer):
    return [classifier.prototypes.detach().clone(), optimizer.state[classifier.prototypes]["momentum_buffer"].clone()]


def step(classifier, optimizer, *micro_batches):
    """One whole step: whether it is finite."""
    if len(micro_batches) > 1:
        classifier.begin_step(torch.cat([labels for _, labels in micro_batches]))
    for features, labels in micro_batches:
        (classifier(features.clone().requires_grad_(), labels) / len(micro_batches)).backward()
    is_finite = classifier.is_finite()
    assert is_finite == classifier.is_finite()  # asking again changes nothing
    optimizer.step()
    optimizer.zero_grad()
    return is_finite


def sentence_of(kind, rows, rate, is_late):
    """Runs on every rank: the sentence about a bad row of the last one, and whether weights and momentum are as before."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    classifier, optimizer = build(rate, uneven_batches=True)
    features, labels = (x.split(rows)[rank].clone() for x in batch(CLASSES, WIDTH, sum(rows)))
    step(classifier, optimizer, (features, labels))
    before = parameters(classifier, optimizer)
    if rank == len(rows) - 1 and isinstance(kind, int):
        labels[1] = kind
    elif rank == len(rows) - 1:
        features[1, 2] = kind
    classifier.step = 17
    with knowing(is_late), pytest.raises(ValueError) as caught:
        step(classifier, optimizer, (features, labels))
    return str(caught.value), all(map(torch.equal, parameters(classifier, optimizer), before))


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (NAN, r"features of rank {last} at step 17 \(row 1 of its batch\) hold NaN or infinity, as do 1 of {rows} rows .*non_finite=skip"),
        (INF, r"features of rank {last} at step 17 \(row 1 of its batch\) hold NaN or infinity"),
        (-INF, r"hold NaN or infinity"),
        (
            CLASSES,
            r"label 37 of rank {last} at step 17 \(row 1 of its batch\) is not a class: labels must lie in \[0, 37\), and 1 of {rows}",
        ),
        (-1, r"label -1 of rank {last} at step 17"),
        (2**62, r"label 4611686018427387904 of rank {last}"),
    ],
)
@pytest.mark.parametrize("rows", [[4], [3, 0, 2]])
def test_values(ranks, kind, sentence, rows, rate, is_late):
    arguments = (kind, rows, rate, is_late)
    results = ranks(len(rows)).run(sentence_of, *arguments) if len(rows) > 1 else [sentence_of(*arguments)]
    assert len(set(results)) == 1  # every rank says the same
    assert results[0][1]
    assert re.search(sentence.format(last=len(rows) - 1, rows=sum(rows)), results[0][0])


def train_with_bad_batches(rate, micro, is_late, bad_steps):
    """Runs on every rank: weights and momentum after 6 steps, of which some have a row of NaN or infinity on one rank."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    classifier, optimizer = build(rate, non_finite="skip")
    for number in range(6):
        batches = [[x.chunk(size)[rank].clone() for x in batch(CLASSES, WIDTH, 12, seed=10 * number + part)] for part in range(micro)]
        if number in bad_steps:
            if bad_steps[number] is None:  # what the step should come to
                continue
            if rank == size - 1:
                batches[0][0][2] = bad_steps[number]
        classifier.step = number
        with knowing(is_late):
            assert step(classifier, optimizer, *batches) == (number not in bad_steps)
    assert classifier.skipped_steps == sum(value is not None for value in bad_steps.values())
    return parameters(classifier, optimizer)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(("rate", "micro"), [(1.0, 1), (1.0, 3), (0.3, 1), (0.3, 3)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_bad_step_is_left_out_and_counted(ranks, size, rate, micro, is_late):
    found, expected = (
        ranks(size).run(train_with_bad_batches, rate, micro, is_late, bad)
        for bad in ({1: NAN, 2: INF, 4: -INF}, {1: None, 2: None, 4: None})
    )
    for one, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, one, other))


def test_bad_labels_are_never_left_out():
    classifier, _ = build(non_finite="skip")
    features, labels = batch(CLASSES, WIDTH, 4)
    features[0] = NAN
    labels[3] = CLASSES
    with pytest.raises(ValueError, match="label 37 of rank 0"):
        classifier(features, labels)


def test_labels_that_begin_step_did_not_see():
    classifier, _ = build(0.3)
    features, labels = batch(CLASSES, WIDTH, 4)
    other = min(set(range(CLASSES)) - set(labels.tolist()))
    classifier.begin_step(labels)
    classifier(features, labels.flip(0))
    with pytest.raises(ValueError, match=rf"label {other} of rank 0 at step 0 \(row 2 .*was not given to begin_step"):
        classifier(features, torch.where(torch.arange(4) == 2, other, labels))


def test_without_gradient_nothing_is_left_for_the_optimizer_to_read():
    classifier, optimizer = build(non_finite="skip")
    features, labels = batch(CLASSES, WIDTH, 4)
    with knowing(True), torch.no_grad():
        assert classifier(torch.full_like(features, NAN), labels).isnan()
    assert step(classifier, optimizer, (features, labels)) and classifier.skipped_steps == 0


def test_checks_that_nobody_asks_for_do_not_pile_up():
    classifier, _ = build()
    features, labels = batch(CLASSES, WIDTH, 4)
    with knowing(True):
        for _ in range(MOST_CHECKS - 1):
            classifier(torch.full_like(features, NAN), labels)
        with pytest.raises(ValueError, match="NaN or infinity"):
            classifier(features, labels)


FEATURES, LABELS = torch.ones(4, WIDTH), torch.arange(4)


@pytest.mark.parametrize(
    ("features", "labels", "sentence"),
    [
        (torch.ones(4, WIDTH + 1), LABELS, r"features have shape \(4, 9\), but must be \[samples, 8\]"),
        (torch.ones(WIDTH), LABELS, r"features have shape \(8,\)"),
        (FEATURES.long(), LABELS, "features are torch.int64"),
        (FEATURES, LABELS[:3], "4 rows of features, but 3 labels"),
        (FEATURES, LABELS.int(), r"labels are torch.int32 .*labels.long\(\)"),
        (FEATURES, LABELS.float(), r"labels are torch.float32"),
        (FEATURES, LABELS[:, None], r"of shape \(4, 1\)"),
        (FEATURES[:0], LABELS[:0], "the batch is empty on every rank"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "cosines"])
def test_shapes(features, labels, sentence, call):
    with pytest.raises(ValueError, match=sentence):
        getattr(build()[0], call)(features, labels)


def empty_batch():
    """Runs on every rank."""
    classifier, _ = build(0.3, uneven_batches=True)
    for call in (lambda: classifier(FEATURES[:0], LABELS[:0]), lambda: classifier.begin_step(LABELS[:0])):
        with pytest.raises(ValueError, match="the batch is empty on every rank"):
            call()


def test_an_empty_batch_on_every_rank(ranks):
    ranks(2).run(empty_batch)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "float16"}, "dtype is 'float16', but must be 'float32' or 'bfloat16'"),
        ({"storage_dtype": torch.bfloat16}, "storage_dtype is torch.bfloat16, but"),
        ({"gather_dtype": "half"}, "gather_dtype is 'half'"),
        ({"non_finite": "ignore"}, "non_finite is 'ignore', but must be 'raise' or 'skip'"),
    ],
)
def test_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**options)


@pytest.mark.parametrize("zero", ["feature", "prototype", "both"])
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_a_zero_vector_has_cosine_0_and_no_gradient(zero, rate):
    classifier, _ = build(rate)
    features, labels = batch(CLASSES, WIDTH, 6)
    features = features.requires_grad_()
    target = int(labels[2])
    with torch.no_grad():
        if zero != "prototype":
            features[2] = 0
        if zero != "feature":
            classifier.prototypes[target] = 0
    classifier(features, labels).backward()
    grad_prototypes = classifier.prototypes.grad.to_dense()
    for gradient in (features.grad, grad_prototypes):
        assert gradient.isfinite().all() and gradient.abs().max() < 1e4 and gradient.any()
    if zero != "prototype":
        assert not features.grad[2].any()
    if zero != "feature":
        assert not grad_prototypes[target].any()
    cosines, _ = classifier.cosines(features.detach(), labels)
    assert float(cosines[2]) == 0


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("non_finite", ["raise", "skip"])
def test_a_loss_that_is_not_finite_though_features_are(is_late, non_finite, monkeypatch):
    classifier, optimizer = build(non_finite=non_finite)
    before = classifier.prototypes.detach().clone()
    loss_class = type(classifier.loss)
    call = loss_class.__call__
    monkeypatch.setattr(loss_class, "__call__", lambda self, batch: call(self, batch) * INF)
    features, labels = batch(CLASSES, WIDTH, 4)
    with knowing(is_late):
        if non_finite == "raise":
            with pytest.raises(ValueError, match=r"the loss of step 0 is inf, though its features are finite: .*non_finite=skip"):
                step(classifier, optimizer, (features, labels))
        else:
            assert not step(classifier, optimizer, (features, labels)) and classifier.skipped_steps == 1
    assert torch.equal(classifier.prototypes, before)


def test_a_loop_of_ones_own_raises_unless_told_otherwise():
    assert PartialFC(CLASSES, WIDTH, "cosface").config.non_finite == "raise"
    assert ClassifierConfig().non_finite == "skip"  # of a run, whose trainer asks before it moves the backbone
