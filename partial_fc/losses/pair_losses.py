"""Losses on the cosines of all pairs of the batch: pulled together within an identity, pushed apart between two. Those that need a positive
give nothing for a sample without one, so batches need several images of an identity."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from partial_fc.fields import Margin, Scale, Weight, Within
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, register, softplus
from partial_fc.losses.margins import CosFace, check_margin, with_margin
from partial_fc.pairs import later_rows, negative_quantiles

TITLE = "Pairs of samples"


def distances(cosines: Tensor) -> Tensor:
    """Euclidean distances of unit features. Those below 3e-4, which float32 cannot tell from 0, have no gradient."""
    return (2 - 2 * cosines).clamp(min=1e-7).sqrt()


def mean_of(sums_B: Tensor, counts_B: Tensor) -> Tensor:
    """0 of nothing."""
    return sums_B.sum() / counts_B.sum().clamp(min=1)


@register("contrastive")
class Contrastive(Loss):
    """mean over positive pairs of relu(D - positive_margin)^2 / 2 + mean over negative pairs of relu(negative_margin - D)^2 / 2, D the
    Euclidean distance of unit features, in [0, 2]. Hadsell et al., CVPR 2006, eq. 4, where positive_margin is 0 and the sum goes over
    given pairs; here over all pairs of the batch, and because there are far more negative ones each kind has its own mean.

    negative_margin  ours: 1, a cosine of 0.5. Two random features have a distance of 1.41
    """

    use = "A baseline, or in a sum."
    positive_margin: Annotated[float, Within(0.0, 2.0, "it is a distance of unit features")] = 0.0
    negative_margin: Annotated[float, Within(0.0, 2.0, "it is a distance of unit features")] = 1.0

    def __call__(self, batch: GlobalBatch) -> Tensor:
        def sums(cosines_nB: Tensor, is_positive_nB: Tensor, is_negative_nB: Tensor) -> tuple[Tensor, ...]:
            distance_nB = distances(cosines_nB)
            far_nB = torch.relu(distance_nB - self.positive_margin).square().where(is_positive_nB, 0)
            near_nB = torch.relu(self.negative_margin - distance_nB).square().where(is_negative_nB, 0)
            return tuple(x_nB.sum(dim=1).to(cosines_nB.dtype) for x_nB in (far_nB, is_positive_nB, near_nB, is_negative_nB))

        far_B, positives_B, near_B, negatives_B = batch.pairs(sums)
        return (mean_of(far_B, positives_B) + mean_of(near_B, negatives_B)) / 2


@register("triplet")
class Triplet(Loss):
    """relu(margin + D(hardest positive) - D(hardest negative)) with the farthest positive and the nearest negative of each anchor in the
    global batch (batch hard: Hermans et al., "In Defense of the Triplet Loss", 2017, eq. 5), the mean over anchors that have both.

    distance  "squared": D = |x - z|^2 of unit features as in FaceNet (Schroff et al., CVPR 2015, eq. 2), margin 0.2; "euclidean":
              D = |x - z|, which Hermans et al. found better
    """

    use = "Fine-tuning with large batches; or in a sum."
    margin: Annotated[float, Within(0.0, 4.0, "squared distances of unit features differ by at most 4")] = 0.2
    distance: Literal["squared", "euclidean"] = "squared"

    def __call__(self, batch: GlobalBatch) -> Tensor:
        positive_B, negative_B = batch.pairs()
        has_both_B = (positive_B < 1.5) & (negative_B > -1.5)  # 2 and -2 stand for none
        is_squared = self.distance == "squared"
        difference_B = 2 * (negative_B - positive_B) if is_squared else distances(positive_B) - distances(negative_B)
        return mean_of(torch.relu(self.margin + difference_B).where(has_both_B, 0), has_both_B)


@register("unpg")
class UNPG(Loss):
    """CosFace or ArcFace with the batch's negative pairs q in every sample's denominator, the same for all:
    -log e^{s phi(t)} / (e^{s phi(t)} + sum_j e^{s n_j} + sum_q e^{s q}). Jung et al., "Unified Negative Pair Generation toward
    Well-discriminative Feature Space for Face Recognition", BMVC 2022: scale 64, margin 0.5 in their configurations of both bases.

    whisker  pairs whose cosine lies outside [Q1 - whisker IQR, Q3 + whisker IQR] of all negative pairs are left out; inf keeps all

    Pairs are those of the global batch; their code takes those of one GPU, and notes that the gathered batch did worse. Costs, beside the
    base, `negative_quantiles` and one `pair_statistics`. Gradient flows through the pairs, not through the quartiles.
    """

    use = "Batches large enough to hold hard pairs; adds pairs of samples to the negatives of CosFace or ArcFace."
    scale: Scale = 64.0
    margin: float = 0.5
    base: Literal["cosface", "arcface"] = "cosface"
    whisker: Annotated[float, Within(0.0, math.inf, "it counts interquartile ranges")] = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_margin(self.margin, self.base)

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics = batch.against_classes(scale=self.scale)
        phi_B = with_margin(statistics.target_B, self.margin, self.base)
        others_B = torch.logaddexp(statistics.non_target_B, self._pairs(batch))
        return softplus(others_B - self.scale * phi_B).mean()

    def _pairs(self, batch: GlobalBatch) -> Tensor:
        """log sum_q e^{s q}; of no pairs a number whose exponential is 0."""
        nothing = -4 * self.scale - 1e4
        quartiles = None
        if self.whisker < math.inf:
            quartiles = negative_quantiles(batch.features_BD, batch.labels_B, (0.25, 0.75), group=batch.group)

        def log_sums(cosines_nB: Tensor, is_positive_nB: Tensor, is_negative_nB: Tensor) -> tuple[Tensor]:
            is_kept_nB = is_negative_nB & later_rows(is_positive_nB, is_negative_nB)
            if quartiles is not None:
                reach = self.whisker * (quartiles[1] - quartiles[0])
                is_kept_nB &= (cosines_nB >= quartiles[0] - reach) & (cosines_nB <= quartiles[1] + reach)
            return (torch.logsumexp((self.scale * cosines_nB).masked_fill(~is_kept_nB, nothing), dim=1),)

        return torch.logsumexp(batch.pairs(log_sums)[0], dim=0)


@register("anchorface")
class AnchorFace(Loss):
    """A reconstruction of AnchorFace (AAAI 2022), which trains for TAR at one FAR: only its hyper-parameters are known to us.
    CosFace + far_weight mean over negative pairs of sigmoid((q - t) / tau) + tar_weight (1 - mean over positive pairs of the same), with
    the threshold t, without gradient, that the share `far` of the batch's negative pairs exceeds.

    scale, margin  of CosFace
    far            anchor FAR; a batch has about B^2 / 2 negative pairs to find its threshold from. Ours: 1e-3
    tau            width of the step, in cosines; theirs 0.01
    far_weight     theirs 1000, at which the term starts near 1000 far; 10 was better by far on the small set of docs/losses.md
    tar_weight     ours

    The threshold is the batch's own; theirs comes from an online set of 5 features per identity, used for 1000 steps. Costs, beside
    CosFace, `negative_quantiles` and one `pair_statistics`.
    """

    use = "To train for one FAR."
    scale: Scale = 64.0
    margin: Margin = 0.4
    far: Annotated[float, Within(0.0, 1.0, "it is a share of the negative pairs")] = 1e-3
    tau: Annotated[float, Within(1e-4, 2.0, "it is a difference of cosines")] = 0.01
    far_weight: Weight = 1000.0
    tar_weight: Weight = 1.0

    def __call__(self, batch: GlobalBatch) -> Tensor:
        (threshold,) = negative_quantiles(batch.features_BD, batch.labels_B, (1 - self.far,), group=batch.group)

        def sums(cosines_nB: Tensor, is_positive_nB: Tensor, is_negative_nB: Tensor) -> tuple[Tensor, ...]:
            above_nB = torch.sigmoid((cosines_nB - threshold) / self.tau)
            rejected_nB, accepted_nB = (1 - above_nB).where(is_positive_nB, 0), above_nB.where(is_negative_nB, 0)
            return tuple(x_nB.sum(dim=1).to(cosines_nB.dtype) for x_nB in (rejected_nB, is_positive_nB, accepted_nB, is_negative_nB))

        rejected_B, positives_B, accepted_B, negatives_B = batch.pairs(sums)
        loss = CosFace(self.scale, self.margin)(batch) + self.tar_weight * mean_of(rejected_B, positives_B)
        return loss + self.far_weight * mean_of(accepted_B, negatives_B)
