"""A save that is written beside the training: the checkpoint holds the step at which it began, however late its copy is made."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

from partial_fc import losses
from pipeline import checkpoint
from pipeline.checkpoint import CheckpointConfig, Saver
from pipeline.checkpoint.host_copy import HostCopy
from tests.pipeline.runs import configuration, faces, train_losses

STEPS = 6


def test_what_is_settled_may_change_after_the_fence_and_the_rest_at_once(tmp_path, monkeypatch):
    of, may_copy = HostCopy.of, threading.Event()

    def late(self, parts):
        copies, rest = of(self, parts)
        return copies, lambda: (may_copy.wait(), rest())

    monkeypatch.setattr(HostCopy, "of", late)
    saver = Saver(str(tmp_path), CheckpointConfig())
    weights, statistics = torch.ones(300, 200), torch.ones(7)
    saver.start(1, {"weights": replace(checkpoint.whole(weights), settled=True), "statistics": checkpoint.whole(statistics)}, {})
    statistics.zero_()
    threading.Timer(0.2, may_copy.set).start()
    saver.fence()
    assert saver.stall > 0.1
    weights.zero_()
    saver.finish()
    saved = checkpoint.newest(str(tmp_path))
    assert saved.whole("weights").eq(1).all() and saved.whole("statistics").eq(1).all()


def test_a_copy_that_fails_lets_the_training_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(HostCopy, "of", lambda self, parts: (parts, partial(torch.empty, -1)))
    saver = Saver(str(tmp_path), CheckpointConfig())
    saver.start(1, {"weights": checkpoint.whole(torch.ones(2))}, {})
    saver.fence()
    with pytest.raises(RuntimeError):
        saver.finish()


def slowly(config):
    """Runs on every rank: trains with copies that are made as late as they may be."""
    of = HostCopy.of

    def late(self, parts):
        copies, rest = of(self, parts)
        return copies, lambda: (time.sleep(0.3), rest())

    with mock.patch.object(HostCopy, "of", late):
        return train_losses(config)


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("ddp", {"run": {"ema": 0.9}}),
        ("ddp", {"sample_rate": 0.5, "optimizer": {"unsampled": "lazy"}}),
        ("ddp", {"optimizer": {"in_backward": True, "name": "adamw"}}),
        ("deepspeed", {"optimizer": {"name": "adamw"}, "engine_options": {"zero_stage": 2}}),
        ("deepspeed", {"engine_options": {"zero_stage": 3}}),
        ("ddp", {"loss": {"name": "sum", "parts": ({"name": "cosface"}, {"name": "uss", "source": "bank", "start": 2})}}),
    ],
    ids=["ddp", "lazy", "in backward", "zero 2", "zero 3", "a loss that sets what it learns in its third step"],
)
def test_checkpoints_are_those_of_synchronous_saves(ranks, tmp_path_factory, tmp_path, engine, options):
    data = faces(str(tmp_path_factory.getbasetemp()))

    def config(folder, asynchronous):
        changes = {"loss": None, **options}
        loss = changes.pop("loss")
        made = configuration(data, str(tmp_path / folder), STEPS, engine, backbone="small", save_every=1, **changes)
        return replace(
            made, loss=losses.build(**loss) if loss else made.loss, checkpoint=replace(made.checkpoint, asynchronous=asynchronous)
        )

    ranks(2).run(slowly, config("beside", True))
    ranks(2).run(train_losses, config("at once", False))
    for step in range(1, STEPS + 1):
        one, other = (
            checkpoint.open_checkpoint(str(tmp_path / name / "checkpoints" / f"step-{step:08d}")) for name in ("beside", "at once")
        )
        assert set(one) == set(other)
        for name in one:
            assert torch.equal(one.whole(name), other.whole(name)), (step, name)


def test_a_thread_that_ends_in_its_own_way_is_neither_waited_for_nor_believed(tmp_path):
    saver = Saver(str(tmp_path), CheckpointConfig())
    with mock.patch.object(Saver, "_write", side_effect=SystemExit):
        saver.start(1, {"weights": checkpoint.whole(torch.ones(3))}, {})
        saver.fence()
        with pytest.raises(RuntimeError, match="has ended without a word"):
            saver.finish()
    assert not checkpoint.complete(str(tmp_path))
