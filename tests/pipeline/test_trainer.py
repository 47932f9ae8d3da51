"""Whole training runs: the same on any number of ranks, micro-batches and engine, and across interruptions."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dali_loaders import TrainLoader
from dali_loaders.faces import FacesConfig, write_faces
from pipeline.distributed import Place, join
from pipeline.engine import EngineConfig, build_engine
from pipeline.schedule import OptimizerConfig
from pipeline.train import train
from pipeline.trainer import Trainer
from tests.pipeline.runs import BATCH, configuration, faces, train_losses, train_until

pytestmark = pytest.mark.slow
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


@pytest.mark.parametrize(("size", "engine"), [pytest.param(2, "deepspeed", marks=pytest.mark.long), (4, "deepspeed"), (4, "ddp")])
def test_losses_do_not_depend_on_the_number_of_ranks(ranks, data, one_rank, size, engine, tmp_path):
    assert_equal(ranks(size).run(train_losses, configuration(data, str(tmp_path), STEPS, engine))[0], one_rank, 1e-4)
    assert one_rank[-1] < one_rank[STEPS // 3]  # and it learns


def test_more_ranks_than_classes(ranks, tmp_path):
    write_faces(str(tmp_path / "two.tar"), FacesConfig(identities=2, images_per_identity=6, size=32), workers=1)
    one, *others = (
        ranks(size).run(train_losses, configuration(str(tmp_path / "two.tar"), str(tmp_path / str(size)), 4, run={"epochs": 8}))[0]
        for size in (1, 3)
    )
    assert others == [pytest.approx(one, rel=1e-4)] and len(one) > 3


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


def test_groups_do_not_depend_on_ranks_micro_batches_or_interruptions(ranks, data, tmp_path):
    epoch = 13 * 2 * 4  # positions: 6 images of an identity make 2 groups of 4

    def config(folder, accumulation=1):
        run = {"accumulation": accumulation, "epochs": STEPS * BATCH / epoch}
        made = configuration(data, str(tmp_path / folder), STEPS, sample_rate=0.5, save_every=5, run=run)
        return replace(made, data=replace(made.data, images_per_identity=4))

    whole = ranks(1).run(train_losses, config("whole"))[0]
    ranks(2).run(train_until, config("broken", accumulation=3), 12)  # the last checkpoint is of step 10, in the middle of epoch 3
    assert_equal(ranks(2).run(train_losses, config("broken"))[0], whole, 1e-4)
    with open(tmp_path / "broken" / "metrics.jsonl") as file:
        epochs = [row["epoch"] for row in map(json.loads, file) if "epoch" in row]
    assert epochs == pytest.approx([step * BATCH / epoch for step in range(1, STEPS + 1)])


def test_zero_2_and_a_clip_that_binds(ranks, data, tmp_path):
    options = {"optimizer": {"clip": 0.05}, "run": {"accumulation": 3}}
    losses = [
        ranks(2).run(train_losses, configuration(data, str(tmp_path / engine), STEPS, engine, engine_options=stage, **dict(options)))[0]
        for engine, stage in (("ddp", {}), ("deepspeed", {"zero_stage": 2}))
    ]
    assert_equal(losses[1], losses[0], 1e-5)


@pytest.mark.parametrize("sample_rate", [1.0, 0.4])
def test_a_clip_of_backbone_and_classifier_together(ranks, data, sample_rate, tmp_path):
    options = {"clip": 0.3, "clip_jointly": True}
    found = [
        *ranks(1).run(train_losses, configuration(data, str(tmp_path / "1"), 4, sample_rate=sample_rate, optimizer=options)),
        *ranks(3).run(train_losses, configuration(data, str(tmp_path / "3"), 4, sample_rate=sample_rate, optimizer=options)),
        *ranks(1).run(train_losses, configuration(data, str(tmp_path / "apart"), 4, sample_rate=sample_rate, optimizer={"clip": 0.3})),
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)
    assert found[-1][1:] != pytest.approx(found[0][1:], rel=1e-4)


def test_a_joint_clip_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="DeepSpeed clips the backbone alone"):
        build_engine(EngineConfig("deepspeed"), OptimizerConfig(clip_jointly=True), nn.Linear(2, 2), Place(0, 1, torch.device("cpu")), 1)
    for options in ({"clip": 0.0}, {"in_backward": True}):
        with pytest.raises(ValueError, match="clip_jointly needs"):
            OptimizerConfig(clip_jointly=True, **options)


def test_bfloat16_and_batch_statistics_resume_on_the_same_ranks(ranks, data, tmp_path):
    def config(folder):
        options = {"backbone": "small", "engine_options": {"precision": "bfloat16"}, "save_every": 5}
        made = configuration(data, str(tmp_path / folder), STEPS, "deepspeed", **options)
        narrow = dict.fromkeys(("dtype", "storage_dtype", "gather_dtype"), "bfloat16")
        return replace(made, classifier=replace(made.classifier, **narrow))

    ranks(2).run(train_until, config("broken"), 12)
    losses = [ranks(2).run(train_losses, config(folder))[0] for folder in ("broken", "whole")]
    assert_equal(losses[0], losses[1], 1e-4)


def test_prototypes_that_move_in_backward(ranks, data, one_rank, tmp_path):
    config = configuration(data, str(tmp_path), STEPS, optimizer={"in_backward": True}, save_every=5)
    ranks(2).run(train_until, config, 12)
    assert_equal(ranks(2).run(train_losses, config)[0], one_rank, 1e-4)


@pytest.mark.parametrize("optimizer", [{"unsampled": "lazy"}, {"classifier": "adamw", "unsampled": "lazy"}], ids=["sgd", "adamw"])
def test_rows_that_wait_resume(ranks, data, optimizer, tmp_path):
    def config(folder):
        return configuration(data, str(tmp_path / folder), STEPS, sample_rate=0.3, save_every=5, optimizer=optimizer)

    ranks(2).run(train_until, config("broken"), 12)
    losses = [ranks(size).run(train_losses, config(folder))[0] for size, folder in ((1, "whole"), (2, "broken"))]
    assert_equal(losses[1], losses[0], 1e-4)


def test_micro_batches_and_moves_in_backward_are_refused(data, tmp_path):
    config = configuration(data, str(tmp_path), STEPS, optimizer={"in_backward": True}, run={"accumulation": 2})
    with pytest.raises(ValueError, match=r"optimizer\.in_backward moves prototypes in every backward pass, but run\.accumulation = 2"):
        Trainer(config, join())


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

    def poisoned(self, *figures):
        if self.step == 20:
            next(self.engine.module.parameters()).data[:] = float("nan")
        return save(self, *figures)

    with mock.patch.object(Trainer, "save", poisoned), pytest.raises(ValueError, match=r"not finite at step 20.*step-00000010"):
        train(config)


@pytest.mark.parametrize("size", [2])
def test_a_run_that_diverged_does_not_replace_its_good_checkpoints(ranks, data, size, tmp_path):
    config = configuration(data, str(tmp_path), STEPS, save_every=10)
    config = replace(config, checkpoint=replace(config.checkpoint, asynchronous=False))  # or the next step may be the first to notice
    ranks(size).run(diverge, config)
    assert set(os.listdir(tmp_path / "checkpoints")) - {"lease-1.json"} == {"step-00000010"}


class NoWaiting(TorchDispatchMode):
    """Fails on what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), f"hidden wait: {func}"
        return func(*args, **(kwargs or {}))


def step_without_waiting(config):
    """Runs on every rank: one training step."""
    trainer = Trainer(config, join())
    try:
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


def with_bad_images(config, bad_steps, is_expected):
    """Runs on every rank: a run in which one image of these steps is not a number on the last rank; or what should come of it, a run in
    which they are read but not trained on. Returns its metrics; and its weights, batch statistics and optimizer state."""
    trainer = Trainer(config, join())
    next_batch, train_step, done = TrainLoader.__next__, Trainer._train_step, set()

    def poisoned(loader):
        batch = next_batch(loader)
        if trainer.step in bad_steps - done and trainer.place.rank == trainer.place.world_size - 1:
            done.add(trainer.step)  # one micro-batch of a step is enough
            batch.images[0, :, 3, 3] = float("nan")
        return batch

    def left_out(self):
        if self.step not in bad_steps:
            return train_step(self)
        list(itertools.islice(self.loader, config.run.accumulation))
        self.cosines, self.rate = (torch.zeros(1), torch.zeros(1)), 0.0
        self.consumed += config.run.batch
        return None

    with mock.patch.object(*((Trainer, "_train_step", left_out) if is_expected else (TrainLoader, "__next__", poisoned))):
        try:
            trainer.fit()
            parts = {name: part.tensor for name, part in trainer.engine.state().items()}
            state = {**parts, "prototypes": trainer.classifier.prototypes.detach()}
        finally:
            trainer.close()
    with open(os.path.join(config.run.folder, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file], {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("ddp", {"run": {"accumulation": 2}, "sample_rate": 0.5}),
        ("deepspeed", {"optimizer": {"name": "adamw"}}),
        ("deepspeed", {"run": {"accumulation": 2}, "engine_options": {"zero_stage": 2}, "optimizer": {"clip": 0.0}}),
    ],
)
def test_steps_with_bad_images_are_skipped(ranks, data, engine, options, tmp_path):
    def config(folder):
        return configuration(data, str(tmp_path / folder), 8, engine, backbone="small", **dict(options))

    (rows, state), *_ = ranks(2).run(with_bad_images, config("skip"), {2, 3, 6}, False)
    (expected_rows, expected), *_ = ranks(2).run(with_bad_images, config("expected"), {2, 3, 6}, True)
    assert [row["skipped_steps"] for row in rows if "loss" in row] == [0, 0, 1, 2, 2, 2, 3, 3]
    losses, expected_losses = ({row["step"]: row["loss"] for row in each if row.get("loss")} for each in (rows, expected_rows))
    assert losses == pytest.approx(expected_losses, rel=1e-5) and list(losses) == [1, 2, 5, 6, 8]
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def ends_in(config, sentence):
    """Runs on every rank."""
    with pytest.raises(ValueError, match=sentence):
        with_bad_images(config, {1, 2, 3, 4}, False)


@pytest.mark.parametrize(
    ("non_finite", "sentence"),
    [
        ("raise", r"features of rank 1 at step 1 \(row 0 of its batch\) hold NaN or infinity"),
        ("skip", "3 steps in a row, up to step 4, were left out, the last because features or loss held NaN"),
    ],
)
def test_bad_images_end_a_run_in_a_sentence(ranks, data, non_finite, sentence, tmp_path):
    config = configuration(data, str(tmp_path), STEPS, run={"most_skipped": 3})
    ranks(2).run(ends_in, replace(config, classifier=replace(config.classifier, non_finite=non_finite)), sentence)
