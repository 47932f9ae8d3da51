"""Losses on row statistics: a registry by name. A loss is a frozen dataclass with a `scale` that maps `Statistics` to a scalar."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Protocol, TypeVar

from torch import Tensor

from partial_fc.similarity import Statistics


class Loss(Protocol):
    @property
    def scale(self) -> float:
        """Factor of the cosines inside the exponentials."""
        ...

    def __call__(self, statistics: Statistics) -> Tensor:
        """Mean loss over the global batch, a scalar."""
        ...


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
    return next(name for name, cls in REGISTRY.items() if type(loss) is cls)


from partial_fc.losses import margins as margins  # noqa: E402 (fills the registry)
