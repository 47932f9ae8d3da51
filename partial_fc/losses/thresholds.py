"""Losses with one learned threshold: every similarity is judged by itself, above it or below."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from partial_fc.global_batch import GlobalBatch
from partial_fc.losses import Loss, check_margin, check_range, check_scale, register, softplus
from partial_fc.maps import Map

TITLE = "Learned thresholds"


@register("uce")
@dataclass(frozen=True)
class UCE(Loss):
    """softplus(b - s (t - margin)) + weight sum_j softplus(s n_j - b), b = s threshold + log(C - 1) learned. Zhou et al., "UniFace: Unified
    Cross-Entropy Loss", ICCV 2023, eqs. 23, 31 and 32: scale 64, margin 0.4, weight 0.7 (UCE-mb) on WebFace.

    threshold  first value of the learned one, as a cosine; by default the authors' code's, b = log(10 C)
    weight     of the non-targets; with the classifier's sample_rate the r of eq. 32
    """

    use: ClassVar[str] = "Where one threshold for all identities is wanted, as in open-set verification at one operating point."
    scale: float = 64.0
    margin: float = 0.4
    threshold: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_margin(self.margin)
        check_range("weight", self.weight, 0.0, math.inf, "it weighs the non-targets")
        if self.threshold is not None:
            check_range("threshold", self.threshold, -1.0, 1.0, "it is a cosine")

    def learned(self, num_classes: int) -> dict[str, float]:
        if self.threshold is None:
            return {"threshold": math.log(10 * num_classes)}
        return {"threshold": self.scale * self.threshold + math.log(max(1, num_classes - 1))}

    def __call__(self, batch: GlobalBatch) -> Tensor:
        b = batch.parameter("threshold")
        statistics = batch.with_classes(scale=self.scale, reduction="softplus_sum", threshold=b)
        return (softplus(b - self.scale * (statistics.target_B - self.margin)) + self.weight * statistics.non_target_B).mean()


@register("uss")
@dataclass(frozen=True)
class USS(Loss):
    """softplus(b - s (p - margin)) + sum_j softplus(s n_j - b): UCE with samples in place of prototypes, p the cosine with another sample
    of the identity and n_j with one sample of every other identity. Li et al., "UniTSFace", NeurIPS 2023, eqs. 11 and 24: scale 64,
    margin 0.1. Anchors without a positive have their second term alone.

    threshold  first value of the learned one, as a cosine; by default their code's, b = mean log-sum-exp of s n_j in the first batch
               that has any
    source     of the other samples. "batch", the gathered one, with gradient to both sides; needs batches with several images of an
               identity. "bank": the last features of all classes, without gradient, as theirs; costs what CosFace costs
    start      with the bank: the step from which on there is a loss; before it only fills (theirs: one epoch)
    staleness  with the bank: steps after which a feature counts no more; by default it always counts, as theirs
    """

    use: ClassVar[str] = "Beside a sample-to-class loss (see unitsface); alone it lets prototypes be."
    scale: float = 64.0
    margin: float = 0.1
    threshold: float | None = None
    source: Literal["batch", "bank"] = "batch"
    start: int = 0
    staleness: int | None = None

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_margin(self.margin)
        if self.threshold is not None:
            check_range("threshold", self.threshold, -1.0, 1.0, "it is a cosine")
        if self.source not in ("batch", "bank"):
            raise ValueError(f"source is {self.source!r}, but must be 'batch' or 'bank'")
        check_range("start", self.start, 0, math.inf, "it is a step")
        if self.staleness is not None:
            check_range("staleness", self.staleness, 1, math.inf, "it is a number of steps")

    def learned(self, num_classes: int) -> dict[str, float]:
        return {"threshold": 0.0 if self.threshold is None else self.scale * self.threshold}

    def tracked(self) -> dict[str, float | Tensor]:
        return {} if self.threshold is not None else {"threshold_is_started": 0.0}

    def uses_bank(self) -> bool:
        return self.source == "bank"

    def __call__(self, batch: GlobalBatch) -> Tensor:
        ask = batch.with_samples
        if self.source == "bank":
            if batch.step < self.start:
                return 0 * batch.norms().sum()
            ask = partial(batch.with_bank, staleness=self.staleness)
        if self.threshold is None:
            with torch.no_grad():
                batch.start("threshold", ask(scale=self.scale)[0].non_target_B)
        b = batch.parameter("threshold")
        statistics, has_positive_B = ask(scale=self.scale, reduction="softplus_sum", threshold=b)
        positive_B = softplus(b - self.scale * (statistics.target_B - self.margin)).where(has_positive_B, 0)
        return (positive_B + statistics.non_target_B).mean()


@register("sphereface2")
@dataclass(frozen=True)
class SphereFace2(Loss):
    """(weight / s) (target_weight softplus(-s (g(t) - margin) - b) + (1 - target_weight) sum_j softplus(s (g(n_j) + margin) + b)) with
    g(z) = 2 ((z + 1) / 2)^power - 1 and one learned bias b. Wen et al., "SphereFace2", ICLR 2022, type C (a margin on both sides), with the
    constants of the authors' code (opensphere): scale 40, margin 0.4 (64 and 0.5 on MS1M), power 3.

    target_weight  lambda of their eq. 5, alpha of the code: 0.7 (0.8 on MS1M)
    weight         lw of the code: 50 (10 on VGGFace2)
    slope          "straight_through": the code's, 1 for g; or "exact"
    """

    use: ClassVar[str] = "Noisy labels, or where each pair of sample and class shall be judged by itself."
    scale: float = 40.0
    margin: float = 0.4
    power: float = 3.0
    target_weight: float = 0.7
    weight: float = 50.0
    slope: Literal["straight_through", "exact"] = "straight_through"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_margin(self.margin)
        check_range("power", self.power, 1.0, 16.0, "1 leaves cosines as they are, 3 is usual")
        check_range("weight", self.weight, 0.0, math.inf, "it weighs the loss")
        if not 0 < self.target_weight < 1:
            raise ValueError(f"target_weight is {self.target_weight}, but must lie between 0 and 1: non-targets have the rest")
        if self.slope not in ("straight_through", "exact"):
            raise ValueError(f"slope is {self.slope!r}, but must be 'straight_through' or 'exact'")

    def learned(self, num_classes: int) -> dict[str, float]:
        """The b at which the loss of orthogonal features and prototypes is smallest."""
        ratio = self.target_weight / ((1 - self.target_weight) * max(1, num_classes - 1))
        middle = 2 * 0.5**self.power - 1
        target, others = self.scale * (middle - self.margin), self.scale * (middle + self.margin)
        # log(2 z) - log(1 - z + sqrt((1 - z)^2 + 4 z e^(target - others))) - others; for z > 1 without the difference of equal numbers.
        gap = 4 * ratio * math.exp(target - others)
        root = math.sqrt((1 - ratio) ** 2 + gap)
        if ratio <= 1:
            return {"bias": math.log(2 * ratio) - others - math.log(1 - ratio + root)}
        return {"bias": math.log(ratio - 1 + root) - math.log(2) - target}

    def __call__(self, batch: GlobalBatch) -> Tensor:
        bias, shaped = batch.parameter("bias"), Map(self._shape, slope=self.slope)
        threshold = -(self.scale * self.margin + bias)
        statistics = batch.with_classes(scale=self.scale, reduction="softplus_sum", threshold=threshold, map=shaped)
        target_B = self._shape(statistics.target_B)
        if self.slope == "straight_through":
            target_B = statistics.target_B + (target_B - statistics.target_B).detach()
        of_targets_B = softplus(-self.scale * (target_B - self.margin) - bias)
        loss_B = self.target_weight * of_targets_B + (1 - self.target_weight) * statistics.non_target_B
        return self.weight / self.scale * loss_B.mean()

    def _shape(self, cosines: Tensor, _: Tensor | None = None) -> Tensor:
        return 2 * ((cosines + 1) / 2).clamp(min=0).pow(self.power) - 1
