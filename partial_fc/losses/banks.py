"""Losses that keep features or prototypes of earlier steps."""

from __future__ import annotations

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
    """ArcFace with prototypes (1 - share) w / |w| + share f, f the last feature of the class, for all classes that have a fresh one. Deng
    et al., "Variational Prototype Learning", CVPR 2021, and their code: scale 64, margin 0.5, share 0.15, from step 8000 on, features
    at most 200 steps old. Nothing flows to f. Without their option of a second, averaged encoder for f.

    share      of the feature
    start      the step after which features are mixed in; up to it this is ArcFace
    staleness  the age in steps up to which a feature is fresh
    slope      as ArcFace's. The authors' code works on a bank of all classes, so they use sample_rate 1; here any will do
    """

    use = "A set with enough images of an identity that its last feature is still true when the next one comes; costs a bank."
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
    """CosFace or ArcFace, from which the encoder learns by the batch alone and prototypes by the batch and features of earlier steps. Kim,
    Park & Shin, "BroadFace", ECCV 2020: queue 10,000 (32,000 in their README). Two passes: the batch before constant prototypes, and
    constant features of queue and batch, all of one weight, before prototypes. A feature f of the queue, which came when its prototype
    was w', is moved along with it: f + |f| / |w'| (w - w'). The value is the first pass's, the gradient that of both.

    base    "arcface" (margin in radians) or "cosface" (margin in cosines)
    queue   so many features; each rank keeps all of them, with prototypes of then: 8 queue D bytes

    A pass over the prototypes with B + queue rows, and one with B. Communicates 1 all-reduce of (B + queue)(D + 1) floats, 1 of 2 B and 1
    of 2 (B + queue). At a sample_rate below 1 features whose class is not in the step's sample are left out. Refuses substitution.
    """

    use = "Very many identities and small batches: prototypes see the features of many steps."
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
        # The prototypes' pass first: backward takes it last, and an optimizer that moves prototypes in backward moves them after all use.
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
        """Features of the batch, and of the queue where they would be now."""
        features_BD, features_QD, then_QD = batch.features_BD.detach(), batch.kept("queue_features"), batch.kept("queue_prototypes")
        ratio_Q1 = torch.linalg.vector_norm(features_QD, dim=1, keepdim=True) * inverse_norms(then_QD)
        return torch.cat([features_BD, features_QD + ratio_Q1 * (now_MD[len(features_BD) :] - then_QD)])

    def _enqueue(self, batch: GlobalBatch, labels_M: Tensor, now_MD: Tensor) -> None:
        """Puts the batch before the queue, and drops what is too old."""
        count = len(batch.labels_B)
        batch.keep("queue_labels", labels_M[: self.queue])
        for name, value_BD in (("queue_features", batch.features_BD.detach()), ("queue_prototypes", now_MD[:count])):
            batch.keep(name, torch.cat([value_BD, batch.kept(name)])[: self.queue])


@register("prototype_memory")
class PrototypeMemory(Loss):
    """A reconstruction: softmax over a limited memory of prototypes made from samples, in place of learned ones. Smirnov et al., "Prototype
    Memory for Large-scale Face Representation Learning", 2021, of which the abstract alone was available: prototypes of classes new in
    the batch are generated from its samples, those in memory refreshed, the oldest dropped. Here a class's prototype is its last sample,
    and memory is the bank of last features within `resident` steps. The target is another sample of the identity in the batch, with
    gradient to both sides; without one the identity's prototype in memory; without either there is no loss. Non-targets are one
    sample of every other identity of the batch, and the prototypes in memory of all other identities.

    margin    of the target's cosine, as CosFace's
    resident  steps that a prototype stays in memory after its class was last in a batch; memory holds at most resident B classes

    Learned prototypes have no part in it, and need no optimizer: call the classifier's end_step after every step, or let RowSGD do so.
    """

    use = "So many identities that prototypes cannot be kept; an experiment."
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
