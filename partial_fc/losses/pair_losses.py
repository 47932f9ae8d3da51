"""Losses on the cosines of all pairs of the batch: they pull an identity together and push identities apart. A sample without a positive
contributes nothing where a positive is needed, so batches need several images per identity."""

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor

from partial_fc.fields import Margin, Scale, Weight, Within
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, Needs, register, softplus
from partial_fc.losses.margins import CosFace, check_margin, with_margin
from partial_fc.pairs import later_rows, negative_quantiles

TITLE = "Pairs of samples"


def distances(cosines: Tensor) -> Tensor:
    """Euclidean distances of unit features. Distances below 3e-4, which float32 cannot tell from 0, have no gradient."""
    return (2 - 2 * cosines).clamp(min=1e-7).sqrt()


def mean_of(sums_B: Tensor, counts_B: Tensor) -> Tensor:
    """The mean, 0 of nothing."""
    return sums_B.sum() / counts_B.sum().clamp(min=1)


def means_of_pairs(batch: GlobalBatch, costs: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(mean cost of positive pairs, of negative pairs); `costs` gives both for a block of cosines [n, B]."""

    def sums(cosines_nB: Tensor, is_positive_nB: Tensor, is_negative_nB: Tensor) -> tuple[Tensor, ...]:
        positive_nB, negative_nB = costs(cosines_nB)
        columns = (positive_nB.where(is_positive_nB, 0), is_positive_nB, negative_nB.where(is_negative_nB, 0), is_negative_nB)
        return tuple(x_nB.sum(dim=1).to(cosines_nB.dtype) for x_nB in columns)

    positive_B, positives_B, negative_B, negatives_B = batch.pairs(sums)
    return mean_of(positive_B, positives_B), mean_of(negative_B, negatives_B)


@register("contrastive")
class Contrastive(Loss):
    """Hadsell et al., CVPR 2006, eq. 4, with positive_margin 0 and a sum over given pairs. Here P and N are all positive and negative pairs
    of the batch, each with its own mean because there are far more negative ones. D is the Euclidean distance of unit features, in [0, 2].

    negative_margin  ours: 1, a cosine of 0.5. Two random features have a distance of 1.41"""

    formula = (
        r"\frac{1}{2|P|}\sum_{(i,k)\in P}\max\left(0, D_{ik} - m_p\right)^2 + \frac{1}{2|N|}\sum_{(i,k)\in N}\max\left(0, m_n - "
        r"D_{ik}\right)^2,\qquad m_p, m_n = \text{positive and negative margin}"
    )
    use = "A baseline, or in a sum."
    positive_margin: Annotated[float, Within(0.0, 2.0, "it is a distance of unit features")] = 0.0  # of positive pairs that are left alone
    negative_margin: Annotated[float, Within(0.0, 2.0, "it is a distance of unit features")] = 1.0

    def needs_positives(self) -> Needs:
        return "partly"

    def __call__(self, batch: GlobalBatch) -> Tensor:
        def costs(cosines_nB: Tensor) -> tuple[Tensor, Tensor]:
            distance_nB = distances(cosines_nB)
            far_nB, near_nB = torch.relu(distance_nB - self.positive_margin), torch.relu(self.negative_margin - distance_nB)
            return far_nB.square(), near_nB.square()

        positive, negative = means_of_pairs(batch, costs)
        return (positive + negative) / 2


@register("triplet")
class Triplet(Loss):
    """The farthest positive and the nearest negative of each anchor in the global batch ("batch hard": Hermans et al., "In Defense of the
    Triplet Loss", 2017, eq. 5), averaged over anchors that have both.

    distance  "squared": |x - z|^2 of unit features (Schroff et al., CVPR 2015, eq. 2), margin 0.2; "euclidean": |x - z|, better in
              Hermans"""

    formula = r"\max\left(0, m + \max_{k: y_k = y_i, k\ne i} D_{ik} - \min_{k: y_k\ne y_i} D_{ik}\right)"
    use = "Fine-tuning with large batches; or in a sum."
    margin: Annotated[float, Within(0.0, 4.0, "squared distances of unit features differ by at most 4")] = 0.2
    distance: Literal["squared", "euclidean"] = "squared"

    def needs_positives(self) -> Needs:
        return "only"

    def __call__(self, batch: GlobalBatch) -> Tensor:
        positive_B, negative_B = batch.pairs()
        has_both_B = (positive_B < 1.5) & (negative_B > -1.5)  # 2 and -2 stand for none
        is_squared = self.distance == "squared"
        difference_B = 2 * (negative_B - positive_B) if is_squared else distances(positive_B) - distances(negative_B)
        return mean_of(torch.relu(self.margin + difference_B).where(has_both_B, 0), has_both_B)


@register("unpg")
class UNPG(Loss):
    """CosFace or ArcFace with the batch's negative pairs in every denominator. Jung et al., "Unified Negative Pair Generation toward
    Well-discriminative Feature Space for Face Recognition", BMVC 2022: scale 64, margin 0.5 for both bases.

    whisker  leaves out pairs whose cosine lies outside [Q1 - whisker IQR, Q3 + whisker IQR] of all negative pairs; inf keeps all

    Pairs come from the global batch; the authors' code takes those of one GPU and notes that the gathered batch did worse. Costs
    `negative_quantiles` and one `pair_statistics` beside the base. Gradient flows through the pairs, not through the quartiles."""

    formula = (
        r"\mathrm{softplus}\left(\log\left(e^{a_i} + \sum_{q\in Q} e^{s q}\right) - s \varphi(t_i)\right),\qquad \varphi(t_i) = t_i - "
        r"m\text{ or } \cos(\theta_i + m),\qquad Q = \text{cosines of the negative pairs of the batch that are kept}"
    )
    use = "Batches large enough to hold hard pairs; adds pairs of samples to the negatives of CosFace or ArcFace."
    scale: Scale = 64.0
    margin: float = 0.5
    base: Literal["cosface", "arcface"] = "cosface"  # whose target
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
        """log sum_q e^{s q}; a number whose exponential is 0 if there are no pairs."""
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
    """A reconstruction of AnchorFace (AAAI 2022), which trains for TAR at one FAR; we know only its hyper-parameters. P and N are the
    positive and negative pairs of the batch. The threshold T has no gradient.

    scale, margin  of CosFace
    far            anchor FAR; a batch has about B^2 / 2 negative pairs to find its threshold from. Ours: 1e-3
    tau            width of the step, in cosines; 0.01 in the paper
    far_weight     1000 in the paper, with which the term starts near 1000 far; 10 was much better on the small set of docs/experiments.md
    tar_weight     ours

    The threshold comes from the batch; in the paper it comes from an online set of 5 features per identity, used for 1000 steps. Costs
    `negative_quantiles` and one `pair_statistics` beside CosFace."""

    formula = (
        r"\mathrm{softplus}\left(a_i - s (t_i - m)\right) + \frac{\lambda_1}{|N|}\sum_{q\in N}\sigma\left(\frac{q - T}{\tau}\right) + "
        r"\lambda_2\left(1 - \frac{1}{|P|}\sum_{p\in P}\sigma\left(\frac{p - T}{\tau}\right)\right),\qquad \lambda_1 = \text{far "
        r"weight},\quad \lambda_2 = \text{tar weight},\quad T = \text{the threshold that a share far of } N \text{ exceeds}"
    )
    use = "To train for one FAR."
    scale: Scale = 64.0
    margin: Margin = 0.4
    far: Annotated[float, Within(0.0, 1.0, "it is a share of the negative pairs")] = 1e-3
    tau: Annotated[float, Within(1e-4, 2.0, "it is a difference of cosines")] = 0.01
    far_weight: Weight = 1000.0
    tar_weight: Weight = 1.0

    def needs_positives(self) -> Needs:
        return "partly"

    def __call__(self, batch: GlobalBatch) -> Tensor:
        (threshold,) = negative_quantiles(batch.features_BD, batch.labels_B, (1 - self.far,), group=batch.group)

        def costs(cosines_nB: Tensor) -> tuple[Tensor, Tensor]:
            above_nB = torch.sigmoid((cosines_nB - threshold) / self.tau)
            return 1 - above_nB, above_nB

        rejected, accepted = means_of_pairs(batch, costs)
        return CosFace(self.scale, self.margin)(batch) + self.tar_weight * rejected + self.far_weight * accepted
