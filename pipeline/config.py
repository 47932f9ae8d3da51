"""The configuration of a training run: sections owned by their components, and its text and dictionary forms.
Recipes fill it (recipes/), `--set` changes it (overrides.py), and resolve.py does both."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import reduce
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dali_loaders import renamed
from dali_loaders.config import DataConfig
from dali_loaders.names import printable
from dali_loaders.remote import without_secrets
from partial_fc import losses
from partial_fc.classifier import ClassifierConfig
from partial_fc.losses import Loss
from pipeline.backbones import BackboneConfig
from pipeline.checkpoint import CheckpointConfig
from pipeline.engine import EngineConfig
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.monitor.config import MonitorConfig
from pipeline.schedule import OptimizerConfig
from pipeline.starting_weights import StartConfig

renamed.names(__name__, {"resolve": "pipeline.resolve"})

# Fields by their former names, "section.old": "section.new". --set and recipes end in a sentence with the new name; a configuration saved
# in a checkpoint is read as if it had been written with it.
RENAMED: dict[str, str] = {}


@dataclass(frozen=True)
class RunConfig:
    folder: str = ""  # checkpoints, metrics and TensorBoard files; "" becomes runs/RECIPE. On a cluster: on a file system all nodes share
    seed: int = 0  # of the order, first weights, augmentation, dropout and sampling
    batch: int = 128  # samples per optimizer step, over all ranks and micro-batches
    accumulation: int = 1  # micro-batches per step
    epochs: float = 20.0  # passes over the images; parts of one are allowed
    ema: float = 0.0  # decay of a running average of the backbone's weights, evaluated beside them, such as 0.9999; 0: none
    margin_warmup: float = 0.0  # share of the run over which the loss's margins (fields ending so) grow from 0; helps small sets
    most_skipped: int = 100  # steps in a row that are left out because something in them is not finite, before the run stops
    spike: float = 0.0  # a loss above this many times the mean of the last 100 rolls back to the newest checkpoint, such as 3; 0: never
    deterministic: bool = False  # the same command gives the same bits, also across interruptions; slower on GPUs
    log_every: int = 20  # steps between lines of metrics
    timeout: float = 60.0  # minutes that ranks wait for each other, at the start for the slowest storage, before the run fails

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("accumulation", 1), ("most_skipped", 1), ("log_every", 1), ("seed", 0)):
            if not least <= getattr(self, name) < 1 << 31:
                raise ValueError(f"run.{name} is {getattr(self, name)}, but must be at least {least} and below 2**31")
        if self.batch % self.accumulation:
            raise ValueError(f"run.batch is {self.batch}, which run.accumulation = {self.accumulation} does not divide")
        if not 0 < self.epochs < 1e9:
            raise ValueError(f"run.epochs is {self.epochs}, but must be positive and below 1e9")
        if not 0 < self.timeout < 1e6:
            raise ValueError(f"run.timeout is {self.timeout} minutes, but must be positive and below 1e6")
        if self.spike != 0 and not 1 < self.spike < 1e9:
            raise ValueError(f"run.spike is {self.spike}, but must be above 1 and below 1e9, or 0 to roll back never")
        if not 0 <= self.ema < 1:
            raise ValueError(f"run.ema is {self.ema}, but must be at least 0, which is none, and below 1")
        if not 0 <= self.margin_warmup <= 1:
            raise ValueError(f"run.margin_warmup is {self.margin_warmup}, but must be from 0 to 1")


@dataclass(frozen=True)
class TrainConfig:
    run: RunConfig = field(default_factory=RunConfig)
    start: StartConfig = field(default_factory=StartConfig)
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    loss: Loss = field(default_factory=lambda: losses.build("cosface"))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


MOST = 1e300  # of a number in a saved configuration; what its field may be, the section says


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
            yield f"{prefix}{item.name} = {value_text(value)}"


def value_text(value: Any) -> str:
    """The text that `overrides.parse` reads back, without secrets of addresses."""
    if isinstance(value, tuple) and not any(isinstance(item, tuple | Mapping) for item in value):
        value = ", ".join(map(str, value))
    return without_secrets(str(value))


def options_of(config: TrainConfig) -> dict[str, str | float]:
    """What tables that compare runs show of a configuration: the loss, and fields that are not as a new TrainConfig has them, by
    `section.field`; numbers as numbers, all else as text."""
    usual = set(_lines(TrainConfig(), "")) - {"loss = cosface"}
    return {name: _number(text) for name, text in (line.split(" = ", 1) for line in _lines(config, "") if line not in usual)}


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """Nested dictionaries of plain values, with the loss's name under loss.name; `from_dict` reads them back."""
    loss = {"name": losses.name_of(config.loss), **asdict(config.loss)}  # type: ignore[call-overload]
    return _public({**asdict(config), "loss": loss})


def _public(value: Any) -> Any:
    """A checkpoint may be given away, so no password of an address goes into it."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_public, value))
    return without_secrets(value) if isinstance(value, str) else value


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The configuration that `as_dict` wrote. ValueError for a field that this version does not know, or a value of another type."""
    if not (isinstance(values, dict) and all(isinstance(part, dict) for part in values.values())):
        raise ValueError("the saved configuration is not one of sections and fields")
    try:
        return _from_dict(TrainConfig, _with_new_names(values), "")
    except RecursionError:
        raise ValueError("the saved configuration has values nested too deep") from None


def _with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    values = copy.deepcopy(values)
    for old, new in RENAMED.items():
        (*sections, name), (*new_sections, new_name) = old.split("."), new.split(".")
        part = reduce(lambda part, section: part.get(section, {}), sections, values)
        if name in part:
            reduce(lambda part, section: part.setdefault(section, {}), new_sections, values)[new_name] = part.pop(name)
    return values


def _from_dict(kind: type, values: dict[str, Any], prefix: str) -> Any:
    types = get_type_hints(kind)
    parts: dict[str, Any] = {}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"the saved configuration has {prefix}{printable(str(name))[:100]}, which this version does not know")
        if is_dataclass(types[name]) and not isinstance(value, dict):
            raise ValueError(f"the saved configuration has {prefix}{name} = {reprlib.repr(value)}, which is no section")
        if types[name] is Loss:
            if not isinstance(value.get("name"), str):
                raise ValueError("the saved configuration names no loss")
            try:
                parts[name] = losses.build(**{key: with_tuples(item) for key, item in value.items()})
            except TypeError as error:
                raise ValueError(f"the saved configuration has a loss that cannot be built ({error})") from None
        elif is_dataclass(types[name]):
            parts[name] = _from_dict(types[name], value, f"{prefix}{name}.")
        else:
            parts[name] = with_tuples(value)
            if not _fits(parts[name], types[name]):
                raise ValueError(f"the saved configuration has {prefix}{name} = {reprlib.repr(value)}, which is of another type")
    return kind(**parts)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value out of JSON is of a field's type. Of a Literal the type counts: which values it may have, the section itself says."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in options)
    if origin is Literal:
        return any(type(value) is type(option) for option in options)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, options[0]) for item in value)
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST
        return number and (kind is float or value == int(value))
    return isinstance(value, origin or kind)


def with_tuples(value: Any) -> Any:
    """JSON has no tuples, and configurations have no lists."""
    if isinstance(value, dict):
        return {key: with_tuples(item) for key, item in value.items()}
    return tuple(map(with_tuples, value)) if isinstance(value, list | tuple) else value
