"""Losses that need several images of an identity in a batch, and batches that have none."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from dali_loaders.faces import FacesConfig, write_faces
from partial_fc import PartialFC, losses
from partial_fc.global_batch import GlobalBatch
from pipeline.distributed import join
from pipeline.positives import check_positives, check_something_moves
from pipeline.trainer import Trainer
from tests.pipeline.runs import configuration, faces

FACES = np.full(848, 5)


def names():
    return [name for name in losses.REGISTRY if not name.startswith("test_") and name != "sum"]


def learns(loss):
    """Whether features get a gradient from a batch of eight identities with one image each; with a bank, once it is filled."""
    torch.manual_seed(0)
    classifier = PartialFC(20, 16, loss, class_counts=torch.full((20,), 5))
    for step in range(3):
        classifier.step = step
        features = torch.randn(8, 16).requires_grad_()
        classifier(features, torch.arange(8)).backward()
        classifier.end_step()
    return bool(features.grad.abs().max() > 1e-9)


@pytest.mark.parametrize("name", names())
def test_only_those_learn_nothing_that_say_so(name):
    loss = losses.build(name)
    assert learns(loss) == (loss.needs_positives() != "only")


def calls_of(loss):
    """Which of the methods that look for other samples of an identity the loss calls."""
    called = set()
    with (
        mock.patch.object(GlobalBatch, "pairs", autospec=True, side_effect=spy(GlobalBatch.pairs, called)),
        mock.patch.object(GlobalBatch, "against_samples", autospec=True, side_effect=spy(GlobalBatch.against_samples, called)),
    ):
        learns(loss)
    return called


def spy(method, called):
    def asked(*arguments, **options):
        called.add(method.__name__)
        return method(*arguments, **options)

    return asked


@pytest.mark.parametrize("name", names())
def test_a_loss_that_looks_for_positives_says_so(name):
    """unpg takes negative pairs only; prototype_memory finds an identity's last image in its memory."""
    loss = losses.build(name)
    assert bool(calls_of(loss)) == (loss.needs_positives() != "no" or name in ("unpg", "prototype_memory"))


def test_of_a_sum():
    def needs(*parts, **options):
        return losses.build("sum", parts=tuple({"name": name} for name in parts), **options).needs_positives()

    assert needs("cosface", "triplet") == "partly" and needs("triplet", "sample_softmax") == "only" and needs("cosface", "uce") == "no"
    assert needs("cosface", "triplet", weights=(1.0, 0.0)) == "no" and losses.build("unitsface").needs_positives() == "partly"
    assert losses.build("uss").needs_positives() == "partly" and losses.build("uss", source="bank").needs_positives() == "no"


@pytest.mark.parametrize(
    ("name", "batch", "group", "words"),
    [
        ("cosface", 64, 1, None),
        ("triplet", 64, 2, None),
        (
            "triplet",
            64,
            1,
            "only from samples whose identity has another image in the batch: of 64 samples these are 3.8 on average",
        ),
        ("unitsface", 64, 1, "the loss unitsface learns partly from samples whose identity has"),
        ("contrastive", 4096, 1, None),  # 4 others of each identity on average
    ],
)
def test_a_line_where_a_batch_rarely_holds_positives(name, batch, group, words):
    line = check_positives(losses.build(name), FACES, batch, group)
    assert line is None if words is None else words in line and "set data.images_per_identity=2 or more" in line


def test_nothing_to_learn_is_refused():
    loss, single = losses.build("triplet"), np.ones(100, int)
    for counts, batch in ((single, 64), (FACES, 1)):
        with pytest.raises(ValueError, match=r"the loss triplet learns only from samples .*, but no batch ever holds two"):
            check_positives(loss, counts, batch, 1)
    with pytest.raises(ValueError, match="and from samples of other identities, but a batch of 4 holds one"):
        check_positives(loss, FACES, 4, 4)
    assert "these are 0 on average" in check_positives(losses.build("unitsface"), single, 64, 1)


def test_a_run_says_it_at_its_start(tmp_path, capfd):
    data = faces(str(tmp_path))
    config = replace(configuration(data, str(tmp_path / "run"), 2), loss=losses.build("triplet"))
    config = replace(config, run=replace(config.run, batch=6))
    Trainer(config, join()).close()
    assert capfd.readouterr().err.count("the loss triplet learns only from samples") == 1
    write_faces(str(tmp_path / "single.tar"), FacesConfig(identities=13, images_per_identity=1, size=32), workers=1)
    alone = replace(config, data=replace(config.data, train=str(tmp_path / "single.tar"), min_images=1))
    with pytest.raises(ValueError, match="no batch ever holds two"):
        Trainer(alone, join())


def test_a_frozen_backbone_and_a_loss_without_prototypes_have_nothing_to_learn():
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    check_something_moves(losses.build("cosface"), frozen)
    check_something_moves(losses.build("triplet"), torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the loss triplet uses no prototypes"):
        check_something_moves(losses.build("triplet"), frozen)
