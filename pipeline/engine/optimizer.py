"""The backbone's optimizer, whose groups of parameters may have a rate and a weight decay of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline import backbones
from pipeline.engine.parameters import matches
from pipeline.schedule import OptimizerConfig


def build_optimizer(config: OptimizerConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Of all that moves; there must be something."""
    parts = groups(config, module)
    fused = parts[0]["params"][0].device.type in ("cpu", "cuda")  # one pass over memory
    if config.name == "adamw":
        return torch.optim.AdamW(parts, lr=config.lr, fused=fused)
    return torch.optim.SGD(parts, lr=config.lr, momentum=config.momentum, fused=fused)


def make_state(config: OptimizerConfig, parameter: Tensor) -> dict[str, Tensor]:
    """State before the first step, which is then a step like any other: with a gradient that is not finite torch's fused SGD would leave
    a momentum of its first step unwritten, and a checkpoint would hold what memory held."""
    if config.name == "adamw":
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **zeros}
    return {"momentum_buffer": torch.zeros_like(parameter)} if config.momentum else {}


def set_rate(optimizer: Any, lr: float) -> None:
    """Gives each group of parameters its share of the learning rate. optimizer: torch's, or DeepSpeed's around one"""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


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
    for pattern, factor in reversed(config.lr_factors):  # so that the first that names a parameter counts
        factors |= dict.fromkeys(matches(module, pattern, "lr_factors"), factor)
    if config.layer_decay != 1:
        layers = backbones.layers_of(module)
        head = max(layers.values())
        factors = {name: factor * config.layer_decay ** (head - layers[name]) for name, factor in factors.items()}
    return factors
