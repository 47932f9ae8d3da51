"""Plain softmax and the SphereFace family: the feature norm as scale, and margins that multiply the target's angle."""

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
    """Cross-entropy of <x, w_j> without normalisation or bias, the baseline of margin losses. The norm of a prototype then says how often
    its identity is predicted, which does not help for identities outside the training set."""

    formula = r"\mathrm{softplus}\left(\log\sum_{j\ne y_i} e^{\langle x_i, w_j\rangle} - \langle x_i, w_{y_i}\rangle\right)"
    use = "A baseline; its prototypes depend on how often an identity was seen."

    def __call__(self, batch: GlobalBatch) -> Tensor:
        norms_B = norms_of(batch)
        statistics = batch.against_classes(scale=norms_B, normalize=False)
        return softplus(statistics.non_target_B - norms_B * statistics.target_B).mean()  # that target is <x, w_y> / |x|


@register("normalized_softmax")
class NormalizedSoftmax(Loss):
    """Cross-entropy with normalised prototypes and unnormalised features: "modified softmax" in Liu et al., CVPR 2017."""

    formula = r"\mathrm{softplus}\left(a_i - s_i t_i\right),\qquad s_i = |x_i|"
    use = "A baseline without margin, and what SphereFace becomes for m = 1."

    def __call__(self, batch: GlobalBatch) -> Tensor:
        norms_B = norms_of(batch)
        statistics = batch.against_classes(scale=norms_B)
        return softplus(statistics.non_target_B - norms_B * statistics.target_B).mean()


@register("sphereface")
class SphereFace(Loss):
    """A-Softmax, Liu et al., CVPR 2017: m = 4. Lambda phases the margin in slowly, as in the authors' code (max(5, 1000 / (1 + 0.12
    step))); least_lambda = first_lambda = 0 gives the formula of the paper.

    angle_factor  m, a whole number; 1 gives "normalized_softmax"
    slope         "exact": the derivative; "straight_through": 1 per unit of the target's cosine, as in opensphere. The authors' Caffe code
                  does a third thing that is not implemented here: it normalises the direction of the target's gradient by feature"""

    formula = (
        r"\mathrm{softplus}\left(a_i - s_i \frac{\lambda t_i + \psi(\theta_i)}{1+\lambda}\right),\qquad s_i = |x_i|,\qquad \psi(\theta) = "
        r"(-1)^k\cos(m\theta) - 2k,\quad k = \lfloor m\theta/\pi\rfloor,\qquad m = \text{angle factor},\quad \lambda = "
        r"\max\left(\text{least lambda}, \text{first lambda}\cdot(1 + \text{decay}\cdot\text{step})^{-\text{power}}\right)"
    )
    use = "To compare with its publications; sensitive to the annealing, and to feature norms."
    angle_factor: Annotated[int, Within(1, 8, "it multiplies the angle")] = 4
    first_lambda: Lambda = 1000.0  # lambda at step 0
    lambda_decay: Lambda = 0.12  # growth of 1 / lambda by step
    lambda_power: Lambda = 1.0  # of that growth
    least_lambda: Lambda = 5.0  # below which lambda does not fall
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
    """Liu et al., "SphereFace Revived", TPAMI 2022, with normalised features ("hard feature normalisation"): scale 30, m = 1.5. The
    authors' code also multiplies the loss by 50 / scale.

    version  "v1": the target is cos(min(m theta_y, pi)); "v2": non-targets are cos(theta_j / m)
    slope    "straight_through": 1, the paper's "characteristic gradient detachment"; "exact": the derivative, in v1 0 beyond pi / m"""

    formula = (
        r"\text{v1: } \mathrm{softplus}\left(a_i - s\cos(\min(m\theta_i, \pi))\right),\qquad \text{v2: } \mathrm{softplus}\left(\log\sum_j "
        r"e^{s\cos(\arccos(n_{ij})/m)} - s t_i\right),\qquad m = \text{angle factor}"
    )
    use = "A multiplicative margin that trains without annealing."
    scale: Scale = 30.0
    angle_factor: Annotated[float, Within(1.0, 8.0, "it multiplies the target's angle")] = 1.5  # m
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
    """|x| [B] as a scale. The target is a product divided by it, so it must never be 0."""
    return batch.norms().clamp(min=EPSILON)


def falling_cosine(target_B: Tensor, factor: int) -> Tensor:
    """psi = (-1)^k cos(factor theta) - 2 k, k = floor(factor theta / pi), which falls with theta from 1 to 1 - 2 factor. The cosine of a
    multiple of theta is computed as a Chebyshev polynomial in cos(theta), whose slope is finite everywhere."""
    before_B, cosine_B = torch.ones_like(target_B), target_B
    for _ in range(factor - 1):
        before_B, cosine_B = cosine_B, 2 * target_B * cosine_B - before_B
    with torch.no_grad():
        k_B = (factor * torch.arccos(target_B.clamp(-1, 1)) / math.pi).floor().clamp(max=factor - 1)
        sign_B = 1 - 2 * k_B.remainder(2)
    return sign_B * cosine_B - 2 * k_B
