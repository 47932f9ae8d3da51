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

    With a sample rate below 1 only the sampled rows are read and written: the others are frozen, without decay or momentum.
    The gradient is used as scratch memory: after `step` it no longer holds the gradient.
    """

    def __init__(self, classifier: PartialFC, lr: float, momentum: float = 0.9, weight_decay: float = 5e-4, nesterov: bool = False) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(f"RowSGD needs lr >= 0, 0 <= momentum < 1 and weight_decay >= 0, but got {lr}, {momentum} and {weight_decay}")
        if nesterov and not momentum:
            raise ValueError("RowSGD with nesterov needs a momentum above 0")
        super().__init__(classifier.parameters(), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})
        self.classifier = classifier
        for parameter in classifier.parameters():
            # From the start, so that a checkpoint always has one; zeros give torch's first step too: momentum x 0 + gradient.
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "RowSGD takes no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._update_sampled(parameter, group)
                elif parameter.grad is not None:
                    self._update(parameter, group)
        self.classifier.end_step()

    def _update_sampled(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Rows that were not sampled keep weight and momentum as they are: nothing of them is read."""
        grad, sample, buffer = parameter.grad, self.classifier.sample, self.state[parameter]["momentum_buffer"]
        assert grad is not None and sample is not None
        if self.classifier.draws > 1:
            raise ValueError(
                f"{self.classifier.draws} samples of classes were drawn since the last step, so that their gradients do not add up: "
                "call classifier.begin_step(labels of all micro-batches) first"
            )
        columns = len(sample.rows_K)
        # Micro-batches of one step share their sample, and autograd appends their gradients to each other.
        grad_KD = grad._values().view(-1, columns, *parameter.shape[1:])
        grad_KD = grad_KD[0] if len(grad_KD) == 1 else grad_KD.sum(dim=0)
        chunk = _rows_per_chunk(parameter)
        for rows, grad_kD, is_real in zip(sample.rows_K.split(chunk), grad_KD.split(chunk), sample.is_real_K.split(chunk), strict=True):
            weight, momentum = parameter[rows], buffer[rows]
            grad_kD.add_(weight, alpha=group["weight_decay"])
            moved = torch.add(grad_kD, momentum, alpha=group["momentum"])
            step = grad_kD.add_(moved, alpha=group["momentum"]) if group["nesterov"] else moved
            # Padding holds rows that were not sampled: they are written back as they were.
            buffer.index_copy_(0, rows, torch.where(is_real[:, None], moved, momentum))
            parameter.index_copy_(0, rows, torch.where(is_real[:, None], weight - group["lr"] * step, weight))

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        rows = _rows_per_chunk(parameter)
        assert parameter.grad is not None
        for weight, grad, momentum in zip(
            parameter.split(rows), parameter.grad.split(rows), self.state[parameter]["momentum_buffer"].split(rows), strict=True
        ):
            grad.add_(weight, alpha=group["weight_decay"])
            momentum.mul_(group["momentum"]).add_(grad)
            weight.sub_(grad.add_(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum, alpha=group["lr"])


def _rows_per_chunk(parameter: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, parameter[:1].numel()))
