"""Parts of a backbone by their names, and layers that do not move.

A pattern names parameters, or modules with all that is in them, as shell patterns do: `stages.0`, `layer[12]`, `*.bias`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Named parameters get no gradient. Named modules, and layers all of whose parameters are named, compute as in evaluation: batch
    statistics stay and are used, and there is no dropout. They stay in eval mode as long as nobody calls `module.train()`."""
    frozen: set[str] = set()
    for pattern in patterns:
        frozen |= matches(module, pattern, "frozen")
    for name, parameter in module.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for name, part in module.named_modules():
        own = {f"{name}.{key}" if name else key for key, _ in part.named_parameters(recurse=False)}
        is_layer = bool(own) and not list(part.children())
        if (is_layer and own <= frozen) or any(_names(pattern, name) for pattern in patterns):
            part.training = False


def matches(module: nn.Module, pattern: str, field: str) -> set[str]:
    """Names of the parameters that a pattern of optimizer.FIELD names; ValueError if there is none."""
    names = [name for name, _ in module.named_parameters()]
    found = {name for name in names if _names(pattern, name)}
    if not found:
        parts = ", ".join(name for name, _ in module.named_children())
        raise ValueError(
            f"optimizer.{field}: {pattern!r} names no parameter of the backbone, whose parts are {parts}, and whose parameters have names "
            f"such as {names[0]}"
        )
    return found


def _names(pattern: str, name: str) -> bool:
    """Whether it names this parameter or module, or a module around it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
