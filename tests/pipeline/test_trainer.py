"""Whole training runs: the same on any number of ranks, micro-batches and engine, and across interruptions."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pipeline.runs import configuration, faces, train_losses, train_until

STEPS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces(str(tmp_path_factory.mktemp("faces")))


@pytest.fixture(scope="module")
def one_rank(ranks, data, tmp_path_factory):
    """Losses of the undisturbed run on one rank."""
    return ranks(1).run(train_losses, configuration(data, str(tmp_path_factory.mktemp("one")), STEPS))[0]


def assert_equal(losses, expected, tolerance):
    assert len(losses) == len(expected) == STEPS
    print(f"largest relative deviation of {STEPS} losses: {max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)):.1e}")
    np.testing.assert_allclose(losses, expected, rtol=tolerance)


@pytest.mark.parametrize("size", [2, 4])
def test_losses_do_not_depend_on_the_number_of_ranks(ranks, data, one_rank, size, tmp_path):
    assert_equal(ranks(size).run(train_losses, configuration(data, str(tmp_path), STEPS))[0], one_rank, 1e-4)
    assert one_rank[-1] < one_rank[STEPS // 3]  # and it learns


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_deepspeed_equals_ddp(ranks, data, optimizer, tmp_path):
    losses = [
        ranks(2).run(train_losses, configuration(data, str(tmp_path / engine), STEPS, engine, optimizer={"name": optimizer}))[0]
        for engine in ("ddp", "deepspeed")
    ]
    assert_equal(losses[1], losses[0], 1e-5)


@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_accumulation_equals_the_large_batch(ranks, data, one_rank, engine, tmp_path):
    config = configuration(data, str(tmp_path), STEPS, engine, run={"accumulation": 3})
    assert_equal(ranks(2).run(train_losses, config)[0], one_rank, 1e-4)


@pytest.mark.parametrize(
    ("engines", "optimizer"),
    [(("deepspeed", "deepspeed", "deepspeed"), "sgd"), (("ddp", "deepspeed", "ddp"), "sgd"), (("deepspeed", "ddp", "deepspeed"), "adamw")],
)
def test_resume_on_other_numbers_of_ranks(ranks, data, one_rank, engines, optimizer, tmp_path):
    def config(engine, folder="run"):
        return configuration(data, str(tmp_path / folder), STEPS, engine, optimizer={"name": optimizer}, save_every=5)

    ranks(2).run(train_until, config(engines[0]), 12)  # the last checkpoint is of step 10
    ranks(4).run(train_until, config(engines[1]), 20)
    losses = ranks(1).run(train_losses, config(engines[2]))[0]
    if optimizer == "sgd":
        assert_equal(losses, one_rank, 1e-4)
    else:
        assert_equal(losses, ranks(1).run(train_losses, config("ddp", "undisturbed"))[0], 1e-4)
