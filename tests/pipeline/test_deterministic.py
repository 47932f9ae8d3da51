"""run.deterministic: two runs are equal to the bit, and so is one that was stopped at any step and went on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from partial_fc import GradScaler
from pipeline import checkpoint, combinations, determinism
from pipeline.checkpoint import CheckpointConfig
from pipeline.course import Course
from pipeline.evaluation.evaluator import EvaluationConfig
from tests.pipeline.runs import configuration, faces, train_losses, train_until

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces(str(tmp_path_factory.mktemp("faces")))


def of(data, folder, engine="ddp", precision="float32", zero_stage=1, save_every=10**6, **changes):
    """Batch statistics, an average of the weights, micro-batches, dropout, sampled classes with features of a bank, AdamW, evaluations."""
    run = {"accumulation": 2, "deterministic": True, "epochs": STEPS * 24 / 78} | changes.pop("run", {"ema": 0.9})
    made = configuration(
        data,
        str(folder),
        STEPS,
        engine,
        backbone="small",
        run=run,
        sample_rate=0.5,
        save_every=save_every,
        optimizer={"name": "adamw", "classifier": "adamw", **changes.pop("optimizer", {})},
        engine_options={"precision": precision, "zero_stage": zero_stage},
        evaluation=EvaluationConfig(data=data, every_epochs=1.0),
    )
    bank = {"substitution_rate": 0.5, "substitution_source": "bank"}
    return replace(made, classifier=replace(made.classifier, **bank), backbone=replace(made.backbone, dropout=0.2))


def last(config):
    """All tensors of the last checkpoint of a run, and what the run knew beside them."""
    saved = checkpoint.locate(config.run.folder)
    assert saved.info["step"] == STEPS
    return {name: saved.whole(name) for name in saved}, saved.info["course"]


def assert_same_bits(found, expected):
    assert found[1] == expected[1] and found[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert torch.equal(found[0][name], tensor), name


CASES = [
    pytest.param(2, {}, id="ddp", marks=pytest.mark.long),
    pytest.param(3, {}, id="ddp on 3 ranks, whose sums depend on DDP's buckets"),
    pytest.param(2, {"precision": "float16"}, id="float16", marks=pytest.mark.long),
    pytest.param(2, {"engine": "deepspeed"}, id="zero 1", marks=pytest.mark.long),
    pytest.param(3, {"engine": "deepspeed", "zero_stage": 3, "run": {}}, id="zero 3"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "options"), CASES)
def test_stopping_anywhere_changes_no_bit(ranks, data, size, options, tmp_path):
    whole, again, broken = (of(data, tmp_path / name, **dict(options)) for name in ("whole", "again", "broken"))
    losses = ranks(size).run(train_losses, whole)[0]
    expected = last(whole)
    if not options:
        assert ranks(size).run(train_losses, again)[0] == losses
        assert_same_bits(last(again), expected)
    for stop in (3, 5):  # a save that the schedule does not know, as for a stop that was asked for
        ranks(size).run(train_until, replace(broken, checkpoint=CheckpointConfig(every_steps=stop, keep=9)), stop)
    assert ranks(size).run(train_losses, broken)[0][5:] == losses[5:]
    assert_same_bits(last(broken), expected)


def test_rows_that_catch_up_at_a_save_are_refused():
    config = configuration("", "", 1, optimizer={"unsampled": "lazy"}, run={"deterministic": True})
    with pytest.raises(ValueError, match=r"run\.deterministic excludes optimizer\.unsampled=lazy"):
        combinations.check(config)


def test_torch_is_told_and_told_otherwise(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        determinism.set_up(True)
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1)
        with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"):
            determinism.set_up(True)
    finally:
        determinism.set_up(False)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic


def test_a_course_goes_through_a_checkpoint():
    before = Course(GradScaler("cpu", init_scale=8.0, growth_interval=2))
    before.scaler.scale(torch.ones(()))
    before.losses.extend(map(float, range(30)))
    before.skipped_in_a_row, before.rollbacks, before.has_moved = 2, 1, False
    after = Course(GradScaler("cpu"))
    after.load(before.state())
    assert after.state() == before.state() and after.scaler.get_scale() == 8.0 and after.usual_loss == 14.5
    after.load({})  # of an earlier version
    assert after.usual_loss is None and after.scaler.get_scale() == 8.0
