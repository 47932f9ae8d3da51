"""Stochastic rounding: unbiased, reproducible, the same however the classes are shared out; and prototypes kept in bfloat16."""

from __future__ import annotations

import math

import pytest
import torch

from partial_fc import RowAdamW, RowSGD
from partial_fc.optimizers.rounding import round_to_bfloat16
from tests.partial_fc.test_optimizers import CLASSES, WIDTH, classifier_of, draw, normal, of, set_sampled


def test_rounding_is_unbiased_and_between_neighbours():
    ids = torch.arange(20_000)
    for share in (0.0, 1 / 65536, 0.3, 0.5, 0.999):
        for sign, base in ((1, 1.0), (-1, 0.0123291015625)):
            step = 2.0 ** (math.frexp(base)[1] - 8)  # to the next bfloat16
            x = torch.full((len(ids), WIDTH), sign * (base + share * step), dtype=torch.float32)
            up = (round_to_bfloat16(x.clone(), ids, (1, 2, 3)).double() - sign * base) / (sign * step)
            assert set(up.unique().tolist()) <= {0.0, 1.0}
            assert abs(float(up.mean()) - share) <= 5 * math.sqrt(share * (1 - share) / up.numel())
    special = torch.tensor([[math.inf, -math.inf, math.nan, 0.0, -0.0]])
    torch.testing.assert_close(round_to_bfloat16(special.clone(), ids[:1], (0,)), special.bfloat16(), equal_nan=True)


def test_rounding_depends_on_key_class_and_column_alone():
    x, ids = normal(300, 7, seed=0, dtype=torch.float32), torch.arange(300)
    whole = round_to_bfloat16(x.clone(), ids, (1, 2, 0))
    order = torch.randperm(300)
    assert torch.equal(round_to_bfloat16(x[order], ids[order], (1, 2, 0)), whole[order])
    assert torch.equal(round_to_bfloat16(x[:, :5].contiguous(), ids, (1, 2, 0)), whole[:, :5])
    for key in ((1, 2, 1), (1, 3, 0), (2, 2, 0)):
        differ = round_to_bfloat16(x.clone(), ids, key) != whole
        assert 0.2 < differ.double().mean() < 0.45  # a third of the pairs of roundings, on average over the cut off part
    assert len(torch.unique(round_to_bfloat16(torch.full((300, 7), 1.004), ids, (0,)), dim=0)) > 60  # of 128


def test_bfloat16_prototypes_follow_float32_on_average():
    """Each step is a twentieth of the distance of two bfloat16 numbers: rounded to the nearest, nothing would ever move."""
    classifier = classifier_of(storage_dtype="bfloat16", classes=400)
    classifier.prototypes.data.fill_(1.0)
    optimizer = RowSGD(classifier, lr=1.0, momentum=0.0, weight_decay=0.0)
    for _ in range(100):
        classifier.prototypes.grad = torch.full_like(classifier.prototypes, -(2.0**-7) / 20)
        optimizer.step()
    moved = (classifier.prototypes.detach().double() - 1) * 2**7  # 5 on average, variance at most 100 x 0.05 x 0.95
    assert abs(float(moved.mean()) - 5) < 5 * math.sqrt(100 * 0.05 * 0.95 / moved.numel())
    assert of(optimizer, classifier.prototypes)[0].dtype == torch.float32


def sharded_bfloat16(classes, rate, kind, options):
    """Runs on every rank: bfloat16 prototypes after steps with gradients that are a function of the class."""
    classifier = classifier_of(rate, classes=classes, storage_dtype="bfloat16")
    optimizer = {"sgd": RowSGD, "adamw": RowAdamW}[kind](classifier, lr=0.01, **options)
    for step in range(6):
        if rate < 1:
            set_sampled(classifier, draw(classifier, step)[1])
        else:
            classifier.prototypes.grad = draw(classifier, step)[1]
        optimizer.step()
    optimizer.flush()
    return classifier.prototypes.detach()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(("rate", "options"), [(1.0, {}), (0.3, {}), (0.3, {"unsampled": "lazy"})])
def test_bfloat16_prototypes_do_not_depend_on_the_ranks(ranks, rate, options, kind):
    for classes, size in ((CLASSES, 3), (5, 4)):  # 2, 2, 1 and 0 classes
        arguments = classes, rate, kind, options
        assert torch.equal(torch.cat(ranks(size).run(sharded_bfloat16, *arguments)), sharded_bfloat16(*arguments))
