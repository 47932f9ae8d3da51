"""Losses that give hard non-targets, or the whole probability, another weight."""

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from partial_fc.fields import Angle, Scale, Within
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, register, softplus
from partial_fc.losses.margins import angular, check_margin, with_margin
from partial_fc.maps import Map

TITLE = "Reweighted non-targets and probabilities"
Hardness = Annotated[float, Within(0.0, 10.0, "it is added to hard cosines")]


@register("sv_softmax")
class SVSoftmax(Loss):
    """Wang et al., "Support Vector Guided Softmax Loss", arXiv 1812.11317: scale 32, hardness 0.2. Non-targets nearer than the target count
    more: exp(s n_j) is multiplied by exp(s hardness (n_j + 1)).

    margin    on the target's similarity only; above 0 this is the SV-X-Softmax of the paper (0.35)
    hardness  t - 1 in the paper; 0 gives softmax with that margin
    emphasis  "adaptive" as in the formula, or "fixed": n_j + hardness
    target    what the margin does: "cosine" t - margin, "arc" cos(arccos t + margin)"""

    formula = (
        r"\mathrm{softplus}\left(\log\sum_j e^{s h_i(n_{ij})} - s (t_i - m)\right),\qquad h_i(n) = (1+\tau) n + \tau\text{ if } n > "
        r"t_i\text{, else } n,\qquad \tau = \text{hardness}"
    )
    use = "To stress negatives that are nearer than the target; prefer mv_softmax with a margin."
    scale: Scale = 32.0
    margin: float = 0.0
    hardness: Hardness = 0.2
    emphasis: Literal["adaptive", "fixed"] = "adaptive"
    target: Literal["cosine", "arc"] = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_margin(self.margin, self.target)

    def __call__(self, batch: GlobalBatch) -> Tensor:
        emphasised = emphasis_on_hard(self.hardness, self.emphasis, batch.targets())
        statistics = batch.against_classes(scale=self.scale, map=emphasised)
        return softplus(statistics.non_target_B - self.scale * with_margin(statistics.target_B, self.margin, self.target)).mean()


@register("mv_softmax")
class MVSoftmax(Loss):
    """Wang et al., "Mis-classified Vector Guided Softmax Loss", AAAI 2020: scale 32, margin 0.35, hardness 0.2 (0.12 in FaceX-Zoo).
    Non-targets nearer than the target with its margin, phi(t), count more.

    hardness  t - 1 in the paper, t in its code; 0 gives CosFace, or ArcFace
    emphasis  "adaptive" as in the formula, or "fixed": n_j + hardness
    target    phi: "cosine" t - margin, "arc" cos(arccos t + margin)
    easy      applies the margin to targets only where t > 0, in the comparison always: the code's default, not in the paper"""

    formula = (
        r"\mathrm{softplus}\left(\log\sum_j e^{s h_i(n_{ij})} - s (t_i - m)\right),\qquad h_i(n) = (1+\tau) n + \tau\text{ if } n > t_i - "
        r"m\text{, else } n,\qquad \tau = \text{hardness}"
    )
    use = "Large clean sets, late in training: misclassified negatives count more. Noisy labels count more too."
    scale: Scale = 32.0
    margin: float = 0.35
    hardness: Hardness = 0.2
    emphasis: Literal["adaptive", "fixed"] = "adaptive"
    target: Literal["cosine", "arc"] = "cosine"
    easy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_margin(self.margin, self.target)

    def __call__(self, batch: GlobalBatch) -> Tensor:
        emphasised = emphasis_on_hard(self.hardness, self.emphasis, with_margin(batch.targets(), self.margin, self.target))
        statistics = batch.against_classes(scale=self.scale, map=emphasised)
        phi_B = with_margin(statistics.target_B, self.margin, self.target)
        if self.easy:
            phi_B = torch.where(statistics.target_B > 0, phi_B, statistics.target_B)
        return softplus(statistics.non_target_B - self.scale * phi_B).mean()


def emphasis_on_hard(hardness: float, emphasis: str, limit_B: Tensor) -> Map:
    """n -> (1 + hardness) n + hardness, or n + hardness, where n is above the row's limit. The largest value is at n = 1."""
    factor = 1 + hardness if emphasis == "adaptive" else 1.0

    def function(cosines_Bn: Tensor, limit_B1: Tensor | None) -> Tensor:
        assert limit_B1 is not None
        return torch.where(cosines_Bn > limit_B1, factor * cosines_Bn + hardness, cosines_Bn)

    def in_place(cosines_Bn: Tensor, limit_B1: Tensor, slope_Bn: Tensor, spare_Bn: Tensor) -> None:
        is_hard_Bn = torch.gt(cosines_Bn, limit_B1, out=slope_Bn)  # 1 or 0
        cosines_Bn += torch.mul(cosines_Bn, factor - 1, out=spare_Bn).add_(hardness).mul_(is_hard_Bn)
        slope_Bn.mul_(factor - 1).add_(1)

    return Map(function, bound=factor + hardness, in_place=in_place, parameter_B=limit_B)


@register("curricularface")
class CurricularFace(Loss):
    """Huang et al., CVPR 2020: scale 64, margin 0.5 in radians. Hard non-targets count little at first, and more as the mean target grows.

    share  of each batch in the running mean of target cosines, which starts at 0: 0.01 in the authors' code, 0.1 in TFace's port"""

    formula = (
        r"\mathrm{softplus}\left(\log\sum_j e^{s h_i(n_{ij})} - s\cos(\theta_i + m)\right),\qquad h_i(n) = n (\mu + n)\text{ if } n > "
        r"\cos(\theta_i + m)\text{, else } n,\qquad \mu = \text{running mean of } t_i"
    )
    use = "Like mv_softmax, but easy samples come first: one loss for the whole run."
    scale: Scale = 64.0
    margin: Angle = 0.5
    share: Annotated[float, Within(0.0, 1.0, "it is the part of a batch in a running mean")] = 0.01

    def tracked(self) -> dict[str, float | Tensor]:
        return {"mean_target": 0.0}

    def __call__(self, batch: GlobalBatch) -> Tensor:
        target_B = batch.targets()
        mean = batch.track("mean_target", target_B.mean(), self.share)
        # As in the authors' code this limit rises again past pi - margin; phi of the target does not.
        limit_B = torch.cos(torch.arccos(target_B.clamp(-1, 1)) + self.margin)
        statistics = batch.against_classes(scale=self.scale, map=curriculum(mean, limit_B))
        return softplus(statistics.non_target_B - self.scale * angular(statistics.target_B, 1.0, self.margin)).mean()


def curriculum(mean: Tensor, limit_B: Tensor) -> Map:
    """n -> n (mean + n) where n is above the row's limit; mean is a scalar of at most 1, without gradient."""

    def function(cosines_Bn: Tensor, limit_B1: Tensor | None) -> Tensor:
        assert limit_B1 is not None
        return torch.where(cosines_Bn > limit_B1, cosines_Bn * (mean.to(cosines_Bn.dtype) + cosines_Bn), cosines_Bn)

    def in_place(cosines_Bn: Tensor, limit_B1: Tensor, slope_Bn: Tensor, spare_Bn: Tensor) -> None:
        is_hard_Bn = torch.gt(cosines_Bn, limit_B1, out=slope_Bn)  # 1 or 0
        factor_Bn = torch.add(cosines_Bn, mean.to(cosines_Bn.dtype) - 1, out=spare_Bn).mul_(is_hard_Bn).add_(1)  # mean + n, or 1
        slope_Bn.mul_(cosines_Bn).add_(factor_Bn)
        cosines_Bn *= factor_Bn

    return Map(function, bound=2.0, in_place=in_place, parameter_B=limit_B)


@register("search_softmax")
class SearchSoftmax(Loss):
    """Wang et al., "Loss Function Search for Face Recognition", ICML 2020: scale 32. q is the softmax probability of the target, and alpha
    <= 0. The search itself is not included: it draws an alpha for each model of a population and keeps the best on a validation set.

    modulation  alpha. One number acts as the margin log(1 - alpha) / scale of CosFace: 0.28 by default, about what the authors' code draws,
                -0.2 e^(scale/3). Several numbers apply to equal parts of (0, 1], q's range, smallest first (their local mode: 10)"""

    formula = r"-\log\frac{q_i}{\alpha q_i + 1 - \alpha},\qquad q_i = \frac{1}{1 + e^{a_i - s t_i}},\qquad \alpha = \text{modulation}"
    use = "To find a margin-like factor by search; with one factor it is CosFace."
    scale: Scale = 32.0
    modulation: float | tuple[float, ...] = -8000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._parts:
            raise ValueError("modulation is empty, but must be a number, or one for each part of (0, 1]")
        for a in self._parts:
            if not -math.inf < a <= 0:
                raise ValueError(f"modulation is {a}, but must be negative, or 0 for plain softmax")

    @property
    def _parts(self) -> tuple[float, ...]:
        return self.modulation if isinstance(self.modulation, tuple) else (self.modulation,)

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics = batch.against_classes(scale=self.scale)
        loss_B = softplus(statistics.non_target_B - self.scale * statistics.target_B)
        probability_B, parts = torch.exp(-loss_B.detach()), self._parts
        a_B = torch.full_like(loss_B, parts[-1])
        for part in range(len(parts) - 2, -1, -1):
            a_B = torch.where(probability_B <= (part + 1) / len(parts), parts[part], a_B)
        return modulated(loss_B, a_B).mean()


def modulated(loss_B: Tensor, a: float | Tensor) -> Tensor:
    """-log p_m [B], p_m = p / (a p + 1 - a), from loss_B = -log p >= 0; a <= 0 is a number or [B], with gradient if it has one. a = 1 -
    exp(s (t - phi)) gives a target t the margin of phi."""
    return loss_B + torch.log1p(a * torch.expm1(-loss_B))  # 1 - p keeps its digits where p is nearly 1
