"""Turns the name of a recipe, or a recipe file, into the configuration that a run uses."""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from dali_loaders.names import quoted
from dali_loaders.outputs import check_folder
from dali_loaders.remote import is_remote
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
    for field, folder in (("run.folder", config.run.folder), ("checkpoint.folder", config.checkpoint.folder)):
        if not is_remote(folder):
            check_folder(folder, field)
    if not config.run.folder:
        name = os.path.splitext(os.path.basename(recipe))[0]
        config = replace(config, run=replace(config.run, folder=os.path.join("runs", name)))
    return replace(config, run=replace(config.run, folder=os.path.normpath(config.run.folder)))


def _call(name: str, recipe: Callable[[], TrainConfig]) -> TrainConfig:
    try:
        config = recipe()
    except Exception as error:
        raise ValueError(f"recipe {quoted(name)} cannot be run: {type(error).__name__}: {error}{_new_name(error)}") from error
    if not isinstance(config, TrainConfig):
        raise ValueError(f"recipe {quoted(name)} returns {type(config).__name__}, but must return a TrainConfig")
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
            raise ValueError(f"recipe file {quoted(recipe)} does not exist, or is no regular file")
        spec = importlib.util.spec_from_file_location("protoshard_recipe", recipe)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        _admit_neighbours(recipe)
        sys.modules[spec.name] = module  # dataclasses and type hints of a loss that the file defines look for names there
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise ValueError(f"recipe file {quoted(recipe)} cannot be run: {type(error).__name__}: {error}") from error
        if not callable(getattr(module, "recipe", None)):
            raise ValueError(f"recipe file {quoted(recipe)} has no function recipe() that returns a TrainConfig")
        return module.recipe
    if recipe not in RECIPES:
        hint = hint_at(recipe, RECIPES).rstrip("?")
        raise ValueError(f"recipe {recipe!r} is unknown: {hint}? `protoshard recipes` lists all; a file of yours ends in .py")
    return RECIPES[recipe]


def _admit_neighbours(recipe: str) -> None:
    """Lets a recipe file import the modules beside it, for the whole process, because they may import others later.

    Their folder comes last in sys.path, so that a neighbour called like a module of an installed package or of Python itself does not get
    into its place. ValueError if the file, or a neighbour that it imports, asks for a neighbour and Python would take another module.
    """
    folder = os.path.dirname(os.path.abspath(recipe))
    if folder not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    files = [os.path.abspath(recipe)]
    for file in files:  # grows on the way
        for name in _imports(file):
            candidates = (os.path.join(folder, f"{name}.py"), os.path.join(folder, name, "__init__.py"))
            mine = next((path for path in candidates if os.path.isfile(path)), None)
            if mine is None or mine in files:
                continue
            files.append(mine)
            spec = importlib.util.find_spec(name)
            taken = spec.origin if spec and spec.origin else "another module"
            if os.path.realpath(taken) != os.path.realpath(mine):
                raise ValueError(f"{file} imports {name}, but Python takes {taken} for it instead of {mine}: give yours another name")


def _imports(file: str) -> Iterator[str]:
    """First parts of the names of all modules that a file imports anywhere; none if it cannot be parsed, which running it will tell."""
    try:
        with tokenize.open(file) as source:
            tree = ast.parse(source.read())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
