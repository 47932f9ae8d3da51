"""Recipes, overrides and their sentences; a configuration survives being saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from dali_loaders.config import AugmentConfig
from partial_fc import losses
from partial_fc.losses import Loss
from partial_fc.losses.margins import ArcFace
from pipeline.config import RENAMED, as_dict, as_text, from_dict
from pipeline.recipes import RECIPES
from pipeline.resolve import resolve


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


@dataclass(frozen=True)
class Options(Loss):
    """One field of every kind that losses have."""

    low: float = 0.0
    high: float = 1.0
    threshold: float | None = None
    slope: Literal["exact", "straight"] = "exact"
    note: str | None = None
    neighbours: int | None = None
    detached: bool = False
    weights: tuple[float, ...] = ()
    levels: tuple[int, int] = (1, 2)
    parts: tuple[Mapping[str, Any], ...] = ({"name": "cosface"}, {"name": "uss", "threshold": None})

    def __post_init__(self):
        if self.low >= self.high:
            raise ValueError(f"low is {self.low}, but must be below high, {self.high}")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(losses.REGISTRY, "test_options", Options)


OPTIONS = [
    ["loss=uce"],
    ["loss=uce", "loss.threshold=0.2"],
    ["loss=uce", "loss.threshold=0.2", "loss.threshold=None"],
    ["loss=uss", "loss.threshold=-0.5", "loss.margin=0.1"],
    ["loss=arcface", "loss.slope=straight_through"],
    ["loss=test_options"],
    ["loss=test_options", "loss.low=7", "loss.high=8.5"],  # valid only together
    ["loss=test_options", "loss.note=a b", "loss.neighbours=3", "loss.detached=true", "loss.weights=1, 0.5", "loss.levels=3,4"],
    ["loss=test_options", "loss.weights=2", "loss.parts=[{'name': 'sum', 'parts': [{'name': 'gce'}], 'weights': [1.5]}]"],
]


@pytest.mark.parametrize("overrides", OPTIONS)
def test_losses_survive_saving_and_printing(overrides):
    config = resolve("dogs_small", overrides)
    assert from_dict(json.loads(json.dumps(as_dict(config)))) == config
    lines = [line.replace(" = ", "=", 1) for line in as_text(config).splitlines()]
    assert resolve("omniglot_small", lines) == config


def test_augmentations_by_name():
    """Whatever the order, the name comes first and its fields after it. It replaces the recipe's."""
    expected = replace(AugmentConfig.named("adaface"), blur=0.1, crop_area=(0.5, 1.0), jpeg_quality=(10, 20))
    fields = ["data.augment.blur=0.1", "data.augment.crop_area=0.5,1", "data.augment.jpeg_quality=10, 20"]
    for overrides in (["data.augment=adaface", *fields], [*fields, "data.image_size=32", "data.augment=adaface"]):
        config = resolve("dogs_small", overrides)
        assert config.data.augment == expected
        lines = [line.replace(" = ", "=", 1) for line in as_text(config).splitlines()]
        assert resolve("dogs_small", [line for line in lines if line.startswith("data.")]).data == config.data
        assert from_dict(json.loads(json.dumps(as_dict(config)))) == config
    assert resolve("dogs_small", ["data.augment=none"]).data.augment == AugmentConfig(flip=False)


def test_options_of_losses_have_the_type_of_their_fields():
    loss = resolve("dogs_small", [*OPTIONS[-2], "loss.threshold=1"]).loss
    assert loss == Options(threshold=1.0, note="a b", neighbours=3, detached=True, weights=(1.0, 0.5), levels=(3, 4))
    assert [type(value) for value in (loss.threshold, loss.neighbours, *loss.weights, *loss.levels)] == [float, int, float, float, int, int]
    assert resolve("dogs_small", OPTIONS[-1]).loss.parts == ({"name": "sum", "parts": ({"name": "gce"},), "weights": (1.5,)},)
    assert resolve("dogs_small", OPTIONS[2]).loss.threshold is None


def test_a_python_file_is_a_recipe(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from pipeline.config import RunConfig, TrainConfig\ndef recipe():\n    return TrainConfig(run=RunConfig(seed=7))\n")
    assert resolve(str(file)).run.seed == 7


@pytest.mark.parametrize(
    ("recipe", "override", "sentence"),
    [
        ("dog_small", "", "recipe 'dog_small' is unknown: did you mean 'dogs_small'"),
        ("no/such.py", "", "recipe file no/such.py does not exist"),
        ("dogs_small", "optimiser.lr=1", "'optimiser' is unknown: did you mean optimizer.lr"),
        ("dogs_small", "optimizer.lrate=1", "'lrate' is unknown: did you mean optimizer.lr"),
        ("dogs_small", "batch=1", "'batch' is unknown: did you mean run.batch"),
        ("dogs_small", "run.epoch=1", "'epoch' is unknown: did you mean run.epochs"),
        ("dogs_small", "loss=gce loss.alfa=1", "'alfa' is unknown: did you mean loss.alpha"),
        ("dogs_small", "=1", "takes section.field=value, but got '=1'"),
        ("dogs_small", "data.weights=1,,2", "data.weights=1,,2: there is nothing between two of its commas"),
        ("dogs_small", "run.batch=1e3.5", "run.batch=1e3.5: expected a whole number"),
        ("dogs_small", "run.batch=1.5e0", "run.batch=1.5e0: expected a whole number"),
        ("dogs_small", "run.batch=1e999", "run.batch=1e999: expected a whole number"),
        ("dogs_small", "run.batch=nan", "run.batch=nan: expected a whole number"),
        ("dogs_small", "run.batch=", "run.batch=: expected a whole number"),
        ("dogs_small", "run.deterministic=", "run.deterministic=: expected true or false"),
        ("dogs_small", "optimizer.step_epochs=1,x", "step_epochs=x: expected a number"),
        ("dogs_small", "run.batch=many", "run.batch=many: expected a whole number"),
        ("dogs_small", "run.batch=0", "run.batch is 0"),
        ("dogs_small", "run.seed=-1", "run.seed is -1"),
        ("dogs_small", "run.epochs=nan", "expected a number"),
        ("dogs_small", "optimizer.momentum=-1", "optimizer.momentum is -1"),
        ("dogs_small", "run.accumulation=3", "which run.accumulation = 3 does not divide"),
        ("dogs_small", "data.images_per_identity=0", "data.images_per_identity is 0; expected at least 1"),
        ("dogs_small", "data.augment.flip=maybe", "expected true or false"),
        ("dogs_small", "data=x", "this is a section"),
        ("dogs_small", "data.augment=ada", "data.augment is 'ada'; expected one of none, flip, adaface"),
        ("dogs_small", "data.augment.crop_area=1,0.2", r"augment.crop_area is \(1.0, 0.2\); expected two numbers"),
        ("dogs_small", "run.batch", "takes section.field=value"),
        ("dogs_small", "loss=cosfase", "did you mean 'cosface'"),
        ("dogs_small", "loss=uce loss.threshold=high", "loss.threshold=high: expected a number"),
        ("dogs_small", "loss=uce loss.threshold=", "loss.threshold=: expected a number or None"),
        ("dogs_small", "loss=uce loss.threshold=3", r"threshold is 3.0, but must lie in \[-1, 1\]"),
        ("dogs_small", "loss=test_options loss.neighbours=1.5", "expected a whole number or None"),
        ("dogs_small", "loss=test_options loss.weights=1;2", "expected a number"),
        ("dogs_small", "loss=test_options loss.parts=cosface,uss", "expected a list as Python writes it"),
        ("dogs_small", "loss=test_options loss.low=2", "low is 2.0, but must be below high"),
        ("dogs_small", "loss.margin.more=1", "'margin' has no fields of its own"),
        ("dogs_small", "backbone.name=iresnet51", "no backbone named 'iresnet51': did you mean 'iresnet50'"),
        ("dogs_small", "data.image_size=100", "needs an image size divisible by 16, not 100"),
        ("dogs_small", "engine.name=fsdp", "must be deepspeed or ddp"),
        ("dogs_small", "engine.zero_stage=4", "must be 1, 2 or 3"),
        ("dogs_small", "optimizer.schedule=step", "must be one of polynomial, cosine"),
        ("dogs_small", "checkpoint.keep=0", "checkpoint.keep is 0"),
    ],
)
def test_bad_input_ends_in_a_sentence(recipe, override, sentence):
    with pytest.raises(ValueError, match=sentence):
        resolve(recipe, override.split())


def test_a_recipe_file_without_recipe(tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("x = 1\n")
    with pytest.raises(ValueError, match="has no function recipe"):
        resolve(str(file))
    file.write_text("x = 1 / 0\n")
    with pytest.raises(ValueError, match="cannot be run: ZeroDivisionError"):
        resolve(str(file))


def test_a_recipe_whose_loss_has_no_name(tmp_path):
    file = tmp_path / "nameless.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom partial_fc.losses.margins import CosFace\nfrom pipeline.config import TrainConfig\n\n"
        "@dataclass(frozen=True)\nclass Mine(CosFace):\n    pass\n\ndef recipe():\n    return TrainConfig(loss=Mine())\n"
    )
    with pytest.raises(ValueError, match=r'loss Mine has no name: put @register\("NAME"\) above its class'):
        resolve(str(file))


def test_fields_that_go_together_may_be_given_apart():
    changed = resolve("dogs_small", ["optimizer.schedule=steps", "run.epochs=12", "optimizer.step_epochs=8"])
    assert changed.optimizer.step_epochs == (8,) and changed.run.epochs == 12


def test_a_loss_may_be_named_after_its_fields():
    assert resolve("dogs_small", ["loss.margin=0.15", "loss=arcface"]).loss == losses.build("arcface", margin=0.15)


def test_a_renamed_field_ends_in_its_new_name_and_loads_from_a_checkpoint(tmp_path, monkeypatch):
    config = resolve("dogs_small", ["run.batch=96", "checkpoint.keep=7"])
    saved = json.loads(json.dumps(as_dict(config)))
    saved["run"]["images_per_step"] = saved["run"].pop("batch")
    saved["engine"]["keep"] = saved["checkpoint"].pop("keep")
    with pytest.raises(ValueError, match=r"the saved configuration has run.images_per_step, which this version does not know"):
        from_dict(saved)
    for old, new in (("run.images_per_step", "run.batch"), ("engine.keep", "checkpoint.keep"), ("data.never_there", "data.train")):
        monkeypatch.setitem(RENAMED, old, new)
    assert from_dict(saved) == config
    assert from_dict(as_dict(config)) == config
    with pytest.raises(ValueError, match=r"^--set run\.images_per_step: this field is now run\.batch$"):
        resolve("dogs_small", ["run.images_per_step=96"])
    file = tmp_path / "mine.py"
    file.write_text("from pipeline.config import *\ndef recipe():\n    return TrainConfig(run=RunConfig(images_per_step=96))\n")
    with pytest.raises(ValueError, match=r"mine.py cannot be run: TypeError: .* \(run.images_per_step is now run.batch\)$"):
        resolve(str(file))
