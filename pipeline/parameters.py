"""Which of a backbone's parameters move, and by how much: frozen layers, and groups with a rate and a weight decay of their own.

A pattern names parameters, or modules with all that is in them, as shell patterns do: `stages.0`, `layer[12]`, `*.bias`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from pipeline.schedule import OptimizerConfig


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


def groups(config: OptimizerConfig, module: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups, for torch's optimizers, of all that moves; engines multiply the learning rate by a group's `factor`."""
    factors = _factors(config, module)
    undecayed: set[str] = set()
    for pattern in config.no_decay:
        undecayed |= matches(module, pattern, "no_decay")
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if name in undecayed else config.weight_decay
            found.setdefault((factors[name], decay), []).append(parameter)
    return [{"params": parameters, "factor": factor, "weight_decay": decay} for (factor, decay), parameters in found.items()]


def _factors(config: OptimizerConfig, module: nn.Module) -> dict[str, float]:
    """By name of a parameter, what its learning rate is multiplied by."""
    factors = {name: 1.0 for name, _ in module.named_parameters()}
    for pattern, factor in reversed(config.rates):  # so that the first that names a parameter counts
        factors |= dict.fromkeys(matches(module, pattern, "rates"), factor)
    if config.layer_decay != 1:
        from pipeline.backbones import layers_of

        layers = layers_of(module)
        head = max(layers.values())
        factors = {name: factor * config.layer_decay ** (head - layers[name]) for name, factor in factors.items()}
    return factors


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
