"""What a loss is and what losses share: a registry by name, checks of their fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from torch import Tensor
from typing_extensions import dataclass_transform  # which torch brings

from partial_fc.fields import check_fields, hint_at
from partial_fc.global_batch import GlobalBatch
from partial_fc.statistics import softplus as softplus  # for losses to import from here

Needs = Literal["no", "partly", "only"]


class Loss(Protocol):
    """What losses inherit: by default nothing is learned or tracked."""

    formula: ClassVar[str] = ""  # in LaTeX, with the symbols of docs/losses-reference.md
    use: ClassVar[str] = ""  # what the loss is for, in a sentence

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, batch: GlobalBatch) -> Tensor:
        """Mean loss over the global batch, a scalar, equal on every rank."""

    def learned(self, num_classes: int) -> dict[str, float]:
        """First values of scalars that the prototypes' optimizer trains too: batch.parameter(name)."""
        return {}

    def learned_by_class(self, num_classes: int) -> dict[str, float]:
        """The same for vectors with one number per class."""
        return {}

    def tracked(self) -> dict[str, float | Tensor]:
        """First values of what is kept from step to step: running figures, for batch.track(name, value, share), or tensors, for
        batch.kept(name) and batch.keep(name, value)."""
        return {}

    def with_margins(self, share: float) -> Loss:
        """The loss with each margin (a field whose name is or ends in margin) multiplied by `share`, for a warm-up."""
        margins = {item.name: share * getattr(self, item.name) for item in fields(self) if item.name.endswith("margin")}  # type: ignore
        return replace(self, **margins)  # type: ignore[type-var]

    def queued(self) -> dict[str, int]:
        """Names and row counts of matrices [rows, width], zeros at first, for batch.kept and batch.keep."""
        return {}

    def uses_bank(self) -> bool:
        """Whether the loss asks for the bank of last features: batch.fresh, batch.against_bank."""
        return False

    def needs_positives(self) -> Needs:
        """Whether it learns from samples whose identity has another image in the batch, and from them only. A trainer warns of batches
        that rarely hold such."""
        return "no"


REGISTRY: dict[str, type] = {}
_L = TypeVar("_L", bound=type)


@dataclass_transform(frozen_default=True)
def register(name: str) -> Callable[[_L], _L]:
    """Makes a class a frozen dataclass, unless it is one already, and gives it a name."""

    def add(cls: _L) -> _L:
        REGISTRY[name] = cls if "__dataclass_params__" in vars(cls) else dataclass(frozen=True)(cls)
        return cls

    return add


def build(name: str, **parameters: Any) -> Loss:
    """The loss called `name` with its fields set, e.g. build("cosface", scale=64.0, margin=0.4)."""
    if name not in REGISTRY:
        raise ValueError(f"loss {name!r} is unknown: {hint_at(name, REGISTRY)}")
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
