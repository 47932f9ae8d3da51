"""Margins that depend on the feature norm, or on how rare an identity is."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from partial_fc.fields import Angle, Margin, Scale, Weight, Within
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, register, softplus
from partial_fc.losses.margins import angular

TITLE = "Margins by feature norm or image count"

SMALLEST_NORM, LARGEST_NORM, EPSILON = 0.001, 100.0, 0.001  # of AdaFace's code


@register("magface")
class MagFace(Loss):
    """phi(t) = cos(arccos t + m(a)) with a = |x| clipped to [lower_norm, upper_norm] and m(a) linear in a, from lower_margin to
    upper_margin (radians); plus weight x mean of g(a) = a / upper_norm^2 + 1 / a, which rewards large norms. Meng et al., CVPR 2021:
    scale 64, norms 10 and 110, margins 0.45 and 0.8, weight 35. The gradient flows through a.

    The norm comes to tell the quality of an image if the backbone lets it: one that ends in a batch norm of gain 1, as IResNet does, has
    squared norms that average to the width (norms of about 22.6 at width 512).

    easy  leaves targets below 0 without a margin, as their code does; phi then jumps there
    """

    use = "Where the feature norm shall tell how good an image is; needs a backbone whose norms lie in the given range."
    scale: Scale = 64.0
    lower_norm: Annotated[float, Within(1e-3, 1e6, "norms are positive")] = 10.0
    upper_norm: float = 110.0
    lower_margin: float = 0.45
    upper_margin: Angle = 0.8
    weight: Weight = 35.0
    easy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lower_norm < self.upper_norm < math.inf:
            raise ValueError(f"upper_norm is {self.upper_norm}, but must be above lower_norm, which is {self.lower_norm}")
        Within(0.0, self.upper_margin, "the margin grows with the norm, up to upper_margin")("lower_margin", self.lower_margin)

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics = batch.against_classes(scale=self.scale)
        norms_B = statistics.norms_B.clamp(self.lower_norm, self.upper_norm)
        slope = (self.upper_margin - self.lower_margin) / (self.upper_norm - self.lower_norm)
        phi_B = angular(statistics.target_B, 1.0, self.lower_margin + slope * (norms_B - self.lower_norm))
        if self.easy:
            phi_B = phi_B.where(statistics.target_B > 0, statistics.target_B)
        reward_B = norms_B / self.upper_norm**2 + 1 / norms_B
        return (softplus(statistics.non_target_B - self.scale * phi_B) + self.weight * reward_B).mean()


@register("adaface")
class AdaFace(Loss):
    """phi(t) = cos(arccos t - margin z) - (margin + margin z), z = clip(h (|x| - mean) / deviation, -1, 1) without gradient. At
    z = 0 this is CosFace; at -1 (small norms, taken for bad images) ArcFace, whose gradient spares hard images; at 1 a margin that
    stresses them. Kim et al., CVPR 2022: scale 64, margin 0.4, h = 0.333. Norms are clipped to [0.001, 100]; their mean and deviation
    run over steps. Past pi the cosine keeps falling (see `angular`), where their code holds it at -1.

    concentration  h
    share          of the newest batch in the running mean and deviation, which start at 20 and 100 as in their code
    """

    use = "Data with many images of low quality, such as surveillance; reads the quality off the feature norm."
    scale: Scale = 64.0
    margin: Annotated[float, Within(0.0, 1.0, "the target gives up to twice this much")] = 0.4
    concentration: Annotated[float, Within(0.0, 1e3, "it multiplies the normalised norm")] = 0.333
    share: Annotated[float, Within(0.0, 1.0, "it is the share of the newest batch in running figures")] = 0.01

    def tracked(self) -> dict[str, float | Tensor]:
        return {"norm_mean": 20.0, "norm_deviation": 100.0}

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics = batch.against_classes(scale=self.scale)
        z_B = self._quality(batch, statistics.norms_B.detach().clamp(SMALLEST_NORM, LARGEST_NORM))
        phi_B = angular(statistics.target_B, 1.0, -self.margin * z_B) - self.margin * (1 + z_B)
        return softplus(statistics.non_target_B - self.scale * phi_B).mean()

    def _quality(self, batch: GlobalBatch, norms_B: Tensor) -> Tensor:
        variance = (norms_B - norms_B.mean()).square().sum() / max(1, len(norms_B) - 1)  # 0 for one sample, where std would be NaN
        mean = batch.track("norm_mean", norms_B.mean(), self.share)
        deviation = batch.track("norm_deviation", variance.sqrt(), self.share)
        return (self.concentration * (norms_B - mean) / (deviation + EPSILON)).clamp(-1, 1)


@register("frequency_margin")
class FrequencyMargin(Loss):
    """phi(t) = t - m_y with a larger margin for rarer identities: m_y = margin (rarest / n_y)^power, at most margin, for an identity of n_y
    images. This is LDAM, Cao et al., NeurIPS 2019: m_y proportional to n_y^(-1/4), and their code's scale 30 and largest margin
    0.5. Needs PartialFC's class_counts. Communicates 1 all-reduce of B numbers more than CosFace.

    margin         of identities with `rarest` images or fewer
    common_margin  what the margin falls to as images grow in number: m_y = common_margin + (margin - common_margin) (rarest / n_y)^power
    rarest         images of the rarest identity; where a few have very few, a larger number keeps the others' margins up
    power          0 gives CosFace
    """

    use = "Sets in which a few identities have most of the images."
    scale: Scale = 30.0
    margin: Margin = 0.5
    common_margin: float = 0.0
    rarest: Annotated[int, Within(1, 1e9, "it is a number of images")] = 1
    power: Annotated[float, Within(0.0, 4.0, "the margin falls with the number of images to this power")] = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        Within(0.0, self.margin, "rare identities have the larger margin")("common_margin", self.common_margin)

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics = batch.against_classes(scale=self.scale)
        counts_B = batch.class_counts().to(statistics.target_B.dtype).clamp(min=self.rarest)
        margins_B = self.common_margin + (self.margin - self.common_margin) * torch.pow(self.rarest / counts_B, self.power)
        return softplus(statistics.non_target_B - self.scale * (statistics.target_B - margins_B)).mean()
