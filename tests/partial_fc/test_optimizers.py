"""Row optimizers against torch's dense ones and a row by row computation in float64: rate 1, frozen and lazy rows, state dicts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from partial_fc import PartialFC, RowAdamW, RowSGD, losses
from partial_fc.device_policy import forced
from tests.partial_fc.test_classifier import batch
from tests.policies import POLICIES

CLASSES, WIDTH = 57, 5
SGD, NESTEROV = {"momentum": 0.9, "weight_decay": 1e-2}, {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
ADAMW = {"betas": (0.9, 0.99), "weight_decay": 0.1}
RULES = [
    pytest.param(RowSGD, torch.optim.SGD, {"momentum": 0.0, "weight_decay": 1e-2}, id="plain"),
    pytest.param(RowSGD, torch.optim.SGD, SGD, id="momentum"),
    pytest.param(RowSGD, torch.optim.SGD, NESTEROV, id="nesterov"),
    pytest.param(RowAdamW, torch.optim.AdamW, ADAMW, id="adamw"),
]


@pytest.fixture(autouse=True, params=POLICIES)
def policy(request):
    with forced(POLICIES[request.param]):
        yield request.param


def classifier_of(rate=1.0, dtype=torch.float64, classes=CLASSES, **options):
    classifier = PartialFC(classes, WIDTH, losses.build("cosface", scale=16.0), rate, seed=3, **options)
    if options.get("storage_dtype") is None:
        classifier.prototypes.data = classifier.prototypes.data.to(dtype)
    return classifier


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw(classifier, seed):
    """A sample for some labels, and a gradient [S, D] that is a function of seed and class id."""
    classes, first = classifier.shard.num_classes, classifier.shard.first
    classifier.begin_step(torch.randint(0, classes, (3,), generator=torch.Generator().manual_seed(seed)))
    gradient = normal(classes, WIDTH, seed=seed)[first : first + classifier.shard.rows]
    return classifier.sample, gradient.to(classifier.prototypes.dtype)


def set_sampled(classifier, gradient):
    """prototypes.grad as backward leaves it. The gradient of padding is not 0, to see that it is not used."""
    rows = classifier.sample.rows_K
    classifier.prototypes.grad = torch.sparse_coo_tensor(rows[None], gradient[rows], gradient.shape, check_invariants=False)


def of(optimizer, parameter):
    """The matrices of an optimizer's state."""
    return [value for name, value in sorted(optimizer.state[parameter].items()) if name != "step" and value is not None]


def assert_same(found, expected, **tolerances):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ours", "theirs", "options"), RULES)
def test_200_steps_at_rate_1_equal_torch(ours, theirs, options, dtype):
    classifier, parameter = classifier_of(dtype=dtype), nn.Parameter(classifier_of(dtype=dtype).prototypes.detach().clone())
    optimizers = [ours(classifier, lr=0.02, **options), theirs([parameter], lr=0.02, **options)]
    for step in range(200):
        target = normal(CLASSES, WIDTH, seed=step, dtype=dtype)
        for prototypes, optimizer in zip((classifier.prototypes, parameter), optimizers, strict=True):
            prototypes.grad = (prototypes.detach() - target).tanh()
            optimizer.param_groups[0]["lr"] = 0.02 * (1 + math.sin(step))
            optimizer.step()
    tolerances = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(classifier.prototypes, parameter, **tolerances)
    if options.get("momentum") != 0:
        assert_same(of(optimizers[0], classifier.prototypes), of(optimizers[1], parameter), **tolerances)


@pytest.mark.parametrize(("ours", "theirs", "options"), RULES)
def test_200_training_steps_at_rate_1_equal_torch(ours, theirs, options):
    classifiers = [PartialFC(CLASSES, 8, losses.build("cosface", scale=16.0)) for _ in range(2)]
    optimizers = [ours(classifiers[0], lr=0.01, **options), theirs(classifiers[1].parameters(), lr=0.01, **options)]
    for step in range(200):
        features, labels = batch(CLASSES, 8, 12, seed=step)
        for classifier, optimizer in zip(classifiers, optimizers, strict=True):
            classifier(features, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(classifiers[0].prototypes, classifiers[1].prototypes, rtol=1e-4, atol=1e-5)


def moved_by_hand(name, weight, state, grad, lr, step, options):
    """One row, float64, from the papers' formulas; steps count from 1."""
    decay = options["weight_decay"]
    if name == "RowSGD":
        (momentum,) = state
        grad = grad + decay * weight
        momentum = options["momentum"] * momentum + grad
        return weight - lr * (grad + options["momentum"] * momentum if options.get("nesterov") else momentum), [momentum]
    (b1, b2), (mean, square) = options["betas"], state
    mean, square = b1 * mean + (1 - b1) * grad, b2 * square + (1 - b2) * grad**2
    move = mean / (1 - b1**step) / ((square / (1 - b2**step)).sqrt() + 1e-8)
    return weight - lr * (move + decay * weight), [mean, square]


@pytest.mark.parametrize(("ours", "theirs", "options"), RULES[1:])
def test_frozen_rows_and_padding_stay_bit_for_bit(ours, theirs, options):
    classifier = classifier_of(rate=0.3)
    optimizer = ours(classifier, lr=0.1, **options)
    saw_padding = False
    for step in range(1, 31):
        sample, gradient = draw(classifier, step)
        set_sampled(classifier, gradient)
        before = [classifier.prototypes.detach().clone(), *(matrix.clone() for matrix in of(optimizer, classifier.prototypes))]
        optimizer.step()
        after = [classifier.prototypes.detach(), *of(optimizer, classifier.prototypes)]
        for row in range(CLASSES):
            weight, *state = (matrix[row] for matrix in before)
            if sample.column_S[row] >= 0:
                weight, state = moved_by_hand(ours.__name__, weight, state, gradient[row], 0.1, step, options)
                assert_same([matrix[row] for matrix in after], [weight, *state], rtol=1e-12, atol=1e-14)
            else:
                assert all(torch.equal(a[row], b[row]) for a, b in zip(after, before, strict=True))
                saw_padding |= bool((sample.rows_K == row).any())
    assert saw_padding


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(RowSGD, torch.optim.SGD, SGD), (RowSGD, torch.optim.SGD, NESTEROV), (RowAdamW, torch.optim.AdamW, ADAMW)]),
    st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.5), (0.9, 0.9)]),
    st.integers(1, 30),
    st.floats(0.01, 0.9),
    st.lists(st.sampled_from([0.0, 1e-4, 1e-2, 0.3]), min_size=1, max_size=60),
    st.sets(st.integers(0, 59), max_size=3),
    st.integers(0, 10**6),
)
def test_lazy_rows_are_where_the_dense_optimizer_has_them(rule, betas, classes, rate, rates, flushes, seed):
    (ours, theirs, options), tolerances = rule, {"rtol": 1e-9, "atol": 1e-12}
    options = {**options, "betas": betas} if "betas" in options else options
    classifier = classifier_of(rate, classes=classes)
    parameter = nn.Parameter(classifier.prototypes.detach().clone())
    optimizer, dense = ours(classifier, lr=0.1, unsampled="lazy", **options), theirs([parameter], lr=0.1, **options)
    classifier.step = seed
    for step, lr in enumerate(rates):
        sample, gradient = draw(classifier, seed + step)
        gradient *= 10.0 ** (normal(*gradient.shape, seed=step) * 4 - 6)  # to AdamW's epsilon and below
        rows = sample.rows_K[sample.is_real_K]  # up to date now
        torch.testing.assert_close(classifier.prototypes[rows], parameter[rows], **tolerances)
        set_sampled(classifier, gradient)
        parameter.grad = torch.where((sample.column_S >= 0)[:, None], gradient, 0.0)
        for each in (optimizer, dense):
            each.param_groups[0]["lr"] = lr
            each.step()
        if step in flushes:
            optimizer.flush()
            torch.testing.assert_close(classifier.prototypes, parameter, **tolerances)
    optimizer.state_dict()
    torch.testing.assert_close(classifier.prototypes, parameter, **tolerances)
    assert_same(of(optimizer, classifier.prototypes), of(dense, parameter), **tolerances)


@pytest.mark.parametrize(
    ("ours", "options", "expected"),
    [(RowAdamW, {}, [4, 20, 82, 298, 554]), (RowSGD, {}, []), (RowSGD, {"most_missed": 200}, [200, 400, 600])],
)
def test_rows_that_are_never_sampled_miss_a_bounded_number_of_steps(ours, options, expected, monkeypatch):
    for name, value in options.items():
        monkeypatch.setattr(ours, name, value)
    classifier = classifier_of(rate=1e-9, dtype=torch.float32, classes=9)
    optimizer, flushed = ours(classifier, lr=0.1, unsampled="lazy", weight_decay=0.1), []
    before = classifier.prototypes.detach().clone()
    for step in range(600):
        classifier.begin_step(torch.zeros(1, dtype=torch.int64))
        set_sampled(classifier, torch.ones(9, WIDTH))
        optimizer.step()
        if not torch.equal(classifier.prototypes[8], before[8]):
            flushed.append(step + 1)
            before = classifier.prototypes.detach().clone()
    assert flushed == expected


def train(optimizer_of, rate, steps, storage, dense=False):
    """Runs on every rank: prototypes and state of its rows after training through the classifier, in float32."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ours, options = optimizer_of
    classifier = classifier_of(rate, torch.float32, storage_dtype=storage, feature_gradient="global")
    optimizer = ours(classifier.parameters() if dense else classifier, lr=0.1, **options)
    for step in range(steps):
        features, labels = batch(CLASSES, WIDTH, 12, seed=step)
        mine = slice(rank * 12 // size, (rank + 1) * 12 // size)
        classifier(features[mine], labels[mine]).backward()
        if dense:
            classifier.prototypes.grad = classifier.prototypes.grad.to_dense()
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()
        classifier.end_step()
    if not dense:
        optimizer.flush()
    return [classifier.prototypes.detach(), *of(optimizer, classifier.prototypes)]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("ours", "theirs", "options"), RULES[1:])
def test_lazy_training_equals_the_dense_optimizer_on_the_sampled_loss(ranks, size, ours, theirs, options):
    lazy = (ours, {**options, "unsampled": "lazy"})
    results = ranks(size).run(train, lazy, 0.2, 12, "float32") if size > 1 else [train(lazy, 0.2, 12, "float32")]
    found = [torch.cat(parts) for parts in zip(*results, strict=True)]
    assert_same(found, train((theirs, options), 0.2, 12, "float32", dense=True), rtol=1e-4, atol=1e-5)


def test_parameters_beside_the_prototypes_move_as_with_torch():
    classifier = classifier_of(rate=0.3)
    classifier.threshold, classifier.thresholds = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(4))
    others = [nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(4))]
    optimizer, dense = RowSGD(classifier, lr=0.1, unsampled="lazy"), torch.optim.SGD(others, lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(3):
        set_sampled(classifier, draw(classifier, step)[1])
        for parameter in (classifier.threshold, classifier.thresholds, *others):
            parameter.grad = torch.full_like(parameter, 0.5 + step)
        optimizer.step()
        dense.step()
    assert_same([classifier.threshold, classifier.thresholds], others)


@pytest.mark.parametrize(
    ("ours", "options", "sentence"),
    [
        (RowSGD, {"unsampled": "lasy"}, "unsampled is 'lasy', but must be 'frozen' or 'lazy'"),
        (RowSGD, {"weight_decay": -1.0}, "weight_decay >= 0"),
        (RowAdamW, {"eps": 0.0}, "eps > 0"),
        (RowAdamW, {"betas": (0.9, 1.0)}, r"betas in \[0, 1\) and \(0, 1\), but got 0.9 and 1.0"),
    ],
)
def test_bad_options_end_in_a_sentence(ours, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ours(classifier_of(), lr=0.1, **options)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize(("ours", "theirs", "options"), RULES[1:])
@pytest.mark.parametrize(("rate", "unsampled"), [(1.0, "frozen"), (0.3, "frozen"), (0.3, "lazy")])
def test_a_run_goes_on_from_state_dicts(ours, theirs, options, rate, unsampled, storage, tmp_path):
    def steps(classifier, optimizer, numbers):
        for step in numbers:
            classifier.step = step
            gradient = draw(classifier, step)[1]
            if rate < 1:
                set_sampled(classifier, gradient)
            else:
                classifier.prototypes.grad = gradient
            optimizer.step()
        optimizer.flush()

    classifiers = [classifier_of(rate, storage_dtype=storage) for _ in range(2)]
    first, second = (
        ours(classifier, lr=lr, unsampled=unsampled, **options) for classifier, lr in zip(classifiers, (0.1, 7.0), strict=True)
    )
    steps(classifiers[0], first, range(4))
    torch.save([classifiers[0].state_dict(), first.state_dict()], tmp_path / "state.pt")
    steps(classifiers[0], first, range(4, 8))
    weights, state = torch.load(tmp_path / "state.pt")
    classifiers[1].load_state_dict(weights)
    second.load_state_dict(state)
    steps(classifiers[1], second, range(4, 8))
    assert_same(*([c.prototypes, *of(o, c.prototypes)] for c, o in zip(classifiers, (first, second), strict=True)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ours", "theirs", "options"), RULES[1:])
def test_the_state_of_torchs_own_optimizer_can_be_loaded(ours, theirs, options):
    classifier, parameter = classifier_of(), nn.Parameter(classifier_of().prototypes.detach().clone())
    dense, optimizer = theirs([parameter], lr=0.1, **options), ours(classifier, lr=7.0, **options)
    for step in range(6):
        if step == 3:
            classifier.prototypes.data.copy_(parameter.data)
            optimizer.load_state_dict(dense.state_dict())
        gradient = normal(CLASSES, WIDTH, seed=step)
        parameter.grad, classifier.prototypes.grad = gradient.clone(), gradient.clone()
        dense.step()
        optimizer.step()
    if ours is RowAdamW:
        assert optimizer.state[classifier.prototypes]["step"] == 6
        with pytest.raises(
            ValueError, match=r"exp_avg has shape \[57, 5\], but this rank's parameter has \[9, 5\]: load it on as many ranks"
        ):
            ours(classifier_of(classes=9), lr=0.1).load_state_dict(dense.state_dict())
