"""A run that is saved on some ranks with one engine and goes on with another engine on other ranks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline import checkpoint
from pipeline.distributed import join
from pipeline.starting_weights import StartConfig
from pipeline.trainer import Trainer
from tests.pipeline.runs import configuration, faces, train_losses, train_until

pytestmark = pytest.mark.slow
SAVED, STEPS = 4, 24  # 20 steps after the save
ENGINES = [("ddp", 1), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
SOURCES = list(itertools.product(range(1, 5), range(4)))  # ranks and engine
SHORT = [(2, 3), (3, 0)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces(str(tmp_path_factory.mktemp("faces")))


@pytest.fixture(scope="module")
def expected(ranks, data, tmp_path_factory):
    """Losses of the undisturbed run on one rank, by optimizer."""
    return {name: ranks(1).run(train_losses, config_of(data, tmp_path_factory.mktemp(name), 0, name))[0] for name in ("sgd", "adamw")}


def config_of(data, folder, engine, name):
    kind, stage = ENGINES[engine]
    made = configuration(data, str(folder), STEPS, kind, optimizer={"name": name}, engine_options={"zero_stage": stage}, save_every=SAVED)
    return replace(made, optimizer=replace(made.optimizer, lr=0.01 if name == "sgd" else 1e-4))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(("size", "engine"), [case if case in SHORT else pytest.param(*case, marks=pytest.mark.long) for case in SOURCES])
def test_next_20_losses(ranks, data, expected, size, engine, name, tmp_path):
    ranks(size).run(train_until, config_of(data, tmp_path, engine, name), SAVED)
    losses = ranks(size % 4 + 1).run(train_losses, config_of(data, tmp_path, (engine + 1 + size % 3) % 4, name))[0]
    deviation = max(abs(a / b - 1) for a, b in zip(losses, expected[name], strict=True))
    print(f"largest relative deviation of {STEPS} losses: {deviation:.1e}")
    np.testing.assert_allclose(losses[SAVED:], expected[name][SAVED:], rtol=1e-5)


@pytest.mark.parametrize(("engine", "counts"), [(0, {SAVED, 0}), (1, {0})], ids=["ddp", "zero 1"])
def test_weights_that_were_frozen_have_no_moments_for_the_steps_before(ranks, data, engine, counts, tmp_path):
    config = config_of(data, tmp_path, engine, "adamw")
    ranks(1).run(train_until, replace(config, optimizer=replace(config.optimizer, frozen=("stem",))), SAVED)
    config = replace(config, checkpoint=replace(config.checkpoint, differences="continue"))
    assert set(ranks(1).run(counts_at_the_start, config)[0]) == counts


def test_weights_that_have_moved_less_often_than_others_are_not_counted_together(ranks, data, tmp_path):
    config = config_of(data, tmp_path, 0, "adamw")
    ranks(1).run(train_until, replace(config, optimizer=replace(config.optimizer, frozen=("stem",))), SAVED)
    ranks(1).run(train_until, replace(config, checkpoint=replace(config.checkpoint, differences="continue")), 2 * SAVED)
    assert set(ranks(1).run(counts_at_the_start, config)[0]) == {SAVED, 2 * SAVED}
    assert set(ranks(1).run(counts_at_the_start, config_of(data, tmp_path, 1, "adamw"))[0]) == {0}


def counts_at_the_start(config):
    """Runs on every rank: the steps that AdamW has made, by weight."""
    trainer = Trainer(config, join())
    try:
        return [int(part.tensor) for name, part in trainer.engine.state().items() if name.endswith(".step")]
    finally:
        trainer.close()


def backbone_at_the_start(config):
    """Runs on every rank."""
    trainer = Trainer(config, join())
    try:
        with trainer.engine.for_evaluation() as module:
            return {name: tensor.clone() for name, tensor in module.state_dict().items()}
    finally:
        trainer.close()


def test_a_new_run_with_zero_3_begins_with_the_weights_of_another(ranks, data, tmp_path):
    ranks(2).run(train_until, config_of(data, tmp_path / "old", 0, "sgd"), SAVED)
    config = replace(config_of(data, tmp_path / "new", 3, "sgd"), start=StartConfig(str(tmp_path / "old")))
    config = replace(config, optimizer=replace(config.optimizer, frozen=("stem*",)))
    expected = checkpoint.locate(str(tmp_path / "old"))
    for weights in ranks(3).run(backbone_at_the_start, config):
        assert weights and all(torch.equal(tensor, expected.whole(f"backbone.{name}")) for name, tensor in weights.items())
    losses = ranks(3).run(train_losses, config)[0]
    assert losses[-1] < losses[0]
    last = checkpoint.locate(str(tmp_path / "new"))
    same = {name for name in last if name.startswith("backbone.") and torch.equal(last.whole(name), expected.whole(name))}
    assert same and all(name.startswith("backbone.stem") for name in same)
