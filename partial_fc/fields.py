"""Rules of options, as annotations of their fields: `share: Annotated[float, Within(0.0, 1.0, "it is a share")]`."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Within:
    """Requires least <= value <= most; otherwise ValueError with the reason."""

    least: float
    most: float
    reason: str

    def __call__(self, name: str, value: float) -> None:
        if not self.least <= value <= self.most:
            raise ValueError(f"{name} is {value}, but must lie in [{self.least:g}, {self.most:g}]: {self.reason}")


def positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, but must be positive (64 is usual, 16 to 32 for small sets)")


COSINES = Within(0.0, 2.0, "cosines differ by at most 2")
ANGLE = Within(0.0, 1.57, "it is an angle in radians, below pi / 2")
Scale = Annotated[float, positive]
Margin = Annotated[float, COSINES]
Angle = Annotated[float, ANGLE]
Cosine = Annotated[float, Within(-1.0, 1.0, "it is a cosine")]
Share = Annotated[float, Within(0.0, 1.0, "it is a share")]
Weight = Annotated[float, Within(0.0, math.inf, "it is a weight")]
Steps = Annotated[int, Within(1, math.inf, "it is a number of steps")]


def check_fields(options: Any) -> None:
    """ValueError unless each field of a dataclass has a value that its annotation allows: one of a Literal, or as an Annotated rules."""
    hints = get_type_hints(type(options), include_extras=True)
    for item in fields(options):
        _check(item.name, getattr(options, item.name), hints[item.name])


def _check(name: str, value: Any, hint: Any) -> None:
    kind = get_origin(hint)
    if kind is Annotated:
        for rule in hint.__metadata__:
            rule(name, value)
    elif kind is Literal and value not in get_args(hint):
        raise ValueError(f"{name} is {value!r}, but must be {' or '.join(map(repr, get_args(hint)))}")
    elif kind in (Union, UnionType) and value is not None:
        for choice in get_args(hint):
            _check(name, value, choice)


def hint_at(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that does not exist."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(sorted(known))}"
