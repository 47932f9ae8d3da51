"""Whole training runs: the same on any number of ranks, micro-batches and engine, and across interruptions."""

from __future__ import annotations

import os
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.distributed import join
from pipeline.train import train
from pipeline.trainer import Trainer
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


@pytest.mark.parametrize(("size", "engine"), [(2, "deepspeed"), (4, "deepspeed"), (4, "ddp")])
def test_losses_do_not_depend_on_the_number_of_ranks(ranks, data, one_rank, size, engine, tmp_path):
    assert_equal(ranks(size).run(train_losses, configuration(data, str(tmp_path), STEPS, engine))[0], one_rank, 1e-4)
    assert one_rank[-1] < one_rank[STEPS // 3]  # and it learns


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_deepspeed_equals_ddp(ranks, data, optimizer, tmp_path):
    losses = [
        ranks(2).run(train_losses, configuration(data, str(tmp_path / engine), STEPS, engine, optimizer={"name": optimizer}))[0]
        for engine in ("ddp", "deepspeed")
    ]
    assert_equal(losses[1], losses[0], 1e-5)


def test_sampled_classes_do_not_depend_on_ranks_micro_batches_or_interruptions(ranks, data, tmp_path):
    def config(folder, accumulation=1):
        options = {"sample_rate": 0.3, "save_every": 5, "run": {"accumulation": accumulation}}
        return configuration(data, str(tmp_path / folder), STEPS, **options)

    whole = ranks(1).run(train_losses, config("whole"))[0]
    ranks(2).run(train_until, config("broken", accumulation=3), 12)
    assert_equal(ranks(4).run(train_losses, config("broken"))[0], whole, 1e-4)


def test_zero_2_and_a_clip_that_binds(ranks, data, tmp_path):
    options = {"optimizer": {"clip": 0.05}, "run": {"accumulation": 3}}
    losses = [
        ranks(2).run(train_losses, configuration(data, str(tmp_path / engine), STEPS, engine, engine_options=stage, **dict(options)))[0]
        for engine, stage in (("ddp", {}), ("deepspeed", {"zero_stage": 2}))
    ]
    assert_equal(losses[1], losses[0], 1e-5)


def test_bfloat16_and_batch_statistics_resume_on_the_same_ranks(ranks, data, tmp_path):
    def config(folder):
        options = {"backbone": "small", "engine_options": {"precision": "bfloat16"}, "save_every": 5}
        return configuration(data, str(tmp_path / folder), STEPS, "deepspeed", **options)

    ranks(2).run(train_until, config("broken"), 12)
    losses = [ranks(2).run(train_losses, config(folder))[0] for folder in ("broken", "whole")]
    assert_equal(losses[0], losses[1], 1e-4)


def test_going_back_to_an_earlier_checkpoint_keeps_the_later_ones_aside(ranks, data, one_rank, tmp_path):
    config = configuration(data, str(tmp_path), STEPS, save_every=10)
    ranks(2).run(train_losses, config)
    early = os.path.join(config.run.folder, "checkpoints", "step-00000010")
    ranks(2).run(train_until, config, 15, early)
    names = os.listdir(os.path.dirname(early))
    assert {"step-00000010", "step-00000020.superseded", "step-00000030.superseded"} <= set(names)
    assert_equal(ranks(2).run(train_losses, config)[0], one_rank, 1e-4)


def diverge(config):
    """Runs on every rank: what a weight that is not a number does."""
    save = Trainer.save

    def poisoned(self):
        if self.step == 20:
            next(self.engine.module.parameters()).data[:] = float("nan")
        return save(self)

    with mock.patch.object(Trainer, "save", poisoned), pytest.raises(ValueError, match=r"not finite at step 20.*step-00000010"):
        train(config)


@pytest.mark.parametrize("size", [2])
def test_a_run_that_diverged_does_not_replace_its_good_checkpoints(ranks, data, size, tmp_path):
    config = configuration(data, str(tmp_path), STEPS, save_every=10)
    ranks(size).run(diverge, config)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000010"]


class NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), f"hidden wait: {func}"
        return func(*args, **(kwargs or {}))


def step_without_waiting(config):
    """Runs on every rank: one training step."""
    trainer = Trainer(config, join())
    try:
        trainer._open_window()
        trainer._train_step()
        with NoWaiting():
            trainer._train_step()
    finally:
        trainer.close()


def test_a_step_never_waits_for_the_device(ranks, data, tmp_path):
    ranks(2).run(step_without_waiting, configuration(data, str(tmp_path), STEPS))


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
