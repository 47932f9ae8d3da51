"""The configuration of a training run: sections owned by their components, recipes that fill them, `--set` overrides, and text forms."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import itertools
import math
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dali_loaders.decode import DataConfig
from partial_fc import losses
from partial_fc.classifier import ClassifierConfig
from partial_fc.losses import Loss
from pipeline import backbones
from pipeline.backbones import BackboneConfig
from pipeline.checkpoint import CheckpointConfig
from pipeline.engine import EngineConfig
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.schedule import OptimizerConfig


@dataclass(frozen=True)
class RunConfig:
    folder: str = ""  # checkpoints, metrics and TensorBoard files; "" becomes runs/RECIPE. On a cluster: on a file system all nodes share
    seed: int = 0
    batch: int = 128  # samples per optimizer step, over all ranks and micro-batches
    accumulation: int = 1  # micro-batches per step
    epochs: float = 20.0
    margin_warmup: float = 0.0  # share of the run over which the loss's margins (fields ending so) grow from 0; helps small sets
    log_every: int = 20  # steps between lines of metrics

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("accumulation", 1), ("log_every", 1), ("seed", 0)):
            if not least <= getattr(self, name) < 1 << 31:
                raise ValueError(f"run.{name} is {getattr(self, name)}, but must be at least {least} and below 2**31")
        if self.batch % self.accumulation:
            raise ValueError(f"run.batch is {self.batch}, which run.accumulation = {self.accumulation} does not divide")
        if not 0 < self.epochs < 1e9:
            raise ValueError(f"run.epochs is {self.epochs}, but must be positive and below 1e9")
        if not 0 <= self.margin_warmup <= 1:
            raise ValueError(f"run.margin_warmup is {self.margin_warmup}, but must be from 0 to 1")


@dataclass(frozen=True)
class TrainConfig:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    loss: Loss = field(default_factory=lambda: losses.build("cosface"))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def resolve(recipe: str, overrides: list[str] | None = None) -> TrainConfig:
    """The configuration of a recipe (a name, or a Python file with a function `recipe`) with `section.field=value` overrides applied."""
    config = _call(recipe, _find_recipe(recipe))
    # Another loss has fields of its own: chosen last, it would undo what was set of it.
    ordered = sorted(map(_split, overrides or []), key=lambda change: change[0] != "loss")
    for section, changes in itertools.groupby(ordered, key=lambda change: change[0].rpartition(".")[0]):
        config = _set(config, section.split(".") if section else [], list(changes))
    backbones.check(config.backbone, config.data.image_size)
    losses.name_of(config.loss)  # a recipe's own loss may lack one
    if not config.run.folder:
        name = os.path.splitext(os.path.basename(recipe))[0]
        config = replace(config, run=replace(config.run, folder=os.path.join("runs", name)))
    return replace(config, run=replace(config.run, folder=os.path.normpath(config.run.folder)))


def as_text(config: TrainConfig) -> str:
    """One `section.field = value` line per field, as `--set` takes them."""
    return "\n".join(_lines(config, ""))


def _lines(part: Any, prefix: str) -> Iterator[str]:
    if prefix == "loss.":
        yield f"loss = {losses.name_of(part)}"
    for item in fields(part):
        value = getattr(part, item.name)
        if is_dataclass(value):
            yield from _lines(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name} = {_text(value)}"


def _text(value: Any) -> str:
    """As `_parse` reads it."""
    if isinstance(value, tuple) and not any(isinstance(item, tuple | Mapping) for item in value):
        return ", ".join(map(str, value))
    return str(value)


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """Nested dictionaries of plain values, with the loss's name under loss.name; `from_dict` reads them back."""
    return {**asdict(config), "loss": {"name": losses.name_of(config.loss), **asdict(config.loss)}}  # type: ignore[call-overload]


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The configuration that `as_dict` wrote. A field it does not know, from another version, is a ValueError."""
    return _from_dict(TrainConfig, values, "")


def _from_dict(kind: type, values: dict[str, Any], prefix: str) -> Any:
    types = get_type_hints(kind)
    parts: dict[str, Any] = {}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"the saved configuration has {prefix}{name}, which this version does not know")
        if types[name] is Loss:
            parts[name] = losses.build(**{key: _with_tuples(item) for key, item in value.items()})
        elif is_dataclass(types[name]):
            parts[name] = _from_dict(types[name], value, f"{prefix}{name}.")
        else:
            parts[name] = _with_tuples(value)
    return kind(**parts)


def _with_tuples(value: Any) -> Any:
    """JSON has no tuples, and configurations have no lists."""
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list | tuple) else value


def _call(name: str, recipe: Callable[[], TrainConfig]) -> TrainConfig:
    try:
        config = recipe()
    except Exception as error:
        raise ValueError(f"recipe {name} cannot be run: {type(error).__name__}: {error}") from error
    if not isinstance(config, TrainConfig):
        raise ValueError(f"recipe {name} returns {type(config).__name__}, but must return a TrainConfig")
    return config


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(sorted(known))}"


def _find_recipe(recipe: str) -> Callable[[], TrainConfig]:
    if recipe.endswith(".py"):
        if not os.path.isfile(recipe):
            raise ValueError(f"recipe file {recipe} does not exist")
        spec = importlib.util.spec_from_file_location("protoshard_recipe", recipe)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses and type hints of a loss that it defines look for names
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise ValueError(f"recipe file {recipe} cannot be run: {type(error).__name__}: {error}") from error
        if not callable(getattr(module, "recipe", None)):
            raise ValueError(f"recipe file {recipe} has no function recipe() that returns a TrainConfig")
        return module.recipe
    from pipeline.recipes import RECIPES

    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r} is unknown: {_nearest(recipe, list(RECIPES))}")
    return RECIPES[recipe]


def _split(override: str) -> tuple[str, str]:
    """(path of the field, text of its value)."""
    path, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"--set takes section.field=value, but got {override!r}")
    return path.strip(), text.strip()


def _set(part: Any, section: list[str], changes: list[tuple[str, str]]) -> Any:
    """`part` with fields of one section below it replaced, in one go, because what one of them may be can depend on another; the
    dataclasses on the way check their values anew."""
    if section:
        value, _ = _field(part, section[0], changes[0][0])
        if not is_dataclass(value):
            raise ValueError(f"--set {changes[0][0]}: {section[0]!r} has no fields of its own")
        return replace(part, **{section[0]: _set(value, section[1:], changes)})
    values = {}
    for path, text in changes:
        name = path.rpartition(".")[2]
        value, kind = _field(part, name, path)
        if kind is Loss:
            values[name] = losses.build(text)
        elif is_dataclass(value):
            raise ValueError(f"--set {path}: this is a section: set one of its fields, {', '.join(item.name for item in fields(value))}")
        else:
            values[name] = _parse(path, text, kind)
    return replace(part, **values)


def _field(part: Any, name: str, path: str) -> tuple[Any, Any]:
    """Value and type."""
    known = [item.name for item in fields(part)]
    if name not in known:
        raise ValueError(f"--set {path}: {name!r} is unknown: {_nearest(name, known)}")
    return getattr(part, name), get_type_hints(type(part))[name]


def _parse(path: str, text: str, kind: Any) -> Any:
    """The text of an override as a value of the field's type: str, bool, int, float, a Literal of str or int, or a tuple (of such: values
    between commas; of others: as Python writes it), one of these or None, or one or several numbers between commas."""
    if get_origin(kind) in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not types.NoneType]
        if len(options) < len(get_args(kind)) and text.lower() == "none":
            return None
        is_list = "," in text and any(get_origin(option) is tuple for option in options)
        chosen = next(option for option in options if (get_origin(option) is tuple) == is_list)
        try:
            return _parse(path, text, chosen)
        except ValueError as error:
            raise ValueError(f"{error} or None" if len(options) < len(get_args(kind)) else str(error)) from None
    if get_origin(kind) is tuple:
        return _parse_tuple(path, text, get_args(kind)[0])
    kind = type(get_args(kind)[0]) if get_origin(kind) is Literal else kind  # which of its values are admitted, the section says
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise ValueError(f"--set {path}={text}: expected {expected}") from None


def _parse_tuple(path: str, text: str, kind: Any) -> tuple[Any, ...]:
    if kind in (str, int, float, bool):
        return tuple(_parse(path, item.strip(), kind) for item in text.split(",") if item.strip())
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, list | tuple):
        raise ValueError(f"--set {path}={text}: expected a list as Python writes it, [...]")
    return _with_tuples(value)
