"""Element-wise maps of non-target cosines, for losses that reweigh negatives. Each is a formula; its slope follows from autograd, or is
taken as 1 (straight-through) where the loss's authors do so."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def check_slope(slope: str) -> None:
    if slope not in ("exact", "straight_through"):
        raise ValueError(f"slope is {slope!r}, but must be 'exact' or 'straight_through'")


def sloped(mapped: Tensor, cosines: Tensor, slope: str) -> Tensor:
    """A mapped cosine with its own slope ("exact") or that of the cosine ("straight_through")."""
    return mapped if slope == "exact" else cosines + (mapped - cosines).detach()


@dataclass(frozen=True, eq=False)
class Map:
    """cosines -> function(cosines, parameter). `function` maps [B, n] cosines with the rows' parameters [B, 1] (None if there are none),
    element by element, in torch operations. `slope` is "exact" or "straight_through" (1).

    in_place     (cosines, parameter, slope, spare), [B, n] except the parameter: the same without new memory, which on a CPU takes longer
                 than the arithmetic. It overwrites the cosines with the function, fills `slope`, and may use `spare`
    parameter_B  a number per row, without gradient"""

    function: Callable[[Tensor, Tensor | None], Tensor]
    slope: str = "exact"
    bound: float = 1.0  # largest |function|: logits are at most scale x bound
    in_place: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None
    parameter_B: Tensor | None = None

    def __post_init__(self) -> None:
        check_slope(self.slope)

    def parameter(self) -> Tensor | None:
        """[B, 1]"""
        return None if self.parameter_B is None else self.parameter_B.detach()[:, None]

    def with_slope(
        self, cosines_Bn: Tensor, wants_slope: bool = True, memory: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(mapped, slope) of a tile; a slope None is 1 or not wanted. With memory (slope, scratch) [B, n] it may overwrite the tile."""
        parameter_B1 = self.parameter()
        if self.in_place is not None and memory is not None and parameter_B1 is not None:
            self.in_place(cosines_Bn, parameter_B1, *memory)
            return cosines_Bn, memory[0] if self.slope == "exact" else None
        if self.slope == "straight_through" or not wants_slope:
            return self.function(cosines_Bn, parameter_B1), None
        with torch.enable_grad():
            cosines_Bn = cosines_Bn.detach().requires_grad_()
            mapped_Bn = self.function(cosines_Bn, parameter_B1)
            (slope_Bn,) = torch.autograd.grad(mapped_Bn.sum(), cosines_Bn)
        return mapped_Bn.detach(), slope_Bn
