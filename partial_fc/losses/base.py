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


def kept_by(loss: Loss) -> tuple[object, ...]:
    """The names of all that a loss learns and keeps in a classifier."""
    if isinstance(loss, type) or not hasattr(loss, "learned_by_class"):
        raise ValueError(f"loss is {loss!r}, but must be one of losses.build(...), or of a class with @losses.register above it")
    return set(loss.learned(1)), set(loss.learned_by_class(1)), set(loss.tracked()), loss.queued(), loss.uses_bank()


REGISTRY: dict[str, type] = {}
_L = TypeVar("_L", bound=type)


@dataclass_transform(frozen_default=True)
def register(name: str) -> Callable[[_L], _L]:
    """Makes a class a frozen dataclass, unless it is one already, and gives it a name, which must be new; a class of the same module and
    name may be defined anew, as notebooks do."""

    def add(cls: _L) -> _L:
        if (other := REGISTRY.get(name)) is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"there is a loss named {name!r} already, {other.__module__}.{other.__qualname__}: take another name")
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
