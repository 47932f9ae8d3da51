"""SGD with momentum on the rows of a PartialFC."""

from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.optim.sgd import sgd

from partial_fc.classifier import PartialFC
from partial_fc.optimizers.row_optimizer import RowOptimizer


class RowSGD(RowOptimizer):
    """SGD with momentum and weight decay, equal to torch.optim.SGD to rounding. Options: see RowOptimizer. A step without gradient is
    linear in (weight, momentum), so all steps that a row missed are one 2 x 2 matrix: "lazy" costs the same for any number of them."""

    state_names = ("momentum_buffer",)
    most_missed = 1024

    def __init__(
        self,
        classifier: PartialFC,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        nesterov: bool = False,
        *,
        unsampled: Literal["frozen", "lazy"] = "frozen",
        in_backward: bool = False,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(f"RowSGD needs lr >= 0, 0 <= momentum < 1 and weight_decay >= 0, but got {lr}, {momentum} and {weight_decay}")
        if nesterov and not momentum:
            raise ValueError("RowSGD with nesterov needs a momentum above 0")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(classifier, defaults, unsampled, in_backward)

    def _move(self, group: dict[str, Any], step: int, grad_nD: Tensor, weight_nD: Tensor, *state_nD: Tensor) -> None:
        options = {name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
        sgd([weight_nD], [grad_nD], list(state_nD), fused=True, dampening=0.0, maximize=False, **options)

    def _missed_step(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """[[a, b], [c, d]] of (weight, momentum) -> (a weight + b momentum, c weight + d momentum)."""
        lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        if group["nesterov"]:  # weight - lr (gradient + momentum (momentum buffer))
            return 1 - lr * decay * (1 + momentum), -lr * momentum**2, decay, momentum
        return 1 - lr * decay, -lr * momentum, decay, momentum

    def _coefficients(self) -> np.ndarray:
        products = [np.eye(2)]
        for step in reversed(self._missed):
            products.append(products[-1] @ np.reshape(step, (2, 2)))
        return np.reshape(products[::-1], (-1, 4))

    def _make_up(self, coefficients_n1: list[Tensor], weight_nD: Tensor, *state_nD: Tensor) -> None:
        (momentum_nD,) = state_nD
        a, b, c, d = coefficients_n1
        from_weight_nD = weight_nD * c
        weight_nD.mul_(a).addcmul_(momentum_nD, b)
        momentum_nD.mul_(d).add_(from_weight_nD)
