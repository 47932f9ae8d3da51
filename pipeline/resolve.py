"""Turns the name of a recipe, or a recipe file, into the configuration that a run uses."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from partial_fc import losses
from partial_fc.fields import hint_at
from pipeline import backbones
from pipeline.config import RENAMED, TrainConfig
from pipeline.overrides import override
from pipeline.recipes import RECIPES


def resolve(recipe: str, overrides: Sequence[str] | None = None) -> TrainConfig:
    """The configuration of a recipe (a name, or a Python file with a function `recipe`) with `section.field=value` overrides applied."""
    config = override(_call(recipe, _find_recipe(recipe)), overrides or ())
    backbones.check(config.backbone, config.data.image_size)
    losses.name_of(config.loss)  # a recipe's own loss may lack one
    if not config.run.folder:
        name = os.path.splitext(os.path.basename(recipe))[0]
        config = replace(config, run=replace(config.run, folder=os.path.join("runs", name)))
    return replace(config, run=replace(config.run, folder=os.path.normpath(config.run.folder)))


def _call(name: str, recipe: Callable[[], TrainConfig]) -> TrainConfig:
    try:
        config = recipe()
    except Exception as error:
        raise ValueError(f"recipe {name} cannot be run: {type(error).__name__}: {error}{_new_name(error)}") from error
    if not isinstance(config, TrainConfig):
        raise ValueError(f"recipe {name} returns {type(config).__name__}, but must return a TrainConfig")
    return config


def _new_name(error: Exception) -> str:
    """What a field is called now that a recipe sets by its former name."""
    for old, new in RENAMED.items():
        if f"unexpected keyword argument {old.rpartition('.')[2]!r}" in str(error):
            return f" ({old} is now {new})"
    return ""


def _find_recipe(recipe: str) -> Callable[[], TrainConfig]:
    if recipe.endswith(".py"):
        if not os.path.isfile(recipe):
            raise ValueError(f"recipe file {recipe} does not exist")
        spec = importlib.util.spec_from_file_location("protoshard_recipe", recipe)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and type hints of a loss that the file defines look for names there
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise ValueError(f"recipe file {recipe} cannot be run: {type(error).__name__}: {error}") from error
        if not callable(getattr(module, "recipe", None)):
            raise ValueError(f"recipe file {recipe} has no function recipe() that returns a TrainConfig")
        return module.recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is unknown: {hint_at(recipe, RECIPES)}")
    return RECIPES[recipe]
