"""Margins on the target similarity: CosFace and ArcFace.
Both are softplus(non_target - scale * phi(target)), which is softmax cross-entropy with the target logit replaced."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.kernels.chunked import softplus
from partial_fc.losses import register
from partial_fc.similarity import Statistics


def _check(scale: float, margin: float, largest: float, why: str) -> None:
    if scale <= 0:
        raise ValueError(f"scale is {scale}, but must be positive (64 is usual, 16 to 32 for small sets)")
    if not 0 <= margin < largest:
        raise ValueError(f"margin is {margin}, but must lie in [0, {largest:g}): {why}")


@register("cosface")
@dataclass(frozen=True)
class CosFace:
    """phi(t) = t - margin. Wang et al., CVPR 2018, eq. 4: scale 64, margin 0.35 (0.4 on Glint360K and WebFace)."""

    scale: float = 64.0
    margin: float = 0.4

    def __post_init__(self) -> None:
        _check(self.scale, self.margin, 2.0, "cosines differ by at most 2")

    def __call__(self, statistics: Statistics) -> Tensor:
        return softplus(statistics.non_target_B - self.scale * (statistics.target_B - self.margin)).mean()


@register("arcface")
@dataclass(frozen=True)
class ArcFace:
    """phi(t) = cos(arccos t + margin), margin in radians. Deng et al., CVPR 2019, eq. 3: scale 64, margin 0.5.

    The slope is the exact one, sin(theta + margin) / sin(theta) per unit of cosine. Past theta = pi - margin, where the cosine would
    rise again, phi continues as t - margin sin(margin) (the authors' first code), which keeps it decreasing in the angle.
    """

    scale: float = 64.0
    margin: float = 0.5

    def __post_init__(self) -> None:
        _check(self.scale, self.margin, math.pi / 2, "it is an angle in radians")

    def __call__(self, statistics: Statistics) -> Tensor:
        target_B = statistics.target_B
        # sin(theta) has an infinite slope at |t| = 1; 1e-7 keeps it finite and moves the cosine by less than float32 resolves.
        sine_B = torch.sqrt((1 - target_B.square()).clamp(min=1e-7))
        inside_B = target_B * math.cos(self.margin) - sine_B * math.sin(self.margin)
        beyond_B = target_B - self.margin * math.sin(self.margin)
        phi_B = torch.where(target_B > -math.cos(self.margin), inside_B, beyond_B)
        return softplus(statistics.non_target_B - self.scale * phi_B).mean()
