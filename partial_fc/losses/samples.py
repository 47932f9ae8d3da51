"""Losses that compare each sample with one sample of every identity of the batch, as a classifier does with prototypes. They leave the
prototypes alone: train them beside a sample-to-class loss, or for their features only."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.fields import Cosine, Margin, Scale, Weight
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, register, softplus
from partial_fc.statistics import SoftplusSum
from partial_fc.unit_rows import EPSILON

TITLE = "Samples in place of prototypes"


@register("sample_softmax")
class SampleSoftmax(Loss):
    """-log e^{s (p - margin)} / (e^{s (p - margin)} + sum_j e^{s n_j}): softmax among samples, p the cosine with another sample of the
    identity and n_j with one sample of every other identity. Li et al., "UniTSFace", NeurIPS 2023, eqs. 17 and 24: scale 64, margin 0.1.

    Theirs compares with the last features of all classes, without gradient; here with the gathered batch, with gradient to both sides.
    Needs batches with several images of an identity: anchors without a positive count as 0 in the mean over the batch.
    """

    use = "Beside a sample-to-class loss, where a learned threshold is not wanted."
    scale: Scale = 64.0
    margin: Margin = 0.1

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics, has_positive_B = batch.against_samples(scale=self.scale)
        loss_B = softplus(statistics.non_target_B - self.scale * (statistics.target_B - self.margin))
        return loss_B.where(has_positive_B, 0).mean()


@register("sample_bce")
class SampleBCE(Loss):
    """softplus(b_y - s (p - margin)) + sum_j softplus(s n_j - b_j): USS with a learned threshold b for each class in place of one for all.
    Li et al., "UniTSFace", NeurIPS 2023, eqs. 22 and 24: scale 64, margin 0.1 with which it is worse than USS in their tables.

    Compares with the gathered batch, as sample_softmax does. Anchors without a positive have their second term alone. Costs 1 all-reduce
    of B numbers beside the statistics; backward another.

    threshold  first value of all the learned ones, as a cosine; by default b = mean log-sum-exp of s n_j in the first batch, as in USS
    """

    use = "To repeat the comparison of the UniTSFace paper, in which it is worse than uss."
    scale: Scale = 64.0
    margin: Margin = 0.1
    threshold: Cosine | None = None

    def learned_by_class(self, num_classes: int) -> dict[str, float]:
        return {"thresholds": 0.0 if self.threshold is None else self.scale * self.threshold}

    def tracked(self) -> dict[str, float | Tensor]:
        return {} if self.threshold is not None else {"thresholds_is_started": 0.0}

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
    """log(1 + sum_j exp(x.n_j - x.p)): one positive p of the anchor x, and one negative of every other identity. Sohn, "Improved Deep
    Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016, eqs. 6 and 7. Anchors without a positive count as 0 in the mean
    over the batch. With cosines this is sample_softmax without its margin.

    scale       of cosines
    normalizes  False: products of features as they are, without scale, as in the paper
    norm_weight lambda of norm_weight mean |x|^2 / 2, which keeps such features short (section 3.2.2; there is no number in the paper)
    """

    use = "Few images of very many identities, where prototypes would be hardly trained; or in a sum."
    scale: Scale = 64.0
    normalizes: bool = True
    norm_weight: Weight = 0.0

    def __call__(self, batch: GlobalBatch) -> Tensor:
        if self.normalizes:
            statistics, has_positive_B = batch.against_samples(scale=self.scale)
            positive_B = self.scale * statistics.target_B
        else:
            statistics, has_positive_B = batch.against_samples(scale=batch.norms().clamp(min=EPSILON), normalize=False)
            positive_B = statistics.norms_B * statistics.target_B
        loss = softplus(statistics.non_target_B - positive_B).where(has_positive_B, 0).mean()
        return loss if self.norm_weight == 0 else loss + self.norm_weight / 2 * statistics.norms_B.square().mean()
