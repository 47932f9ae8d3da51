"""Steps that are left out, whatever of them is not finite and on whatever rank: by backbone and classifier, on all ranks, and counted."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

from partial_fc import GradScaler
from pipeline import checkpoint
from pipeline.distributed import join
from pipeline.trainer import Trainer
from tests.pipeline.runs import configuration, faces, train_until

STEPS, BAD = 6, (2, 3)
ENGINES = [("ddp", 1), ("deepspeed", 1), pytest.param("deepspeed", 2, marks=pytest.mark.long), ("deepspeed", 3)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces(str(tmp_path_factory.mktemp("faces")))


def config_of(data, folder, engine="ddp", zero_stage=1, precision="float32", **changes):
    run = {"epochs": STEPS * 24 / 78, **changes.pop("run", {})}
    options = {"zero_stage": zero_stage, "precision": precision}
    return configuration(data, str(folder), STEPS, engine, run=run, engine_options=options, backbone="small", **changes)


def poison(trainer, what, value, steps):
    """Makes something of these steps not finite on the last rank, or on all if all have the same."""
    engine, classifier = trainer.engine, trainer.classifier
    backward, loss_class = engine.backward, type(trainer.config.loss)
    call = loss_class.__call__

    def poisoned(features, gradient, is_last):
        is_now = trainer.step in steps and trainer.place.rank == trainer.place.world_size - 1
        if is_now and what == "features' gradient":
            gradient = gradient.clone()
            gradient[0, 0] = value
        backward(features, gradient, is_last)
        if is_now and is_last and what == "backbone":
            part = next(part for part in engine.gradients() if part.numel())
            part[(0,) * part.ndim] = value
        if is_now and is_last and what == "classifier":
            classifier.gradient_values()[0, 0] = value

    engine.backward = poisoned
    if what == "loss":
        return mock.patch.object(loss_class, "__call__", lambda self, batch: call(self, batch) * (value if trainer.step in steps else 1.0))
    return mock.patch.object(loss_class, "__call__", call)


def run_with(config, what, value=torch.nan, steps=BAD):
    """Runs on every rank; with what=None these steps are read, but not trained on: (lines of metrics, state, notes of each step)."""
    trainer = Trainer(config, join())
    train_step, notes = Trainer._train_step, []

    def noted(self):
        if what is None and self.step in steps:
            list(itertools.islice(self.loader, config.run.accumulation))
            self.consumed += config.run.batch
            loss = None
        else:
            loss = train_step(self)
        scaler = self.course.scaler
        notes.append((loss is None, scaler.get_scale(), scaler.state_dict().get("_growth_tracker")))
        return loss

    try:
        with poison(trainer, what, value, steps), mock.patch.object(Trainer, "_train_step", noted):
            trainer.fit()
        parts = trainer.engine.state()
        state = {name: (part.tensor.detach().clone(), part.replicated) for name, part in parts.items()}
        state["prototypes"] = trainer.classifier.prototypes.detach().clone(), False
        state["momentum"] = trainer.classifier_optimizer.state[trainer.classifier.prototypes]["momentum_buffer"].clone(), False
    finally:
        trainer.close()
    with open(f"{config.run.folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file], state, notes


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "zero_stage"), ENGINES)
@pytest.mark.parametrize("what", ["loss", "backbone", "classifier", pytest.param("features' gradient", marks=pytest.mark.long)])
def test_whatever_is_not_finite_is_left_out_by_all(ranks, data, engine, zero_stage, what, tmp_path):
    value = torch.inf if what == "backbone" else torch.nan
    found = ranks(2).run(run_with, config_of(data, tmp_path / "found", engine, zero_stage), what, value)
    expected = ranks(2).run(run_with, config_of(data, tmp_path / "expected", engine, zero_stage), None)
    assert [row["skipped_steps"] for row in found[0][0] if "loss" in row] == [0, 0, 1, 2, 2, 2]
    for (_, state, notes), (_, right, _) in zip(found, expected, strict=True):
        assert [is_left_out for is_left_out, *_ in notes] == [step in BAD for step in range(STEPS)]
        assert state.keys() == right.keys()
        for name, (tensor, _) in right.items():
            torch.testing.assert_close(state[name][0], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert_replicas_equal(found)


def assert_replicas_equal(results):
    for name, (tensor, is_replicated) in results[0][1].items():
        for _, state, _ in results[1:]:
            assert not is_replicated or torch.equal(state[name][0], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "zero_stage"), ENGINES)
@pytest.mark.parametrize("what", ["backbone", "classifier"])
def test_an_overflow_on_one_rank_in_float16_makes_all_leave_the_step_out(ranks, data, engine, zero_stage, what, tmp_path):
    config = config_of(data, tmp_path, engine, zero_stage, "float16", run={"accumulation": 2}, optimizer={"name": "adamw"})
    config = replace(config, optimizer=replace(config.optimizer, lr=0.001))
    results = ranks(3).run(run_with, config, what, torch.inf)
    for _, _, notes in results:
        assert notes == results[0][2]
    skipped, scales, growth = zip(*results[0][2], strict=True)
    assert all(skipped[step] for step in BAD) and not all(skipped)
    assert scales[BAD[-1]] == scales[BAD[0] - 1] / 4  # halved twice
    assert growth[-1] > 0 and not skipped[-1]
    assert_replicas_equal(results)


def losses_in(config):
    with mock.patch("pipeline.trainer.GradScaler", partial(GradScaler, init_scale=2.0**8)):  # the default is too high for this loss
        rows, _, notes = run_with(config, None, steps=())
    return [row["loss"] for row in rows if "loss" in row], notes


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("sgd", marks=pytest.mark.long), "adamw"])
def test_float16_is_float32_to_its_rounding_on_every_engine(ranks, data, name, tmp_path):
    """DeepSpeed must not scale a second time, and clipping must see gradients without scale."""

    def config(engine, zero_stage, precision):
        folder = tmp_path / f"{engine}{zero_stage}{precision}"
        made = config_of(data, folder, engine, zero_stage, precision, optimizer={"name": name, "clip": 0.5})
        return replace(made, optimizer=replace(made.optimizer, lr=0.05 if name == "sgd" else 0.001))

    plain = ranks(2).run(losses_in, config("ddp", 1, "float32"))[0][0]
    scaled = [ranks(2).run(losses_in, config(*getattr(engine, "values", engine), "float16"))[0] for engine in ENGINES]
    for losses, notes in scaled:
        assert notes == scaled[0][1] and not notes[0][0]
        assert losses == pytest.approx(plain, rel=0.01)
        assert losses == pytest.approx(scaled[0][0], rel=1e-3)


def ends_in(config, what, sentence):
    with pytest.raises(ValueError, match=sentence):
        run_with(config, what, steps=range(1, 9))


@pytest.mark.parametrize(
    ("what", "non_finite", "sentence"),
    [
        (
            "loss",
            "skip",
            r"3 steps in a row, up to step 4, .* because features or loss held.*step-00000003;.*not-finite-4.txt names",
        ),
        ("backbone", "skip", r"3 steps in a row, up to step 4, .* because a gradient held NaN or infinity.*not-finite-4.txt names"),
        ("loss", "raise", r"the loss of step 1 is nan, though its features are finite.*not-finite-2.txt names the images"),
        ("classifier", "raise", r"the gradient of step 1 holds NaN or infinity, though its loss is finite.*not-finite-2.txt names"),
    ],
)
def test_a_run_ends_with_the_images_of_its_last_step(ranks, data, what, non_finite, sentence, tmp_path):
    config = config_of(data, tmp_path, run={"most_skipped": 3, "accumulation": 2}, save_every=1)
    ranks(2).run(ends_in, replace(config, classifier=replace(config.classifier, non_finite=non_finite)), what, sentence)
    (path,) = tmp_path.glob("not-finite-*.txt")
    head, *lines = path.read_text().splitlines()
    count = 6 if "the loss of step" in sentence else 12  # of each rank; on a CPU the first micro-batch tells
    assert head == "rank\tindex\tname" and len(lines) == 2 * count
    rows = [line.split("\t") for line in lines]
    assert [row[0] for row in rows] == ["0"] * count + ["1"] * count
    assert len({row[1] for row in rows}) > count  # some of the end of an epoch come again in the next
    assert all(row[2].endswith((".jpg", ".png")) for row in rows), rows[0]


def test_prototypes_that_moved_in_backward_cannot_be_left_out(ranks, data, tmp_path):
    config = config_of(data, tmp_path, optimizer={"in_backward": True})
    ranks(2).run(ends_in, config, "backbone", r"step 1 is to be left out, but in_backward=True has moved prototypes by it: go back")


def spiking(config, at):
    """Runs on every rank, with a loss that is ten times itself at these steps: (what was said, state as in the last checkpoint)."""
    call, said = type(config.loss).__call__, []
    trainer = Trainer(config, join())

    def spiked(self, batch):
        return call(self, batch) * (10.0 if trainer.step in at else 1.0)

    try:
        with mock.patch.object(type(config.loss), "__call__", spiked), mock.patch.object(trainer.monitor, "say", said.append):
            trainer.fit()
    finally:
        trainer.close()
    saved = checkpoint.locate(config.run.folder)
    return [line for line in said if line.startswith("step")], {name: saved.whole(name) for name in saved}, saved.info["course"]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "zero_stage"), [("ddp", 1), ("deepspeed", 3)])
def test_a_spike_rolls_back_and_goes_on_past_the_batch(ranks, data, engine, zero_stage, tmp_path):
    def config(name, every=10):
        made = config_of(data, tmp_path / name, engine, zero_stage, run={"epochs": 34 * 24 / 78, "spike": 3.0}, save_every=every)
        return replace(made, optimizer=replace(made.optimizer, clip=0.1))

    at = (
        5,
        24,
        25,
        28,
        29,
        30,
    )  # the first comes before there are enough losses, the third and the last two before anything has moved again
    results = ranks(2).run(spiking, config("whole"), at)
    lines, state, course = results[0]
    newest = str(tmp_path / "whole" / "checkpoints" / "step-00000020")
    assert [line.split(":")[0] for line in lines] == ["step 25", "step 26", "step 29", "step 30", "step 31"]
    assert lines[0].endswith(f"left out, and went on with the weights of {newest}") and lines[1].endswith("left out")
    assert newest in lines[2] and results[1][0] == lines
    assert course["rollbacks"] == 2
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollbacks"] for row in rows if "loss" in row][23:31] == [0, 1, 1, 1, 1, 2, 2, 2]
    assert [row for row in rows if "loss" in row][-1]["skipped_steps"] == 5

    # A run that is broken off and goes on does the same, also from a checkpoint that was saved right after a roll-back.
    ranks(2).run(train_until_spiking, config("broken"), at, 30)
    again = ranks(2).run(spiking, config("broken"), at)[0]
    assert again[2] == course
    for name, tensor in state.items():
        assert torch.equal(again[1][name], tensor), name


def train_until_spiking(config, at, stop):
    call = type(config.loss).__call__
    steps = iter(range(10**6))

    def spiked(self, batch):
        return call(self, batch) * (10.0 if next(steps) in at else 1.0)

    with mock.patch.object(type(config.loss), "__call__", spiked):
        train_until(config, stop)


def test_a_spike_before_the_first_checkpoint_is_only_left_out(ranks, data, tmp_path):
    config = config_of(data, tmp_path, run={"epochs": 23 * 24 / 78, "spike": 3.0})
    (line,), _, course = ranks(1).run(spiking, config, (21,))[0]
    assert line.endswith("left out, but there is no checkpoint to go back to yet") and course["rollbacks"] == 0
