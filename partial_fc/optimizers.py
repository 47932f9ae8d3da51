"""The classifier's own optimizer. Its parameters are sharded, so they stay outside the data-parallel engine and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from partial_fc.classifier import PartialFC

CHUNK_ELEMENTS = 1 << 19  # weights, momentum and gradient of one chunk (6 MB) stay in cache through the three passes


class RowSGD(torch.optim.Optimizer):
    """SGD with momentum and weight decay on a PartialFC, equal to torch.optim.SGD to rounding; rows are updated chunk by chunk.

    The gradient is used as scratch memory: after `step` it no longer holds the gradient.
    """

    def __init__(self, classifier: PartialFC, lr: float, momentum: float = 0.9, weight_decay: float = 5e-4, nesterov: bool = False) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(f"RowSGD needs lr >= 0, 0 <= momentum < 1 and weight_decay >= 0, but got {lr}, {momentum} and {weight_decay}")
        if nesterov and not momentum:
            raise ValueError("RowSGD with nesterov needs a momentum above 0")
        super().__init__(classifier.parameters(), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})
        for parameter in classifier.parameters():
            # From the start, so that a checkpoint always has one; zeros give torch's first step too: momentum x 0 + gradient.
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "RowSGD takes no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        rows = max(1, CHUNK_ELEMENTS // max(1, parameter[:1].numel()))
        assert parameter.grad is not None
        for weight, grad, momentum in zip(
            parameter.split(rows), parameter.grad.split(rows), self.state[parameter]["momentum_buffer"].split(rows), strict=True
        ):
            grad.add_(weight, alpha=group["weight_decay"])
            momentum.mul_(group["momentum"]).add_(grad)
            weight.sub_(grad.add_(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum, alpha=group["lr"])
