"""Margins that depend on the feature norm, or on how rare an identity is."""

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
    """Meng et al., CVPR 2021: scale 64, norms 10 to 110, margins 0.45 to 0.8 (radians), weight 35. The margin grows linearly with the norm,
    and the second term rewards large norms. The gradient flows through the norm.

    The norm learns to reflect image quality only if the backbone lets it: with a final batch norm of gain 1, as in IResNet, squared norms
    average to the width (norms of about 22.6 at width 512).

    easy  leaves targets below 0 without a margin, as in the authors' code; phi then jumps at 0"""

    formula = (
        r"\mathrm{softplus}\left(a_i - s\cos(\theta_i + m(\nu_i))\right) + \lambda\left(\frac{\nu_i}{u^2} + \frac{1}{\nu_i}\right),\qquad "
        r"\nu_i = \min(\max(|x_i|, l), u),\qquad m(\nu) = m_l + (m_u - m_l)\frac{\nu - l}{u - l},\qquad \lambda = \text{weight},\quad [l, "
        r"u] = \text{lower and upper norm},\quad [m_l, m_u] = \text{lower and upper margin}"
    )
    use = "Where the feature norm should tell how good an image is; needs a backbone whose norms lie in the given range."
    scale: Scale = 64.0
    lower_norm: Annotated[float, Within(1e-3, 1e6, "norms are positive")] = 10.0  # at and below which the margin is lower_margin
    upper_norm: float = 110.0  # at and above which it is upper_margin
    lower_margin: float = 0.45  # on the target's angle, in radians
    upper_margin: Angle = 0.8  # on the target's angle, in radians
    weight: Weight = 35.0  # of the second term
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
    """Kim et al., CVPR 2022: scale 64, margin 0.4, h = 0.333. z has no gradient. z = 0 gives CosFace; z = -1 (small norms, taken as bad
    images) gives ArcFace, whose gradient spares hard images; z = 1 gives a margin that stresses them. Norms are clipped to [0.001, 100];
    their mean and deviation run over steps. Past pi the cosine keeps falling (see `angular`), where the authors' code holds it at -1.

    concentration  h
    share          weight of the newest batch in the running mean and deviation, which start at 20 and 100 as in the authors' code"""

    formula = (
        r"\mathrm{softplus}\left(a_i - s (\cos(\theta_i - m z_i) - m (1 + z_i))\right),\qquad z_i = \mathrm{clip}\left(h \frac{|x_i| - "
        r"\mu}{\sigma + 0.001}, -1, 1\right),\qquad h = \text{concentration},\quad \mu, \sigma = \text{running mean and deviation of } |x|"
    )
    use = "Data with many low-quality images, such as surveillance; takes the feature norm as image quality."
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
    """LDAM, Cao et al., NeurIPS 2019: a larger margin for rarer identities, proportional to N_y^(-1/4); scale 30 and largest margin 0.5 as
    in the authors' code. Needs PartialFC's class_counts. Communicates 1 all-reduce of B numbers more than CosFace.

    margin         of identities with `rarest` images or fewer
    common_margin  the limit of the margin for identities with many images
    rarest         images of the rarest identity; a larger number keeps margins up where a few identities have very few images
    power          0 gives CosFace"""

    formula = (
        r"\mathrm{softplus}\left(a_i - s (t_i - m_{y_i})\right),\qquad m_y = c + (m - c)\left(\frac{r}{\max(N_y, r)}\right)^q,\qquad c = "
        r"\text{common margin},\quad r = \text{rarest},\quad q = \text{power},\quad N_y = \text{images of identity } y"
    )
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
