"""Losses that draw the images of an identity together: towards its prototype, towards each other, or the farthest of them first."""

from typing import Annotated

import torch
from torch import Tensor

from partial_fc.fields import Margin, Scale, Weight, Within
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, Needs, register, softplus
from partial_fc.losses.margins import CosFace
from partial_fc.losses.pair_losses import mean_of
from partial_fc.pairs import later_rows, pair_statistics
from partial_fc.positives import positives_of
from partial_fc.unit_rows import unit_rows

TITLE = "Compact identities"


@register("center")
class Center(Loss):
    """CosFace + center_weight mean |x_i - w_{y_i}|^2 / 2 of unit vectors. Wen et al., "A Discriminative Feature Learning Approach for Deep
    Face Recognition", ECCV 2016, eq. 5, uses softmax on features of any norm, and centres that are running means of features, moved by a
    share of 0.5 per step. Here the centre of an identity is the direction of its prototype; the gradient flows to both.

    center_weight  lambda; 0.003 in the paper, for features of any norm"""

    formula = r"\mathrm{softplus}\left(a_i - s (t_i - m)\right) + \lambda (1 - t_i),\qquad \lambda = \text{center weight}"
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
    """Zhang et al., "Range Loss for Deep Face Recognition with Long-Tailed Training Data", ICCV 2017, eqs. 5 to 8: k = 2, both weights 0.5
    in a public implementation. The first term is the harmonic mean of the k largest squared distances D of an identity's images; the second
    pushes the nearest two centres apart. Costs two `pair_statistics`.

    Distances are squared distances of unit vectors, in [0, 4]; a centre is the direction of an identity's mean unit feature in the batch.
    In the paper features have any norm, with a margin to match, and the first term is a sum over identities: multiply by their number.

    k       if an identity has fewer pairs in the batch, all of them count; without a pair it does not count
    margin  ours: 1, a cosine of 0.5"""

    formula = (
        r"\frac{\lambda_1}{|I|}\sum_{c\in I}\frac{k}{\sum_{l=1}^{k} 1/D_{c(l)}} + \lambda_2\max\left(0, m - \min_{c\ne c'} |\mu_c - "
        r"\mu_{c'}|^2\right),\qquad D_{c(1)} \ge D_{c(2)} \ge \dots,\qquad \lambda_1, \lambda_2 = \text{intra and inter weight},\quad I = "
        r"\text{identities with a pair},\quad \mu_c = \text{centre of identity } c"
    )
    use = "Sets with a long tail, in a sum with a sample-to-class loss."
    k: Annotated[int, Within(1, 64, "it counts the largest distances of an identity")] = 2
    margin: Annotated[float, Within(0.0, 4.0, "squared distances of unit vectors are at most 4")] = 1.0
    intra_weight: Weight = 0.5  # of the first term
    inter_weight: Weight = 0.5  # of the second term

    def needs_positives(self) -> Needs:
        return "partly"

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
        # Sorted by identity, then by distance: the first k of an identity are its k largest distances.
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
        # Through this sum a rank's part of the gradient by the centres becomes its part by the features; the parts add up over ranks.
        centers_BD = torch.zeros_like(units_BD).index_add(0, first_B, units_BD).index_select(0, first_B)
        nearest = pair_statistics(centers_BD, batch.labels_B, group=batch.group)[1].amax()
        return torch.relu(self.margin - 2 + 2 * nearest).where(nearest > -1.5, 0)  # -2 stands for no other identity


@register("intra")
class Intra(Loss):
    """A reconstruction of IntraLoss ("Further Margin via Gradient-Enhancing Term for Deep Face Recognition", arXiv 2107.03352). We do not
    have its formula; its abstract asks for more gradient in directions in which an identity reaches far, until it is equally wide in all
    directions. f_i is the soft minimum of a sample's cosines with the others of its identity, in which the farthest ones dominate; mu is
    the mean of f over the batch, without gradient. Identities wider than the batch's average are thus drawn together by their farthest
    images. The second term is averaged over samples with a positive.

    sharpness  r; ours: 16"""

    formula = (
        r"\mathrm{softplus}\left(a_i - s (t_i - m)\right) + \frac{\lambda}{r} \mathrm{softplus}\left(r (\mu - f_i)\right),\qquad f_i = "
        r"-\frac{1}{r}\log\frac{1}{|P_i|}\sum_{k\in P_i} e^{-r\cos(x_i, x_k)},\qquad \mu = \mathrm{mean}_i f_i,\qquad \lambda = "
        r"\text{intra weight},\quad r = \text{sharpness},\quad P_i = \text{other samples of the identity of } i"
    )
    use = "Identities of uneven width; experimental."
    scale: Scale = 64.0
    margin: Margin = 0.4
    intra_weight: Weight = 1.0  # of the second term
    sharpness: Annotated[float, Within(1e-3, 1e3, "it scales cosines")] = 16.0

    def needs_positives(self) -> Needs:
        return "partly"

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
