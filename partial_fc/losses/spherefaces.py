"""Plain softmax and the SphereFace family: the feature norm as scale, and margins that multiply the target's angle."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from partial_fc.fields import Scale, Within
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, register, softplus
from partial_fc.losses.margins import angles
from partial_fc.maps import Map, sloped
from partial_fc.unit_rows import EPSILON

Lambda = Annotated[float, Within(0.0, 1e9, "the share of the margin is 1 / (1 + lambda)")]

TITLE = "Softmax and SphereFace"


@register("softmax")
class Softmax(Loss):
    """Cross-entropy of <x, w_j>, neither normalised, no bias: what margins were measured against. The norm of a prototype then says how
    often its identity is guessed, which is of no use for identities outside the training set."""

    use = "A baseline; its prototypes depend on how often an identity was seen."

    def __call__(self, batch: GlobalBatch) -> Tensor:
        norms_B = norms_of(batch)
        statistics = batch.against_classes(scale=norms_B, normalize=False)
        return softplus(statistics.non_target_B - norms_B * statistics.target_B).mean()  # that target is <x, w_y> / |x|


@register("normalized_softmax")
class NormalizedSoftmax(Loss):
    """Cross-entropy of |x| cos(theta_j): the prototypes are normalised, the features are not. "Modified softmax" in
    Liu et al., CVPR 2017."""

    use = "A baseline without margin, and what SphereFace becomes for m = 1."

    def __call__(self, batch: GlobalBatch) -> Tensor:
        norms_B = norms_of(batch)
        statistics = batch.against_classes(scale=norms_B)
        return softplus(statistics.non_target_B - norms_B * statistics.target_B).mean()


@register("sphereface")
class SphereFace(Loss):
    """A-Softmax: |x| is the scale, and the target's cosine becomes (lambda cos(theta) + psi(theta)) / (1 + lambda) with
    psi(theta) = (-1)^k cos(m theta) - 2 k for theta in [k pi / m, (k + 1) pi / m]. Liu et al., CVPR 2017: m = 4.
    lambda = max(least_lambda, first_lambda (1 + lambda_decay step)^-lambda_power) lets the margin in slowly, as their code does
    (max(5, 1000 / (1 + 0.12 step))); least_lambda = first_lambda = 0 is the paper's formula.

    angle_factor  m, a whole number; with 1 this is "normalized_softmax"
    slope         "exact": the derivative. "straight_through": 1 per unit of the target's cosine, as opensphere has it. Their Caffe code
                  does a third thing, which is not here: it normalises the direction of the target's gradient by feature
    """

    use = "To compare with its publications; sensitive to the annealing, and to feature norms."
    angle_factor: Annotated[int, Within(1, 8, "it multiplies the angle")] = 4
    first_lambda: Lambda = 1000.0
    lambda_decay: Lambda = 0.12
    lambda_power: Lambda = 1.0
    least_lambda: Lambda = 5.0
    slope: Literal["exact", "straight_through"] = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.angle_factor != int(self.angle_factor):
            raise ValueError(f"angle_factor is {self.angle_factor}, but must be a whole number: sphereface_r takes fractions")

    def __call__(self, batch: GlobalBatch) -> Tensor:
        norms_B = norms_of(batch)
        statistics = batch.against_classes(scale=norms_B)
        weight = max(self.least_lambda, self.first_lambda * (1 + self.lambda_decay * batch.step) ** -self.lambda_power)
        psi_B = falling_cosine(statistics.target_B, int(self.angle_factor))
        phi_B = (weight * statistics.target_B + psi_B) / (1 + weight)
        return softplus(statistics.non_target_B - norms_B * sloped(phi_B, statistics.target_B, self.slope)).mean()


@register("sphereface_r")
class SphereFaceR(Loss):
    """Cross-entropy of scale x cosines, with the margin as a factor m of angles. Liu et al., "SphereFace Revived", TPAMI 2022, with
    normalised features ("hard feature normalisation"): scale 30, m = 1.5. Their code multiplies the loss by 50 / scale besides.

    version  "v1": the target is cos(min(m theta_y, pi)). "v2": non-targets are cos(theta_j / m)
    slope    "straight_through": 1, as they have it ("characteristic gradient detachment"). "exact": the derivative; that of v1 is 0
             beyond pi / m
    """

    use = "A multiplicative margin that trains without annealing."
    scale: Scale = 30.0
    angle_factor: Annotated[float, Within(1.0, 8.0, "it multiplies the target's angle")] = 1.5
    version: Literal["v1", "v2"] = "v1"
    slope: Literal["exact", "straight_through"] = "straight_through"

    def __call__(self, batch: GlobalBatch) -> Tensor:
        if self.version == "v2":
            statistics = batch.against_classes(scale=self.scale, map=Map(self._closer, self.slope))
            return softplus(statistics.non_target_B - self.scale * statistics.target_B).mean()
        statistics = batch.against_classes(scale=self.scale)
        phi_B = torch.cos((self.angle_factor * angles(statistics.target_B)).clamp(max=math.pi))
        return softplus(statistics.non_target_B - self.scale * sloped(phi_B, statistics.target_B, self.slope)).mean()

    def _closer(self, cosines_Bn: Tensor, _: Tensor | None) -> Tensor:
        return torch.cos(angles(cosines_Bn) / self.angle_factor)


def norms_of(batch: GlobalBatch) -> Tensor:
    """|x| [B] as scale. The target is a product divided by it, so it is never quite 0."""
    return batch.norms().clamp(min=EPSILON)


def falling_cosine(target_B: Tensor, factor: int) -> Tensor:
    """psi = (-1)^k cos(factor theta) - 2 k, k = floor(factor theta / pi): it falls with theta from 1 to 1 - 2 factor. The cosine of a
    multiple of theta is a polynomial in cos(theta) (Chebyshev's), whose slope is finite everywhere."""
    before_B, cosine_B = torch.ones_like(target_B), target_B
    for _ in range(factor - 1):
        before_B, cosine_B = cosine_B, 2 * target_B * cosine_B - before_B
    with torch.no_grad():
        k_B = (factor * torch.arccos(target_B.clamp(-1, 1)) / math.pi).floor().clamp(max=factor - 1)
        sign_B = 1 - 2 * k_B.remainder(2)
    return sign_B * cosine_B - 2 * k_B
