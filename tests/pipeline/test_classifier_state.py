"""What a loss learns and keeps survives a change of ranks; another loss takes over what fits; metrics show thresholds as cosines."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc import PartialFC, RowAdamW, RowSGD, losses
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses import Loss, register, softplus
from pipeline import checkpoint, classifier_state
from pipeline.distributed import join
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.trainer import Trainer
from tests.pipeline.runs import configuration, faces, train_losses, train_until

pytestmark = pytest.mark.slow
STEPS, CLASSES, WIDTH = 16, 10, 3  # 10 classes over 4 ranks: 3, 3, 3, 1


@dataclass(frozen=True)
class Keeping(Loss):
    """CosFace with a learned offset of every class, a learned shift and a margin that follows a running figure."""

    scale: float = 16.0
    margin: float = 0.2

    def learned(self, num_classes: int) -> dict[str, float]:
        return {"shift": 0.5}

    def learned_by_class(self, num_classes: int) -> dict[str, float]:
        return {"offset": 0.25}

    def tracked(self) -> dict[str, float]:
        return {"hardness": 1.0}

    def __call__(self, batch: GlobalBatch) -> Tensor:
        offset_S = batch.parameter("offset")
        statistics = batch.against_classes(scale=self.scale, class_bias_S=offset_S)
        hardness = batch.track("hardness", statistics.target_B.detach().mean(), 0.2)
        target_B = self.scale * (statistics.target_B - self.margin * (1 + hardness)) + batch.of_labels(offset_S) + batch.parameter("shift")
        return softplus(statistics.non_target_B - target_B).mean()


if multiprocessing.parent_process():  # in a rank; in pytest's process other tests look through the registry
    register("test_keeping")(Keeping)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(losses.REGISTRY, "test_keeping", Keeping)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces(str(tmp_path_factory.mktemp("faces")))


def kept(folder):
    """Whatever of the loss the newest checkpoint holds, in full."""
    saved = checkpoint.locate(folder)
    return {name: saved.whole(name) for name in saved if name.startswith(classifier_state.OF_THE_LOSS)}


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        (losses.build("uce", scale=16.0, margin=0.2), {"learned.threshold"}),
        (Keeping(), {"learned.shift", "learned.offset", "tracked_hardness"}),
    ],
)
def test_what_a_loss_keeps_survives_interruptions_and_other_numbers_of_ranks(ranks, data, loss, names, tmp_path):
    def config(folder):
        return replace(configuration(data, str(tmp_path / folder), STEPS, save_every=5), loss=loss)

    whole = ranks(1).run(train_losses, config("whole"))[0]
    ranks(2).run(train_until, config("broken"), 7)
    ranks(4).run(train_until, config("broken"), 12)
    np.testing.assert_allclose(ranks(1).run(train_losses, config("broken"))[0], whole, rtol=1e-4)
    expected, found = (kept(str(tmp_path / folder)) for folder in ("whole", "broken"))
    states = {f"{name}.{key}" for name in names if name.startswith("learned") for key in ("momentum_buffer", "step")}
    assert set(found) == set(expected) == names | states
    for name, tensor in expected.items():  # relative to the largest: sums of gradients over ranks are rounded
        assert float((found[name] - tensor).abs().max() / tensor.abs().max()) < 1e-4, name
    assert all(tensor.abs().min() > 0 for name, tensor in expected.items() if name.endswith(".momentum_buffer"))  # a loss would show


def classifier_with_bank(loss):
    classifier = PartialFC(CLASSES, WIDTH, loss)
    classifier.register_buffer("bank_features", torch.zeros(classifier.shard.rows, WIDTH))
    classifier.register_buffer("bank_steps", torch.zeros(classifier.shard.rows, dtype=torch.int64))
    return classifier, RowSGD(classifier, lr=0.1)


def fill(tensor, classifier, number):
    """Numbers that tell tensors and classes apart, whichever rank has them."""
    if tensor.ndim == 0:
        return tensor.fill_(number)
    shard = classifier.shard
    ids = torch.arange(shard.first, shard.first + shard.rows, dtype=tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))
    return tensor.copy_((100 * number + ids).expand_as(tensor))


def local_tensors(classifier, optimizer):
    state = classifier_state.state_of(classifier, optimizer)
    return {name: part.tensor for name, part in state.items()}


def save(folder, name):
    classifier, optimizer = classifier_with_bank(losses.build(name))
    for number, tensor in enumerate(local_tensors(classifier, optimizer).values()):
        fill(tensor, classifier, number)
    state = classifier_state.state_of(classifier, optimizer)
    checkpoint.save(folder, 1, state, {"config": {"loss": {"name": name}}}, keep=1)
    return sorted(state)


def load(folder, name, numbers):
    """Lines on differences; the names of tensors that are as saved, on this rank."""
    classifier, optimizer = classifier_with_bank(losses.build(name))
    saved = checkpoint.locate(folder)
    lines = classifier_state.load(saved, saved.info, classifier, optimizer)
    tensors = local_tensors(classifier, optimizer)
    same = [
        key for key, tensor in tensors.items() if key in numbers and torch.equal(tensor, fill(tensor.clone(), classifier, numbers[key]))
    ]
    return lines, same


@pytest.mark.parametrize(("before", "after"), [(1, 4), (3, 2), (4, 1)])
def test_a_bank_and_numbers_per_class_are_sharded(ranks, tmp_path, before, after):
    names = ranks(before).run(save, str(tmp_path), "test_keeping")[0]
    assert {"bank_features", "bank_steps", "learned.offset", "learned.shift.momentum_buffer", "tracked_hardness"} <= set(names)
    classifier, optimizer = classifier_with_bank(losses.build("test_keeping"))
    numbers = {name: number for number, name in enumerate(classifier_state.state_of(classifier, optimizer))}
    saved = checkpoint.locate(str(tmp_path))
    assert saved.shape("bank_features") == (CLASSES, WIDTH)
    assert (saved.shape("bank_steps"), saved.dtype("bank_steps")) == ((CLASSES,), torch.int64)
    for lines, same in ranks(after).run(load, str(tmp_path), "test_keeping", numbers):
        assert lines == [] and set(same) == set(names)


def test_another_loss_takes_over_what_fits(tmp_path):
    assert not dist.is_initialized()
    save(str(tmp_path), "test_keeping")
    lines, same = load(str(tmp_path), "uce", {"prototypes": 0, "learned.threshold": 3})
    assert same == ["prototypes"]
    assert lines == [
        "the checkpoint was trained with loss 'test_keeping', this run has 'uce': what both keep goes on",
        "the checkpoint has no learned.threshold, learned.threshold.step, learned.threshold.momentum_buffer: started anew",
        "the checkpoint's learned.offset, learned.offset.momentum_buffer, learned.offset.step, learned.shift, "
        "learned.shift.momentum_buffer, learned.shift.step, tracked_hardness: left out, because this run has no counterpart",
    ]


def test_the_state_of_another_kind_of_optimizer_starts_anew_with_its_count(tmp_path):
    save(str(tmp_path), "cosface")
    classifier = PartialFC(CLASSES, WIDTH, losses.build("cosface"))
    optimizer = RowAdamW(classifier, lr=0.1)
    saved = checkpoint.locate(str(tmp_path))
    assert saved.whole("prototypes.step") > 0
    line, *_ = classifier_state.load(saved, saved.info, classifier, optimizer)
    assert line == "the checkpoint has no prototypes.step, prototypes.exp_avg, prototypes.exp_avg_sq: started anew"
    assert optimizer.state[classifier.prototypes]["step"] == 0


def remarks(config):
    """Runs on every rank: what a resume has to say, and the learned numbers that it begins with."""
    trainer = Trainer(config, join())
    try:
        return trainer.step, trainer.resume_remarks, {name: value.item() for name, value in trainer.classifier.learned.items()}
    finally:
        trainer.close()


def test_a_run_goes_on_with_another_loss(ranks, data, tmp_path):
    config = configuration(data, str(tmp_path), STEPS, save_every=4)
    ranks(2).run(train_until, config, 5)
    for step, lines, learned in ranks(2).run(remarks, replace(config, loss=losses.build("uce", scale=16.0, threshold=0.3))):
        assert step == 4 and learned["threshold"] == pytest.approx(16 * 0.3 + math.log(12))
        assert len(lines) == 3 and lines[2].startswith("changed since the checkpoint: loss.name=uce (was cosface)")
        assert "trained with loss 'cosface', this run has 'uce'" in lines[0] and "has no learned.threshold" in lines[1]


def test_metrics_show_the_threshold_beside_that_of_the_evaluation(ranks, data, tmp_path):
    def rows(loss, folder):
        evaluation = EvaluationConfig(data=data)
        ranks(2).run(train_losses, replace(configuration(data, str(tmp_path / folder), 3, evaluation=evaluation), loss=loss))
        return [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]

    made = rows(losses.build("uce", scale=16.0, threshold=0.3), "uce")
    trained = [row for row in made if "loss" in row]
    assert trained[0]["threshold"] == pytest.approx(0.3 + math.log(12) / 16, abs=0.05)
    final = float(kept(str(tmp_path / "uce"))["learned.threshold"])
    assert trained[-1]["threshold"] == pytest.approx(final / 16, rel=1e-6)
    (evaluated,) = (row for row in made if "evaluation/faces/threshold" in row)
    assert evaluated["evaluation/faces/threshold"] == evaluated["faces/threshold_at_eer"]

    last = [row for row in rows(losses.build("test_keeping"), "keeping") if "loss" in row][-1]
    state = kept(str(tmp_path / "keeping"))
    for name, tensor in (("hardness", state["tracked_hardness"]), ("shift", state["learned.shift"]), ("offset", state["learned.offset"])):
        assert last[f"loss/{name}"] == pytest.approx(float(tensor.mean()), rel=1e-5)


def test_thresholds_of_the_parts_of_a_sum_are_divided_by_their_own_scales():
    class Sum(losses.Loss):
        def learned(self, num_classes):
            return {"0_threshold": 3.2, "1_threshold": 1.6, "1_bias": 5.0}

        def learned_by_class(self, num_classes):
            return {}

        def tracked(self):
            return {"1_threshold_is_started": 1.0}

        def weighted(self):
            return [("0", 1.0, losses.build("uce", scale=32.0)), ("1", 1.0, losses.build("uss", scale=16.0))]

    shown = classifier_state.figures(PartialFC(CLASSES, WIDTH, Sum()))
    assert shown == pytest.approx({"0_threshold": 0.1, "1_threshold": 0.1, "loss/1_bias": 5.0})


def counts(config):
    trainer = Trainer(config, join())
    try:
        return trainer.classifier.class_counts_S.tolist()
    finally:
        trainer.close()


def test_the_classifier_knows_the_images_of_each_identity(ranks, data, tmp_path):
    assert ranks(2).run(counts, configuration(data, str(tmp_path), STEPS)) == [[6.0] * 7, [6.0] * 6]


def skipping(config):
    """Runs on every rank: what the loss keeps before and after a step whose features are not finite."""
    trainer = Trainer(config, join())
    try:
        trainer._train_step()
        before = [tensor.clone() for tensor in classifier_state.small_tensors(trainer.classifier)]
        forward = trainer.engine.forward
        trainer.engine.forward = lambda images, is_last: forward(images, is_last) * torch.nan
        assert trainer._train_step() is None
        return before, [tensor.clone() for tensor in classifier_state.small_tensors(trainer.classifier)]
    finally:
        trainer.close()


def test_a_skipped_step_leaves_running_figures_as_they_were(ranks, data, tmp_path):
    config = replace(configuration(data, str(tmp_path), STEPS), loss=losses.build("test_keeping"))
    config = replace(config, classifier=replace(config.classifier, non_finite="skip"))
    for before, after in ranks(2).run(skipping, config):
        assert len(before) == 2 and before[1] != 1 and before == after
    assert os.listdir(tmp_path)
