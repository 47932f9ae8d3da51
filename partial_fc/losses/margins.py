"""Margins on the target similarity: CosFace, ArcFace and the combined margin.
All are softplus(non_target - scale * phi(target)), which is softmax cross-entropy with the target logit replaced."""

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from partial_fc.fields import ANGLE, COSINES, Angle, Margin, Scale, Within
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, register, softplus
from partial_fc.maps import sloped

TITLE = "Margins on the target"


@register("cosface")
class CosFace(Loss):
    """Wang et al., CVPR 2018, eq. 4: scale 64, margin 0.35 (0.4 on Glint360K and WebFace)."""

    formula = r"\mathrm{softplus}\left(a_i - s (t_i - m)\right)"
    use = "The first choice, for thousands to a hundred million identities; better with substitution."
    scale: Scale = 64.0
    margin: Margin = 0.4

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics = batch.against_classes(scale=self.scale)
        return softplus(statistics.non_target_B - self.scale * (statistics.target_B - self.margin)).mean()


@register("arcface")
class ArcFace(Loss):
    """Deng et al., CVPR 2019, eq. 3: scale 64, margin 0.5 in radians.

    slope  "exact": sin(theta + margin) / sin(theta) per unit of cosine; "straight_through": 1, as in the code of arcface_torch"""

    formula = r"\mathrm{softplus}\left(a_i - s\cos(\theta_i + m)\right)"
    use = "Like CosFace, with more pull on targets that are nearly right; the usual choice for comparison with published results."
    scale: Scale = 64.0
    margin: Angle = 0.5
    slope: Literal["exact", "straight_through"] = "exact"

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics = batch.against_classes(scale=self.scale)
        return softplus(statistics.non_target_B - self.scale * angular(statistics.target_B, 1.0, self.margin, self.slope)).mean()


@register("combined")
class Combined(Loss):
    """Deng et al., CVPR 2019, eq. 4: margins (1, 0.3, 0.2) and (0.9, 0.4, 0.15). (1, 0.5, 0) is ArcFace, (1, 0, 0.35) CosFace."""

    formula = r"\mathrm{softplus}(a_i - s (\cos(m_1\theta_i + m_2) - m_3)),\quad m_1, m_2, m_3 = \text{angle factor, angle margin, margin}"
    use = "To repeat runs with margins (m1, m2, m3) of arcface_torch, or to search between ArcFace and CosFace."
    scale: Scale = 64.0
    angle_factor: Annotated[float, Within(0.1, 8.0, "it multiplies the angle")] = 1.0  # m1, on the target's angle
    angle_margin: Angle = 0.3  # m2, added to the target's angle
    margin: Margin = 0.2  # m3, on the target's cosine
    slope: Literal["exact", "straight_through"] = "exact"  # as in arcface

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics = batch.against_classes(scale=self.scale)
        phi_B = angular(statistics.target_B, self.angle_factor, self.angle_margin, self.slope) - self.margin
        return softplus(statistics.non_target_B - self.scale * phi_B).mean()


def least_of(dtype: torch.dtype) -> float:
    """The distance that keeps slopes by the angle finite near |cosine| = 1; it moves the cosine by less than the dtype resolves."""
    return 1e-7 if dtype is torch.float32 else 1e-15


def angles(cosines: Tensor) -> Tensor:
    """arccos, with no slope at -1 and 1."""
    least = least_of(cosines.dtype)
    return torch.arccos(cosines.clamp(least - 1, 1 - least))


def angular(target_B: Tensor, factor: float, margin: float | Tensor, slope: str = "exact") -> Tensor:
    """cos(factor theta + margin), theta = arccos(target); the margin is a number or [B]. Past pi the cosine would rise again. There phi
    keeps falling with theta: target - margin sin(margin) for factor 1 (the first code of ArcFace's authors), otherwise -2 - cos(factor
    theta + margin), as in SphereFace. A negative margin, allowed for factor 1 only, gives 1 below theta = -margin.

    slope  "exact", or "straight_through" (1) for losses whose authors leave the derivative out"""
    if factor == 1.0:
        # On a GPU the host would wait for the copy that makes a tensor from a number.
        cosine, sine = (margin.cos(), margin.sin()) if isinstance(margin, Tensor) else (math.cos(margin), math.sin(margin))
        sine_B = torch.sqrt((1 - target_B.square()).clamp(min=least_of(target_B.dtype)))
        inside_B = target_B * cosine - sine_B * sine
        is_past_B = (margin >= 0) & (target_B <= -cosine)
        is_before_B = (margin < 0) & (target_B >= cosine)
        phi_B = torch.where(is_past_B, target_B - margin * sine, inside_B).masked_fill(is_before_B, 1.0)
    else:
        angle_B = factor * angles(target_B) + margin
        phi_B = torch.where(angle_B < math.pi, torch.cos(angle_B), -2 - torch.cos(angle_B))
    return sloped(phi_B, target_B, slope)


def with_margin(target_B: Tensor, margin: float, kind: str) -> Tensor:
    """The target with a margin on its angle for "arc" and "arcface", otherwise on its cosine."""
    return angular(target_B, 1.0, margin) if kind in ("arc", "arcface") else target_B - margin


def check_margin(margin: float, kind: str) -> None:
    (ANGLE if kind in ("arc", "arcface") else COSINES)("margin", margin)
