"""The running average of the weights: its values, its checkpoints, and that it is evaluated beside the weights."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from unittest import mock

import pytest
import torch

from dali_loaders import TrainLoader
from pipeline import checkpoint
from pipeline.cli import main
from pipeline.distributed import join
from pipeline.ema import Ema
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.starting_weights import StartConfig, backbone_of
from pipeline.trainer import Trainer
from tests.pipeline.runs import configuration, faces, train_losses, train_until

pytestmark = pytest.mark.slow
STEPS, DECAY = 9, 0.6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces(str(tmp_path_factory.mktemp("faces")))


def config_of(data, folder, engine="ddp", ema=DECAY, **changes):
    config = configuration(data, str(folder), STEPS, engine, **{"backbone": "small", "save_every": 4, **changes})
    return replace(config, run=replace(config.run, ema=ema))


def averages(config):
    """Runs on every rank: what the average should be, from the weights after every step, and what the last checkpoint has of it."""
    trainer = Trainer(config, join())
    expected = {name: tensor.double() for name, tensor in trainer.engine.module.state_dict().items()}
    train_step = trainer._train_step

    def stepping():
        loss = train_step()
        weight = 1 - min(DECAY, trainer.step / (trainer.step + 9))
        for name, tensor in trainer.engine.module.state_dict().items():
            expected[name] += weight * (tensor.double() - expected[name]) if tensor.is_floating_point() else tensor - expected[name]
        return loss

    try:
        with mock.patch.object(trainer, "_train_step", stepping):
            trainer.fit()
    finally:
        trainer.close()
    for tensor in expected.values():  # batch statistics are those of all ranks
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
    return expected, backbone_of(checkpoint.locate(config.run.folder), ema=True)


@pytest.mark.parametrize(("engine", "size"), [pytest.param("ddp", 2, marks=pytest.mark.long), ("deepspeed", 2)])
def test_values(ranks, data, engine, size, tmp_path):
    """Between evaluations and saves, in which weights and averages change places."""
    evaluation = EvaluationConfig(data=data, every_epochs=1.0)
    for expected, found in ranks(size).run(averages, config_of(data, tmp_path, engine, evaluation=evaluation)):
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert found[name].dtype is (torch.int64 if name.endswith("tracked") else torch.float32)
            torch.testing.assert_close(found[name].double(), tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_it_resumes_on_another_number_of_ranks_and_does_not_touch_the_run(ranks, data, tmp_path):
    def config(folder, ema=DECAY):
        return config_of(data, tmp_path / folder, ema=ema, backbone="small_nobn")

    without = ranks(1).run(train_losses, config("without", 0.0))[0]
    assert ranks(1).run(train_losses, config("whole"))[0] == without
    ranks(2).run(train_until, config("broken"), 6)
    ranks(1).run(train_losses, config("broken"))
    whole, broken = (backbone_of(checkpoint.locate(str(tmp_path / folder)), ema=True) for folder in ("whole", "broken"))
    for name, tensor in whole.items():
        torch.testing.assert_close(broken[name], tensor, rtol=1e-4, atol=1e-5)


def remarks_and_average(config):
    trainer = Trainer(config, join())
    try:
        return trainer.resume_remarks, trainer.ema and {name: tensor.clone() for name, tensor in trainer.ema.averages.items()}
    finally:
        trainer.close()


def test_what_is_said_where_a_checkpoint_and_a_run_differ(ranks, data, tmp_path):
    ranks(1).run(train_until, config_of(data, tmp_path / "with"), 5)
    ranks(1).run(train_until, config_of(data, tmp_path / "without", ema=0.0), 5)
    saved = checkpoint.locate(str(tmp_path / "with"))
    path = saved.path
    left_out = "the checkpoint's average of the weights: left out, because run.ema is 0"
    assert ranks(1).run(remarks_and_average, config_of(data, tmp_path / "with", ema=0.0)) == [
        ([left_out, "changed since the checkpoint: run.ema=0.0 (was 0.6)"], None)
    ]
    ((remarks, average),) = ranks(1).run(remarks_and_average, config_of(data, tmp_path / "without"))
    assert remarks == [
        "the checkpoint has no average of the weights: it starts with the weights as they are",
        "changed since the checkpoint: run.ema=0.6 (was 0.0)",
    ]
    started = replace(config_of(data, tmp_path / "new"), start=StartConfig(path, ema=True))
    ((remarks, average),) = ranks(1).run(remarks_and_average, started)
    assert remarks == [f"a new run with the averaged backbone weights of {path}"]
    expected = backbone_of(saved, ema=True)
    assert all(torch.equal(average[name], expected[name]) for name in expected)


def test_both_are_evaluated_and_eval_chooses(ranks, data, capsys, tmp_path):
    evaluation = EvaluationConfig(data=data, every_epochs=1.0)
    ranks(2).run(train_losses, config_of(data, tmp_path, evaluation=evaluation))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shown = {key: row[f"{key}/eer"] for row in rows for key in ("faces", "faces_ema") if f"{key}/eer" in row}
    assert shown["faces"] != shown["faces_ema"]
    assert any(name.startswith("roc-faces_ema-") for name in os.listdir(tmp_path))
    for options, name in ([], "faces"), (["--ema"], "faces_ema"):
        assert main(["eval", str(tmp_path), "--data", data, "--json", *options]) == 0
        assert json.loads(capsys.readouterr().out)["eer"] == pytest.approx(shown[name], abs=1e-6)
    ranks(1).run(train_until, config_of(data, tmp_path / "none", ema=0.0), 5)
    assert main(["eval", str(tmp_path / "none"), "--data", data, "--ema"]) == 2
    assert "holds no averaged weights: its run had run.ema=0" in capsys.readouterr().err


def skipping(config):
    """Runs on every rank: whether a step that is left out changes the average."""
    trainer = Trainer(config, join())
    next_batch = TrainLoader.__next__

    def poisoned(loader):
        batch = next_batch(loader)
        batch.images[0, :, 3, 3] = float("nan")
        return batch

    try:
        trainer._train_step()
        before = {name: tensor.clone() for name, tensor in trainer.ema.averages.items()}
        with mock.patch.object(TrainLoader, "__next__", poisoned):
            assert trainer._train_step() is None
        return all(torch.equal(trainer.ema.averages[name], before[name]) for name in before)
    finally:
        trainer.close()


def test_a_skipped_step_leaves_it_alone(ranks, data, tmp_path):
    config = config_of(data, tmp_path)
    assert all(ranks(2).run(skipping, replace(config, classifier=replace(config.classifier, non_finite="skip"))))


def test_weights_come_back_to_the_bit_after_an_error():
    join("cpu")
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    ema = Ema(0.5)
    ema.restart(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        module[0].weight += 1
    changed = module[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), ema.in_place_of(module):
        assert torch.equal(module[0].weight, before["0.weight"])
        raise RuntimeError("stop")
    assert torch.equal(module[0].weight, changed) and torch.equal(ema.averages["0.weight"], before["0.weight"])


def test_tied_weights_keep_their_values():
    """They have two names in a state dict."""
    join("cpu")
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[1].weight = module[0].weight
    ema = Ema(0.5)
    ema.restart(module)
    with torch.no_grad():
        module[0].weight += 1
    changed, averaged = module[0].weight.detach().clone(), ema.averages["0.weight"].clone()
    with ema.in_place_of(module):
        assert torch.equal(module[1].weight, averaged)
    assert torch.equal(module[0].weight, changed) and torch.equal(ema.averages["1.weight"], averaged)
