"""Batches that the ranks do not divide: the same losses on every number of ranks, and sentences for numbers of ranks that cannot be."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from partial_fc import losses
from partial_fc.classifier import ClassifierConfig
from pipeline import uneven_batches
from pipeline.backbones import BackboneConfig
from tests.pipeline.runs import configuration, faces, train_losses, train_until

pytestmark = pytest.mark.slow
STEPS, BATCH = 20, 17  # 17 has shares of 9 and 8, 6, 6 and 5, or 4, 4, 3, 3 and 3
SUBSTITUTION = {"sample_rate": 0.5, "substitution_rate": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces(str(tmp_path_factory.mktemp("faces")))


def config_of(data, folder, engine="ddp", *, batch=BATCH, accumulation=1, loss=None, classifier=None, group=1, lr=0.05, **changes):
    epochs = (STEPS - 0.1) * batch / (104 if group == 4 else 78)
    run = {"batch": batch, "accumulation": accumulation, "epochs": epochs, **changes.pop("run", {})}
    made = configuration(data, str(folder), STEPS, engine, run=run, **changes)
    made = replace(made, data=replace(made.data, images_per_identity=group))
    made = replace(made, optimizer=replace(made.optimizer, lr=lr))
    made = replace(made, loss=losses.build(loss) if loss else made.loss)
    return replace(made, classifier=ClassifierConfig(**classifier) if classifier else made.classifier)


@pytest.fixture(scope="module")
def one_rank(ranks, data, tmp_path_factory):
    return ranks(1).run(train_losses, config_of(data, tmp_path_factory.mktemp("one")))[0]


def assert_equal(found, expected):
    assert len(found) == len(expected) == STEPS
    print(f"largest relative deviation of {STEPS} losses: {max(abs(a / b - 1) for a, b in zip(found, expected, strict=True)):.1e}")
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3, 5])
def test_losses_of_ranks_that_do_not_divide_the_batch(ranks, data, one_rank, size, tmp_path):
    assert_equal(ranks(size).run(train_losses, config_of(data, tmp_path))[0], one_rank)
    with open(tmp_path / "metrics.jsonl") as file:
        rows = [row for row in map(json.loads, file) if "loss" in row]
    assert rows[-1]["epoch"] == pytest.approx(STEPS * BATCH / 78) and all(0 <= row["wait_share"] <= 1 for row in rows)


def test_saved_on_3_ranks_and_resumed_on_2(ranks, data, one_rank, tmp_path):
    config = config_of(data, tmp_path, save_every=8)
    ranks(3).run(train_until, config, 13)
    assert_equal(ranks(2).run(train_losses, config)[0], one_rank)


CASES = {
    "groups, micro-batches, substitution": {"batch": 56, "accumulation": 2, "group": 4, "loss": "uss", "classifier": SUBSTITUTION},
    "zero 1, gce": {"engine": "deepspeed", "loss": "gce", "classifier": SUBSTITUTION},
    "zero 2, micro-batches": {"engine": "deepspeed", "engine_options": {"zero_stage": 2}, "batch": 34, "accumulation": 2},
    "zero 3": {"engine": "deepspeed", "engine_options": {"zero_stage": 3}},
    "pairs": {"loss": "triplet", "group": 4, "batch": 28},
    "batch statistics of the loss": {"loss": "adaface"},
    "a running figure": {"loss": "curricularface"},
    "the bank": {"classifier": {**SUBSTITUTION, "substitution_source": "bank"}},
    "hard negatives": {"classifier": {"sample_rate": 0.3, "hard_negatives": 2}},
    "a joint clip": {"optimizer": {"clip": 0.3, "clip_jointly": True}},
    "in backward": {"optimizer": {"in_backward": True}},
}


@pytest.mark.parametrize("name", [next(iter(CASES)), *(pytest.param(name, marks=pytest.mark.long) for name in list(CASES)[1:])])
def test_losses_with_everything_that_looks_at_the_batch(ranks, data, name, tmp_path):
    """At a rate at which rounding does not grow: sums over classes or samples are steep at the start."""
    one, three = (ranks(size).run(train_losses, config_of(data, tmp_path / str(size), lr=0.01, **CASES[name]))[0] for size in (1, 3))
    assert_equal(three, one)


@pytest.mark.parametrize(
    ("batch", "accumulation", "group", "ranks", "words"),
    [
        (18, 1, 4, 2, "run.batch is 18, which run.accumulation = 1 and data.images_per_identity = 4 do not divide: use a multiple of 4"),
        (8, 1, 4, 3, "its 8 images cannot give each of 3 ranks at least 4; use at most 2 ranks, or a run.batch of at least 12"),
        (24, 4, 1, 7, "its micro-batches of 6 images cannot give each of 7 ranks at least 1; use at most 6 ranks, a run.accumulation that "
         "divides 24 and is at most 3, or a run.batch of at least 28"),
        (2, 1, 1, 4, "its 2 images cannot give each of 4 ranks at least 1; use at most 2 ranks, or a run.batch of at least 4"),
    ],
)  # fmt: skip
def test_ranks_that_cannot_be_are_refused(data, tmp_path, batch, accumulation, group, ranks, words):
    with pytest.raises(ValueError) as caught:
        uneven_batches.check(config_of(data, tmp_path, batch=batch, accumulation=accumulation, group=group), ranks)
    assert words in str(caught.value)


def test_batch_statistics_need_two_images(data, tmp_path):
    config = config_of(data, tmp_path, batch=5)
    uneven_batches.check(config, 3)  # small_nobn has none
    config = replace(config, backbone=BackboneConfig("small", width=16))
    with pytest.raises(ValueError, match="of 3 ranks at least 2, of which backbone small takes batch statistics; use at most 2 ranks, or"):
        uneven_batches.check(config, 3)
    uneven_batches.check(config, 2)
    uneven_batches.check(replace(config, optimizer=replace(config.optimizer, frozen=("*",))), 5)
