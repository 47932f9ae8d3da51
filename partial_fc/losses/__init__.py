"""Losses: a registry by name. A loss is a frozen dataclass that maps the global batch, of which it asks a few numbers per sample, to a
scalar."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from partial_fc.global_batch import GlobalBatch


class Loss(Protocol):
    """What losses inherit: nothing is learned or tracked."""

    use: ClassVar[str] = ""  # what the loss is for, in a sentence

    def __call__(self, batch: GlobalBatch) -> Tensor:
        """Mean loss over the global batch, a scalar, equal on every rank."""
        ...

    def learned(self, num_classes: int) -> dict[str, float]:
        """First values of scalars that are trained with the prototypes, by the same optimizer: batch.parameter(name)."""
        return {}

    def learned_by_class(self, num_classes: int) -> dict[str, float]:
        """The same, one number per class."""
        return {}

    def tracked(self) -> dict[str, float | Tensor]:
        """First values of what is kept from step to step: running figures, batch.track(name, value, share), or tensors,
        batch.kept(name) and batch.keep(name, value)."""
        return {}

    def with_margins(self, share: float) -> Self:
        """The loss with each margin (a field called so, or ending so) multiplied by `share`, for a warm-up."""
        margins = {item.name: share * getattr(self, item.name) for item in fields(self) if item.name.endswith("margin")}  # type: ignore
        return replace(self, **margins)  # type: ignore[type-var]

    def queued(self) -> dict[str, int]:
        """The rows of tensors [rows, width], zeros at first, that are kept likewise, with names of their own."""
        return {}

    def uses_bank(self) -> bool:
        """Whether it asks for the bank of last features: batch.fresh, batch.with_bank."""
        return False


REGISTRY: dict[str, type] = {}
_L = TypeVar("_L", bound=type)


def register(name: str) -> Callable[[_L], _L]:
    def add(cls: _L) -> _L:
        REGISTRY[name] = cls
        return cls

    return add


def build(name: str, **parameters: Any) -> Loss:
    """The loss called `name` with its fields set, e.g. build("cosface", scale=64.0, margin=0.4)."""
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(sorted(REGISTRY))}"
        raise ValueError(f"loss {name!r} is unknown: {hint}")
    known = [field.name for field in fields(REGISTRY[name])]
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"loss {name!r} has no parameter {parameter!r}: it takes {', '.join(known)}")
    return REGISTRY[name](**parameters)


def name_of(loss: Loss) -> str:
    for name, cls in REGISTRY.items():
        if type(loss) is cls:
            return name
    raise ValueError(f'loss {type(loss).__name__} has no name: put @register("NAME") above its class')


def softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x, threshold=40.0)  # torch's 20 drops e^-20 = 2e-9, which float64 tests see


def check_scale(scale: float) -> None:
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}, but must be positive (64 is usual, 16 to 32 for small sets)")


def check_margin(margin: float, name: str = "margin") -> None:
    """Of cosines."""
    check_range(name, margin, 0.0, 2.0, "cosines differ by at most 2")


def check_range(name: str, value: float, least: float, most: float, why: str) -> None:
    """ValueError unless least <= value <= most."""
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}, but must lie in [{least:g}, {most:g}]: {why}")


for family in (
    "banks",
    "compactness",
    "global_thresholds",
    "margins",
    "nearest",
    "norms",
    "pair_losses",
    "reweighted",
    "samples",
    "spherefaces",
    "sums",
    "thresholds",
):
    importlib.import_module(f"{__name__}.{family}")  # fills the registry
