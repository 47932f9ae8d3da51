"""Losses with one learned threshold, which judge every similarity by itself."""

import math
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor

from partial_fc.fields import Cosine, Margin, Scale, Steps, Weight, Within
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, Needs, register, softplus
from partial_fc.maps import Map, sloped
from partial_fc.statistics import SoftplusSum

TITLE = "Learned thresholds"


@register("uce")
class UCE(Loss):
    """Zhou et al., "UniFace: Unified Cross-Entropy Loss", ICCV 2023, eqs. 23, 31 and 32: scale 64, margin 0.4, weight 0.7 (UCE-mb) on
    WebFace. The threshold b = s threshold + log(C - 1) is learned.

    threshold  first value of the learned threshold, as a cosine; by default b = log(10 C), as in the authors' code
    weight     of the non-targets; with the classifier's sample_rate it is the r of eq. 32"""

    formula = r"\mathrm{softplus}(b - s (t_i - m)) + \lambda\sum_j\mathrm{softplus}(s n_{ij} - b),\qquad \lambda = \text{weight}"
    use = "Where one threshold for all identities is wanted, as in open-set verification at one operating point."
    scale: Scale = 64.0
    margin: Margin = 0.4
    threshold: Cosine | None = None
    weight: Weight = 1.0

    def learned(self, num_classes: int) -> dict[str, float]:
        if self.threshold is None:
            return {"threshold": math.log(10 * num_classes)}
        return {"threshold": self.scale * self.threshold + math.log(max(1, num_classes - 1))}

    def __call__(self, batch: GlobalBatch) -> Tensor:
        b = batch.parameter("threshold")
        statistics = batch.against_classes(scale=self.scale, statistic=SoftplusSum(b))
        return (softplus(b - self.scale * (statistics.target_B - self.margin)) + self.weight * statistics.non_target_B).mean()


@register("uss")
class USS(Loss):
    """UCE with samples in place of prototypes: p_i is the cosine with another sample of the identity, n_ij that with one sample of every
    other identity. Li et al., "UniTSFace", NeurIPS 2023, eqs. 11, 24: scale 64, margin 0.1. Anchors without a positive have no first term.

    threshold  first value of the learned threshold, as a cosine; by default b = mean log-sum-exp of s n_j in the first batch that has
               non-targets, as in the authors' code
    source     of the other samples. "batch": the gathered batch, with gradient to both sides; needs batches with several images per
               identity. "bank": the last features of all classes, without gradient, as in the paper; costs as much as CosFace
    start      with the bank: the first step with a loss; earlier steps only fill the bank (one epoch in the paper)
    staleness  with the bank: steps after which a feature no longer counts; by default it always counts, as in the paper"""

    formula = r"\mathrm{softplus}\left(b - s (p_i - m)\right) + \sum_j\mathrm{softplus}\left(s n_{ij} - b\right)"
    use = "In addition to a sample-to-class loss (see unitsface); alone it does not train prototypes."
    scale: Scale = 64.0
    margin: Margin = 0.1
    threshold: Cosine | None = None
    source: Literal["batch", "bank"] = "batch"
    start: Annotated[int, Within(0, math.inf, "it is a step")] = 0
    staleness: Steps | None = None

    def learned(self, num_classes: int) -> dict[str, float]:
        return {"threshold": 0.0 if self.threshold is None else self.scale * self.threshold}

    def tracked(self) -> dict[str, float | Tensor]:
        return {} if self.threshold is not None else {"threshold_is_started": 0.0}

    def uses_bank(self) -> bool:
        return self.source == "bank"

    def needs_positives(self) -> Needs:
        return "partly" if self.source == "batch" else "no"

    def __call__(self, batch: GlobalBatch) -> Tensor:
        ask = batch.against_samples
        if self.source == "bank":
            if batch.step < self.start:
                return 0 * batch.norms().sum()
            ask = partial(batch.against_bank, staleness=self.staleness)
        if self.threshold is None:
            with torch.no_grad():
                batch.start("threshold", ask(scale=self.scale)[0].non_target_B)
        b = batch.parameter("threshold")
        statistics, has_positive_B = ask(scale=self.scale, statistic=SoftplusSum(b))
        positive_B = softplus(b - self.scale * (statistics.target_B - self.margin)).where(has_positive_B, 0)
        return (positive_B + statistics.non_target_B).mean()


@register("sphereface2")
class SphereFace2(Loss):
    """Wen et al., "SphereFace2", ICLR 2022, type C (a margin on both sides), with one learned bias b. Constants of the authors' code
    (opensphere): scale 40, margin 0.4 (64 and 0.5 on MS1M), power 3.

    target_weight  lambda of eq. 5, alpha of the code: 0.7 (0.8 on MS1M)
    weight         lw of the code: 50 (10 on VGGFace2)
    slope          "exact", or "straight_through": 1 for g, as in the code"""

    formula = (
        r"\frac{w}{s}\left[\lambda \mathrm{softplus}\left(-s (g(t_i) - m) - b\right) + (1-\lambda)\sum_j\mathrm{softplus}\left(s "
        r"(g(n_{ij}) + m) + b\right)\right],\qquad g(z) = 2\left(\frac{z+1}{2}\right)^q - 1,\qquad w = \text{weight},\quad \lambda = "
        r"\text{target weight},\quad q = \text{power}"
    )
    use = "Noisy labels, or where each pair of sample and class should be judged by itself."
    scale: Scale = 40.0
    margin: Margin = 0.4
    power: Annotated[float, Within(1.0, 16.0, "1 leaves cosines as they are, 3 is usual")] = 3.0  # q of g
    target_weight: float = 0.7
    weight: Weight = 50.0
    slope: Literal["straight_through", "exact"] = "straight_through"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target_weight < 1:
            raise ValueError(f"target_weight is {self.target_weight}, but must lie between 0 and 1: non-targets have the rest")

    def learned(self, num_classes: int) -> dict[str, float]:
        """The b that minimises the loss of orthogonal features and prototypes."""
        ratio = self.target_weight / ((1 - self.target_weight) * max(1, num_classes - 1))
        middle = 2 * 0.5**self.power - 1
        target, others = self.scale * (middle - self.margin), self.scale * (middle + self.margin)
        # log(2 z) - log(1 - z + sqrt((1 - z)^2 + 4 z e^(target - others))) - others; rearranged for z > 1, where digits would cancel.
        gap = 4 * ratio * math.exp(target - others)
        root = math.sqrt((1 - ratio) ** 2 + gap)
        if ratio <= 1:
            return {"bias": math.log(2 * ratio) - others - math.log(1 - ratio + root)}
        return {"bias": math.log(ratio - 1 + root) - math.log(2) - target}

    def __call__(self, batch: GlobalBatch) -> Tensor:
        bias, shaped = batch.parameter("bias"), Map(self._shape, slope=self.slope)
        threshold = -(self.scale * self.margin + bias)
        statistics = batch.against_classes(scale=self.scale, statistic=SoftplusSum(threshold), map=shaped)
        target_B = sloped(self._shape(statistics.target_B), statistics.target_B, self.slope)
        of_targets_B = softplus(-self.scale * (target_B - self.margin) - bias)
        loss_B = self.target_weight * of_targets_B + (1 - self.target_weight) * statistics.non_target_B
        return self.weight / self.scale * loss_B.mean()

    def _shape(self, cosines: Tensor, _: Tensor | None = None) -> Tensor:
        return 2 * ((cosines + 1) / 2).clamp(min=0).pow(self.power) - 1
