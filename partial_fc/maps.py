"""Element-wise maps of non-target cosines, for losses that reweigh negatives. Each is a formula; its slope follows from autograd, or is
taken as 1 (straight-through) where the loss's authors do so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Map:
    """cosines -> function(cosines, parameter). `function` maps [B, n] cosines with the rows' parameters [B, 1] (without gradient; None if
    the loss gives none), element by element, in torch operations. `slope` is that of the function, or 1 with "straight_through"; a
    `derivative` of the same arguments saves the passes that autograd needs to find it."""

    function: Callable[[Tensor, Tensor | None], Tensor]
    slope: str = "exact"
    bound: float = 1.0  # largest |function|: logits are at most scale x bound
    derivative: Callable[[Tensor, Tensor | None], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.slope not in ("exact", "straight_through"):
            raise ValueError(f"the slope of a map is {self.slope!r}, but must be 'exact' or 'straight_through'")

    def with_slope(self, cosines_Bn: Tensor, parameter_B1: Tensor | None, wants_slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """(mapped, slope) of a tile; None stands for a slope of 1, or for one that is not wanted."""
        if self.slope == "straight_through" or not wants_slope:
            return self.function(cosines_Bn, parameter_B1), None
        if self.derivative is not None:
            return self.function(cosines_Bn, parameter_B1), self.derivative(cosines_Bn, parameter_B1)
        with torch.enable_grad():
            cosines_Bn = cosines_Bn.detach().requires_grad_()
            mapped_Bn = self.function(cosines_Bn, parameter_B1)
            (slope_Bn,) = torch.autograd.grad(mapped_Bn.sum(), cosines_Bn)
        return mapped_Bn.detach(), slope_Bn
