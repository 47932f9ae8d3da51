"""Losses that compare each sample with one sample of every identity of the batch, as a classifier does with prototypes. They do not train
prototypes: use them in addition to a sample-to-class loss, or for the features only."""

import torch
from torch import Tensor

from partial_fc.fields import Cosine, Margin, Scale, Weight
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, Needs, register, softplus
from partial_fc.statistics import SoftplusSum
from partial_fc.unit_rows import EPSILON

TITLE = "Samples in place of prototypes"


@register("sample_softmax")
class SampleSoftmax(Loss):
    """Softmax among samples: p_i is the cosine with another sample of the identity, n_ij that with one sample of every other identity. Li
    et al., "UniTSFace", NeurIPS 2023, eqs. 17 and 24: scale 64, margin 0.1. The paper compares with the last features of all classes,
    without gradient; this loss compares with the gathered batch, with gradient to both sides. Needs batches with several images per
    identity: anchors without a positive count as 0 in the mean over the batch."""

    formula = r"\mathrm{softplus}\left(a_i - s (p_i - m)\right)"
    use = "In addition to a sample-to-class loss, where a learned threshold is not wanted."
    scale: Scale = 64.0
    margin: Margin = 0.1

    def needs_positives(self) -> Needs:
        return "only"

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics, has_positive_B = batch.against_samples(scale=self.scale)
        loss_B = softplus(statistics.non_target_B - self.scale * (statistics.target_B - self.margin))
        return loss_B.where(has_positive_B, 0).mean()


@register("sample_bce")
class SampleBCE(Loss):
    """USS with a learned threshold b for each class in place of one for all. Li et al., "UniTSFace", NeurIPS 2023, eqs. 22 and 24: scale
    64, margin 0.1; worse than USS in the paper's tables. Compares with the gathered batch, as sample_softmax does. Anchors without a
    positive contribute only the second term. Costs 1 all-reduce of B numbers beside the statistics, and another in backward.

    threshold  first value of all learned thresholds, as a cosine; by default b = mean log-sum-exp of s n_j in the first batch, as in USS"""

    formula = r"\mathrm{softplus}\left(b_{y_i} - s (p_i - m)\right) + \sum_j\mathrm{softplus}\left(s n_{ij} - b_j\right)"
    use = "To repeat the comparison of the UniTSFace paper, in which it is worse than uss."
    scale: Scale = 64.0
    margin: Margin = 0.1
    threshold: Cosine | None = None

    def learned_by_class(self, num_classes: int) -> dict[str, float]:
        return {"thresholds": 0.0 if self.threshold is None else self.scale * self.threshold}

    def tracked(self) -> dict[str, float | Tensor]:
        return {} if self.threshold is not None else {"thresholds_is_started": 0.0}

    def needs_positives(self) -> Needs:
        return "partly"

    def __call__(self, batch: GlobalBatch) -> Tensor:
        if self.threshold is None:
            with torch.no_grad():
                batch.start("thresholds", batch.against_samples(scale=self.scale)[0].non_target_B)
        b_B = batch.of_labels(batch.parameter("thresholds"))
        statistics, has_positive_B = batch.against_samples(scale=self.scale, statistic=SoftplusSum(), label_bias_B=-b_B)
        positive_B = softplus(b_B - self.scale * (statistics.target_B - self.margin)).where(has_positive_B, 0)
        return (positive_B + statistics.non_target_B).mean()


@register("n_plus_1_tuplet")
class NPlus1Tuplet(Loss):
    """Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016, eqs. 6 and 7: one positive of the anchor,
    and one negative of every other identity. Anchors without a positive count as 0 in the mean. With cosines: sample_softmax with margin 0.

    scale        of cosines
    normalizes   False: products of the features as they are, without scale, as in the paper
    norm_weight  of mean |x|^2 / 2, which keeps unnormalised features short (section 3.2.2; the paper gives no number)"""

    formula = r"\log\left(1 + \sum_j e^{s (n_{ij} - p_i)}\right)"
    use = "Very many identities with few images each, whose prototypes would hardly be trained; or in a sum."
    scale: Scale = 64.0
    normalizes: bool = True
    norm_weight: Weight = 0.0

    def needs_positives(self) -> Needs:
        return "only"

    def __call__(self, batch: GlobalBatch) -> Tensor:
        if self.normalizes:
            statistics, has_positive_B = batch.against_samples(scale=self.scale)
            positive_B = self.scale * statistics.target_B
        else:
            statistics, has_positive_B = batch.against_samples(scale=batch.norms().clamp(min=EPSILON), normalize=False)
            positive_B = statistics.norms_B * statistics.target_B
        loss = softplus(statistics.non_target_B - positive_B).where(has_positive_B, 0).mean()
        return loss if self.norm_weight == 0 else loss + self.norm_weight / 2 * statistics.norms_B.square().mean()
