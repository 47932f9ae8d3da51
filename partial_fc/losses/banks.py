"""Losses that keep features or prototypes of earlier steps."""

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from partial_fc.fields import Angle, Margin, Scale, Steps, Within
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, register, softplus
from partial_fc.losses.margins import angular, check_margin, with_margin
from partial_fc.similarity import Statistics
from partial_fc.unit_rows import inverse_norms

TITLE = "Features and prototypes of earlier steps"


@register("vpl")
class VPL(Loss):
    """ArcFace with a share of each class's last feature f mixed into its prototype, for classes with a fresh feature. Deng et al.,
    "Variational Prototype Learning", CVPR 2021, and the authors' code: scale 64, margin 0.5, share 0.15, from step 8000 on, features at
    most 200 steps old. No gradient flows to f. The paper's option of a second, averaged encoder for f is not included.

    share      of the feature
    start      the step after which features are mixed in; up to it this is ArcFace
    staleness  the age in steps up to which a feature is fresh
    slope      as in ArcFace. The authors' code needs a bank of all classes and so uses sample_rate 1; here any rate works"""

    formula = (
        r"\mathrm{softplus}\left(a_i - s\cos(\theta_i + m)\right)\quad\text{with prototypes}\quad (1 - \lambda_j) \frac{w_j}{|w_j|} + "
        r"\lambda_j f_j,\qquad \lambda_j = \lambda\text{ if } f_j \text{ is fresh, else } 0,\qquad \lambda = \text{share},\quad f_j = "
        r"\text{last feature of class } j"
    )
    use = "Sets with so many images per identity that the last feature is still valid when the next one comes; needs a bank."
    scale: Scale = 64.0
    margin: Angle = 0.5
    share: Annotated[float, Within(0.0, 1.0, "it is a share")] = 0.15
    start: Annotated[int, Within(-1, math.inf, "it is a step")] = 8000
    staleness: Steps = 200
    slope: Literal["exact", "straight_through"] = "exact"

    def uses_bank(self) -> bool:
        return True

    def __call__(self, batch: GlobalBatch) -> Tensor:
        share_S = self.share * batch.fresh(self.staleness).to(batch.features_BD.dtype) if batch.step > self.start else None
        statistics = batch.against_classes(scale=self.scale, bank_share_S=share_S)
        phi_B = angular(statistics.target_B, 1.0, self.margin, self.slope)
        return softplus(statistics.non_target_B - self.scale * phi_B).mean()


@register("broadface")
class BroadFace(Loss):
    """CosFace or ArcFace in which the encoder learns from the batch, and prototypes from the batch and from features of earlier steps. Kim,
    Park & Shin, "BroadFace", ECCV 2020: queue 10,000 (32,000 in their README). Two passes: the batch against constant prototypes, and
    constant features of queue and batch, with equal weights, against prototypes. A feature f of the queue moves with its prototype, from w'
    when it was stored to w: f + |f| / |w'| (w - w'). The value is that of the first pass, the gradient that of both.

    base   "arcface" (margin in radians) or "cosface" (margin in cosines)
    queue  number of features; each rank keeps all of them and the prototypes of their time: 8 queue D bytes

    Costs a pass over the prototypes with B + queue rows and one with B. Communicates 1 all-reduce of (B + queue)(D + 1) floats, 1 of 2 B
    and 1 of 2 (B + queue). A sample_rate below 1 leaves out features whose class is not in the step's sample. Refuses substitution."""

    formula = (
        r"\frac{1}{B}\sum_{i\in\mathrm{batch}}\ell\left(x_i, \mathrm{sg}(W)\right) + "
        r"\frac{1}{B+Q}\sum_{i\in\mathrm{batch}\cup\mathrm{queue}}\ell\left(\mathrm{sg}(x_i), W\right),\qquad \ell = "
        r"\mathrm{softplus}\left(a_i - s \varphi(t_i)\right),\qquad Q = \text{features in the queue},\quad \varphi = \text{that of the "
        r"base}"
    )
    use = "Very many identities and small batches: prototypes learn from the features of many steps."
    scale: Scale = 64.0
    margin: float = 0.5
    base: Literal["arcface", "cosface"] = "arcface"
    queue: Annotated[int, Within(1, 1 << 24, "it is a number of features")] = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_margin(self.margin, self.base)

    def tracked(self) -> dict[str, float | Tensor]:
        return {"queue_labels": torch.full((self.queue,), -1)}

    def queued(self) -> dict[str, int]:
        return {"queue_features": self.queue, "queue_prototypes": self.queue}

    def __call__(self, batch: GlobalBatch) -> Tensor:
        if not torch.is_grad_enabled():
            return self._losses(batch.against_classes(scale=self.scale)).mean()
        # The pass of the prototypes comes first, so last in backward: an optimizer that moves them in backward moves them after all use.
        labels_M = torch.cat([batch.labels_B, batch.kept("queue_labels")])  # M = B + queue, the newest first
        now_MD, is_in_M = batch.prototypes_of(labels_M)
        features_MD = self._moved(batch, now_MD)
        losses_M = self._losses(batch.with_features(features_MD, labels_M).against_classes(scale=self.scale)).where(is_in_M, 0)
        of_prototypes = losses_M.sum() / is_in_M.sum().clamp(min=1)
        of_encoder = self._losses(batch.with_frozen_prototypes().against_classes(scale=self.scale)).mean()
        self._enqueue(batch, labels_M, now_MD)
        return of_encoder + (of_prototypes - of_prototypes.detach())

    def _losses(self, statistics: Statistics) -> Tensor:
        phi_B = with_margin(statistics.target_B, self.margin, self.base)
        return softplus(statistics.non_target_B - self.scale * phi_B)

    def _moved(self, batch: GlobalBatch, now_MD: Tensor) -> Tensor:
        """Features of the batch, and those of the queue moved with their prototypes."""
        features_BD, features_QD, then_QD = batch.features_BD.detach(), batch.kept("queue_features"), batch.kept("queue_prototypes")
        ratio_Q1 = torch.linalg.vector_norm(features_QD, dim=1, keepdim=True) * inverse_norms(then_QD)
        return torch.cat([features_BD, features_QD + ratio_Q1 * (now_MD[len(features_BD) :] - then_QD)])

    def _enqueue(self, batch: GlobalBatch, labels_M: Tensor, now_MD: Tensor) -> None:
        """Puts the batch at the front of the queue and drops the oldest."""
        count = len(batch.labels_B)
        batch.keep("queue_labels", labels_M[: self.queue])
        for name, value_BD in (("queue_features", batch.features_BD.detach()), ("queue_prototypes", now_MD[:count])):
            batch.keep(name, torch.cat([value_BD, batch.kept(name)])[: self.queue])


@register("prototype_memory")
class PrototypeMemory(Loss):
    """A reconstruction of Smirnov et al., "Prototype Memory for Large-scale Face Representation Learning", 2021, of which we have only the
    abstract: softmax over a limited memory of prototypes in place of learned ones. They are generated from the batch's samples for new
    classes and refreshed for those in memory; the oldest are dropped. Here the prototype of a class is its last sample, and the memory is
    the bank of last features within `resident` steps. The target is another sample of the identity in the batch, with gradient to both
    sides; otherwise the identity's prototype in memory; with neither there is no loss. Non-targets are one sample of every other identity
    of the batch, and the prototypes in memory of all other identities.

    margin    of the target's cosine, as in CosFace
    resident  steps that a prototype stays in memory after its class was last in a batch; the memory holds at most resident B classes

    Learned prototypes are not used and need no optimizer: call the classifier's end_step after every step, or let RowSGD call it."""

    formula = r"\mathrm{softplus}\left(\log\sum_{j\in\mathrm{batch}\cup \mathrm{memory}} e^{s n_{ij}} - s (t_i - m)\right)"
    use = "More identities than there is memory for prototypes; experimental."
    scale: Scale = 64.0
    margin: Margin = 0.4
    resident: Steps = 200

    def uses_bank(self) -> bool:
        return True

    def __call__(self, batch: GlobalBatch) -> Tensor:
        of_batch, has_sample_B = batch.against_samples(scale=self.scale)
        of_memory, has_prototype_B = batch.against_bank(scale=self.scale, staleness=self.resident, leaves_out_batch=True)
        non_target_B = log_add_exp(of_batch.non_target_B, of_memory.non_target_B)
        target_B = torch.where(has_sample_B, of_batch.target_B, of_memory.target_B)
        losses_B = softplus(non_target_B - self.scale * (target_B - self.margin))
        return losses_B.where(has_sample_B | has_prototype_B, 0).mean()


def log_add_exp(x_B: Tensor, y_B: Tensor) -> Tensor:
    """log(exp(x) + exp(y)), without NaN in the gradient where both are -inf."""
    is_nothing_B = (x_B == -math.inf) & (y_B == -math.inf)
    return torch.logaddexp(x_B.masked_fill(is_nothing_B, 0), y_B).masked_fill(is_nothing_B, -math.inf)
