"""Recipes, overrides and their sentences; a configuration survives being saved."""

from __future__ import annotations

import pytest

from partial_fc.losses.margins import ArcFace
from pipeline.config import as_dict, as_text, from_dict, resolve
from pipeline.recipes import RECIPES


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_survives_saving_and_says_its_command(name):
    config = resolve(name)
    assert from_dict(as_dict(config)) == config
    assert config.run.folder.endswith(name)
    assert name in (RECIPES[name].__doc__ or "")


def test_what_is_printed_can_be_set():
    config = resolve("dogs_small", ["loss=arcface", "loss.margin=0.25", "data.augment.flip=false", "evaluation.pairs=a.bin,b.bin"])
    assert config.loss == ArcFace(margin=0.25) and not config.data.augment.flip and config.evaluation.pairs == ("a.bin", "b.bin")
    assert "data.images_per_identity = 1" in as_text(config).splitlines()
    lines = [line.replace(" = ", "=", 1) for line in as_text(config).splitlines()]
    assert resolve("omniglot_small", lines) == config


def test_a_python_file_is_a_recipe(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from pipeline.config import RunConfig, TrainConfig\ndef recipe():\n    return TrainConfig(run=RunConfig(seed=7))\n")
    assert resolve(str(file)).run.seed == 7


@pytest.mark.parametrize(
    ("recipe", "override", "sentence"),
    [
        ("dog_small", "", "recipe 'dog_small' is unknown: did you mean 'dogs_small'"),
        ("no/such.py", "", "recipe file no/such.py does not exist"),
        ("dogs_small", "optimiser.lr=1", "'optimiser' is unknown: did you mean 'optimizer'"),
        ("dogs_small", "optimizer.lrate=1", "'lrate' is unknown: did you mean 'lr'"),
        ("dogs_small", "run.batch=many", "run.batch=many: expected a whole number"),
        ("dogs_small", "run.batch=0", "run.batch is 0"),
        ("dogs_small", "run.seed=-1", "run.seed is -1"),
        ("dogs_small", "run.epochs=nan", "expected a number"),
        ("dogs_small", "optimizer.momentum=-1", "optimizer.momentum is -1"),
        ("dogs_small", "run.accumulation=3", "which run.accumulation = 3 does not divide"),
        ("dogs_small", "data.images_per_identity=0", "data.images_per_identity is 0; expected at least 1"),
        ("dogs_small", "data.augment.flip=maybe", "expected true or false"),
        ("dogs_small", "data=x", "this is a section"),
        ("dogs_small", "run.batch", "takes section.field=value"),
        ("dogs_small", "loss=cosfase", "did you mean 'cosface'"),
        ("dogs_small", "engine.name=fsdp", "must be deepspeed or ddp"),
        ("dogs_small", "engine.zero_stage=3", "must be 1 or 2"),
        ("dogs_small", "optimizer.schedule=step", "must be one of polynomial, cosine"),
        ("dogs_small", "checkpoint.keep=0", "checkpoint.keep is 0"),
    ],
)
def test_bad_input_ends_in_a_sentence(recipe, override, sentence):
    with pytest.raises(ValueError, match=sentence):
        resolve(recipe, [override] if override else [])


def test_a_recipe_file_without_recipe(tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("x = 1\n")
    with pytest.raises(ValueError, match="has no function recipe"):
        resolve(str(file))
    file.write_text("x = 1 / 0\n")
    with pytest.raises(ValueError, match="cannot be run: ZeroDivisionError"):
        resolve(str(file))
