"""Losses that draw the images of an identity together: towards its prototype, towards each other, or the farthest of them first."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from partial_fc.fields import Margin, Scale, Weight, Within
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, register, softplus
from partial_fc.losses.margins import CosFace
from partial_fc.losses.pair_losses import mean_of
from partial_fc.pairs import later_rows, pair_statistics
from partial_fc.positives import positives_of
from partial_fc.unit_rows import unit_rows

TITLE = "Compact identities"


@register("center")
class Center(Loss):
    """CosFace + center_weight mean |x_i - w_{y_i}|^2 / 2 of unit vectors, which is center_weight mean (1 - t). Wen et al., "A
    Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016, eq. 5: there softmax on features of any norm stands in
    place of CosFace, and the centres are running means of features beside the prototypes, moved a share of 0.5 per step. Here the centre
    of an identity is the direction of its prototype, which a classifier on the sphere holds already; gradient flows to both.

    center_weight  lambda; theirs, 0.003, is for features of any norm
    """

    use = "Compact identities where distances are thresholded; the weight matters."
    scale: Scale = 64.0
    margin: Margin = 0.4
    center_weight: Weight = 1.0

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics = batch.against_classes(scale=self.scale)
        loss_B = softplus(statistics.non_target_B - self.scale * (statistics.target_B - self.margin))
        return (loss_B + self.center_weight * (1 - statistics.target_B)).mean()


@register("range")
class Range(Loss):
    """intra_weight mean over identities of k / sum_{l <= k} 1 / D_l, the harmonic mean of the k largest squared distances D of its images,
    + inter_weight relu(margin - smallest squared distance of two identities' centres). Zhang et al., "Range Loss for Deep Face Recognition
    with Long-Tailed Training Data", ICCV 2017, eqs. 5 to 8: k = 2, both weights 0.5 in a public implementation. Beside a softmax loss.

    Distances are those of unit vectors, in [0, 4], and centres the directions of the identities' mean unit features in the batch; theirs
    have any norm, and their margin is of that size. Their first term is the sum over identities: multiply by their number.

    k       of an identity with fewer pairs in the batch, all of them count; of one without a pair, none
    margin  ours: 1, which is a cosine of 0.5
    Costs two `pair_statistics`.
    """

    use = "Sets with a long tail, in a sum with a sample-to-class loss."
    k: Annotated[int, Within(1, 64, "it counts the largest distances of an identity")] = 2
    margin: Annotated[float, Within(0.0, 4.0, "squared distances of unit vectors are at most 4")] = 1.0
    intra_weight: Weight = 0.5
    inter_weight: Weight = 0.5

    def __call__(self, batch: GlobalBatch) -> Tensor:
        return self.intra_weight * self._intra(batch) + self.inter_weight * self._inter(batch)

    def _intra(self, batch: GlobalBatch) -> Tensor:
        def farthest(cosines_nB: Tensor, is_positive_nB: Tensor, is_negative_nB: Tensor) -> tuple[Tensor]:
            """The smallest cosines [n, k] of each sample with later ones of its identity; 2 where there are fewer."""
            is_counted_nB = is_positive_nB & later_rows(is_positive_nB, is_negative_nB)
            k = min(self.k, cosines_nB.shape[1])
            return (cosines_nB.masked_fill(~is_counted_nB, 2.0).topk(k, dim=1, largest=False).values,)

        (cosines_Bk,) = batch.pairs(farthest)
        labels_n, cosines_n = batch.labels_B.repeat_interleave(cosines_Bk.shape[1]), cosines_Bk.flatten()
        # By identity, within an identity by distance: the first k of an identity are its k largest distances.
        order_n = cosines_n.argsort(stable=True)
        order_n = order_n[labels_n[order_n].argsort(stable=True)]
        labels_n, cosines_n = labels_n[order_n], cosines_n[order_n]
        place_n = torch.arange(len(labels_n), device=labels_n.device)
        is_first_n1 = (torch.searchsorted(labels_n, labels_n) == place_n)[:, None]
        places_nk = place_n[:, None] + torch.arange(self.k, device=labels_n.device)
        is_inside_nk = places_nk < len(labels_n)
        places_nk = places_nk.clamp(max=len(labels_n) - 1)
        is_its_nk = is_first_n1 & is_inside_nk & (labels_n[places_nk] == labels_n[:, None]) & (cosines_n < 1.5)[places_nk]
        inverse_n = (2 - 2 * cosines_n).clamp(min=1e-6).reciprocal()  # equal images: a mean near 0, and finite
        count_n, sum_n = is_its_nk.sum(dim=1), inverse_n[places_nk].where(is_its_nk, 0).sum(dim=1)
        return mean_of(count_n / sum_n.where(count_n > 0, 1), count_n > 0)

    def _inter(self, batch: GlobalBatch) -> Tensor:
        units_BD, first_B = unit_rows(batch.features_BD)[0], positives_of(batch.labels_B).first_B
        # A rank's part of the gradient by the centres is through this sum its part by the features: the parts add up over ranks.
        centers_BD = torch.zeros_like(units_BD).index_add(0, first_B, units_BD).index_select(0, first_B)
        nearest = pair_statistics(centers_BD, batch.labels_B, group=batch.group)[1].amax()
        return torch.relu(self.margin - 2 + 2 * nearest).where(nearest > -1.5, 0)  # -2 stands for no other identity


@register("intra")
class Intra(Loss):
    """A reconstruction of IntraLoss ("Further Margin via Gradient-Enhancing Term for Deep Face Recognition", arXiv 2107.03352), whose
    formula we do not have; its abstract asks for more gradient where an identity reaches far in some directions, until it is as wide in
    all of them. CosFace + intra_weight mean over samples with a positive of softplus(r (mu - p_i)) / r: p_i is the soft minimum of the
    sample's cosines with the others of its identity, -log(mean e^{-r p}) / r, which its farthest ones dominate, and mu the mean of all
    p_i of the batch, without gradient. So identities wider than the batch's average are drawn together, by their farthest images.

    sharpness  r of both; ours: 16
    """

    use = "Identities of uneven width; an experiment."
    scale: Scale = 64.0
    margin: Margin = 0.4
    intra_weight: Weight = 1.0
    sharpness: Annotated[float, Within(1e-3, 1e3, "it scales cosines")] = 16.0

    def __call__(self, batch: GlobalBatch) -> Tensor:
        def soft_minimum(cosines_nB: Tensor, is_positive_nB: Tensor, is_negative_nB: Tensor) -> tuple[Tensor, Tensor]:
            count_n = is_positive_nB.sum(dim=1).to(cosines_nB.dtype)
            logits_nB = (-self.sharpness * cosines_nB).masked_fill(~is_positive_nB, -4 * self.sharpness - 1e4)  # exponential 0, and finite
            return (count_n.clamp(min=1).log() - torch.logsumexp(logits_nB, dim=1)) / self.sharpness, count_n

        farthest_B, count_B = batch.pairs(soft_minimum)
        has_positive_B = count_B > 0
        farthest_B = farthest_B.where(has_positive_B, 0)
        average = mean_of(farthest_B, has_positive_B).detach()
        pull_B = softplus(self.sharpness * (average - farthest_B)) / self.sharpness
        return CosFace(self.scale, self.margin)(batch) + self.intra_weight * mean_of(pull_B.where(has_positive_B, 0), has_positive_B)
