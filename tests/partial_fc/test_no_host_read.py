"""No host read on the way of a step: forward, backward and both updates of every loss run on the meta device, whose tensors hold no data,
so that a read raises. On a GPU it would wait for the device. Results cannot be seen here; other tests compare them."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from partial_fc import LogSumExp, PartialFC, RowAdamW, RowSGD, losses, of_classes, similarity_statistics
from partial_fc.optimizers import adamw, sgd

CLASSES, WIDTH, BATCH = 700, 16, 12
OPTIONS = {
    "all classes": {},
    "sampled, corrected": {"sample_rate": 0.1, "correct_rate": True},
    "hard negatives": {"sample_rate": 0.1, "hard_negatives": 3, "non_finite": "skip"},
    "substitution": {"substitution_rate": 0.5},
    "substitution, sampled": {"substitution_rate": 0.5, "sample_rate": 0.1},
    "bank": {"substitution_rate": 0.5, "substitution_source": "bank", "sample_rate": 0.1},
    "bfloat16": {"dtype": "bfloat16", "storage_dtype": "bfloat16", "gather_dtype": "bfloat16"},
    "bfloat16, sampled": {"dtype": "bfloat16", "sample_rate": 0.1},
}
RULES = [RowSGD, RowAdamW]  # the latter with bfloat16
REFUSED = {("broadface", option) for option in ("substitution", "substitution, sampled", "bank")} | {
    (name, "sampled, corrected") for name in ("sphereface2", "uce")
}


def unfused(rule):
    def of_cpu_steps(*tensors, fused, **options):  # adamw's last argument; without "fused" it wants them there
        *tensors, steps = tensors
        return rule(*tensors, [torch.zeros(()) if step.ndim == 0 else step for step in steps], foreach=False, **options)

    return of_cpu_steps


@pytest.fixture(autouse=True)
def what_meta_lacks(monkeypatch):
    """Autocast does not know the device, and the fused optimizers have no form for it. The check of the input is the one allowed read."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    for module, name in ((sgd, "sgd"), (adamw, "adamw")):
        monkeypatch.setattr(module, name, unfused(getattr(module, name)))
    monkeypatch.setattr(PartialFC, "_check", lambda *_: None)


def steps(loss, rule, count=2, micro=1, **options):
    """Steps of a classifier on the meta device."""
    counts = torch.arange(1, CLASSES + 1)
    classifier = PartialFC(CLASSES, WIDTH, loss, class_counts=counts, device="meta", **options)
    optimizer = rule(classifier)
    for _ in range(count):
        labels = torch.zeros(BATCH, dtype=torch.int64, device="meta")
        if micro > 1:
            classifier.begin_step(labels.repeat(micro))
        for _ in range(micro):
            features = torch.zeros(BATCH, WIDTH, device="meta", requires_grad=True)
            classifier(features, labels).backward()
            assert features.grad.shape == features.shape
        optimizer.step()
        optimizer.zero_grad()
    classifier.cosines(features, labels)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, marks=[pytest.mark.long] * ((i + j) % 3 > 0))  # a third of them, else each with each
        for i, name in enumerate(losses.REGISTRY)
        for j, options in enumerate(OPTIONS)
    ],
)
def test_losses(name, options):
    with pytest.raises(ValueError, match="use ") if (name, options) in REFUSED else contextlib.nullcontext():
        steps(losses.build(name), partial(RULES[options.startswith("bfloat16")], lr=0.1), **OPTIONS[options])


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("unsampled", ["frozen", "lazy"])
@pytest.mark.parametrize("rule", [RowSGD, RowAdamW])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_optimizers(rule, unsampled, in_backward, storage):
    making = partial(rule, lr=0.1, unsampled=unsampled, in_backward=in_backward)
    steps(losses.build("cosface"), making, sample_rate=0.1, storage_dtype=storage)


def test_micro_batches():
    steps(losses.build("cosface"), partial(RowSGD, lr=0.1), micro=2, sample_rate=0.1)


class Launches(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_step_is_few_large_operations():
    """A rank with a quarter of a million classes and a batch of 4096, in torch operations: some 100 for each chunk of a GPU's size."""
    prototypes = torch.zeros(250_000, 512, device="meta", requires_grad=True)
    features = torch.zeros(4096, 512, device="meta", requires_grad=True)
    columns = of_classes(prototypes, torch.zeros(4096, dtype=torch.int64, device="meta"))
    with Launches() as launches:
        similarity_statistics(features, columns, LogSumExp(), scale=64.0, dtype="bfloat16", kernel="chunked").non_target_B.sum().backward()
    print(f"{launches.count} operations")
    assert launches.count < 2000
