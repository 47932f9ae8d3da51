"""GCE and GB-CosFace: thresholds that come from the whole batch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from partial_fc.fields import Cosine, Margin, Scale, Within
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, register, softplus

TITLE = "Thresholds from the whole batch"

NOTHING = -1e30  # log of a sum without terms, as a number: infinities have no gradient


def log_sum_of_others(values_M: Tensor, labels_M: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """(log-sum-exp [B] of the values of other labels than one's own, -1e30 where there is none; how many of them [B]). Labels of -1 are
    nobody's. O(M log M) and exact: sums from the left and from the right of one's own label, never a difference."""
    sorted_M, order_M = labels_M.sort(stable=True)
    values_M = values_M.masked_fill(labels_M < 0, NOTHING).clamp(min=NOTHING)[order_M]
    end = values_M.new_full((1,), NOTHING)
    left_M = torch.cat([end, values_M.logcumsumexp(0)])
    right_M = torch.cat([values_M.flip(0).logcumsumexp(0).flip(0), end])
    start_B, stop_B = torch.searchsorted(sorted_M, labels_B), torch.searchsorted(sorted_M, labels_B, right=True)
    count_B = (labels_M >= 0).sum() - (stop_B - start_B)
    return torch.logaddexp(left_M[start_B], right_M[stop_B]), count_B.to(values_M.dtype)


@register("gce")
class GCE(Loss):
    """Global Cross-Entropy: reconstruction of the loss of GFace (Zhao et al., TIP 2025, of which the abstract alone is at hand).

    A target similarity t_i must exceed the non-targets of its own row and those of other samples, and a row's non-targets must stay
    below the targets of its own and of other samples. With a_i = log-sum-exp of s n_ij and K_i the samples of other identities,

    A_i = log(exp a_i + w mean_K exp a_k)        R_i = log(exp(-s t_i) + w mean_K exp(-s t_k))
    alpha softplus(A_i - s (t_i - target_margin)) + (1 - alpha) softplus(a_i + s non_target_margin + R_i)

    out_sample_weight    w; 0 with equal margins is CosFace
    alpha                weight of the target's term
    out_samples          "mean" over K_i, which makes the loss independent of the batch size, or "sum"
    out_sample_gradient  False: other samples' terms are an adaptive threshold without gradient; see docs/losses.md
    queue                so many samples of earlier steps and micro-batches also count as other samples: two numbers and a label of each
    """

    use = "Where similarities of different samples must be comparable: one threshold for all. Figures above."
    scale: Scale = 64.0
    target_margin: Margin = 0.4
    non_target_margin: Margin = 0.05
    out_sample_weight: Annotated[float, Within(0.0, 1e6, "it weighs the terms of other samples")] = 1.0
    alpha: Annotated[float, Within(0.0, 1.0, "it is the target term's share")] = 0.5
    out_samples: Literal["mean", "sum"] = "mean"
    out_sample_gradient: bool = False
    queue: Annotated[int, Within(0, 1 << 24, "it is a number of samples")] = 0

    def tracked(self) -> dict[str, float | Tensor]:
        if not self.queue:
            return {}
        return {"queue": torch.zeros(2, self.queue), "queue_labels": torch.full((self.queue,), -1)}

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics = batch.against_classes(scale=self.scale)
        below_B, above_B = statistics.non_target_B.clamp(min=NOTHING), -self.scale * statistics.target_B
        all_below_B, all_above_B = self._with_others(batch, below_B, above_B)
        target_B = softplus(all_below_B + above_B + self.scale * self.target_margin)
        non_target_B = softplus(below_B + self.scale * self.non_target_margin + all_above_B)
        return (self.alpha * target_B + (1 - self.alpha) * non_target_B).mean()

    def _with_others(self, batch: GlobalBatch, *values_B: Tensor) -> list[Tensor]:
        """Each log-sum-exp with the other samples' beside it: A and R."""
        if not self.out_sample_weight:
            return list(values_B)
        pool, labels_M = list(values_B) if self.out_sample_gradient else [value_B.detach() for value_B in values_B], batch.labels_B
        if self.queue:
            earlier, earlier_labels = batch.kept("queue"), batch.kept("queue_labels")
            pool = [torch.cat([value_B, of_queue.to(value_B.dtype)]) for value_B, of_queue in zip(pool, earlier.clone(), strict=True)]
            labels_M = torch.cat([labels_M, earlier_labels])
            batch.keep("queue", torch.stack(pool)[:, : self.queue])
            batch.keep("queue_labels", labels_M[: self.queue])
        found = []
        for value_B, values_M in zip(values_B, pool, strict=True):
            others_B, count_B = log_sum_of_others(values_M, labels_M, batch.labels_B)
            weight_B = math.log(self.out_sample_weight) - (count_B.clamp(min=1).log() if self.out_samples == "mean" else 0)
            found.append(torch.logaddexp(value_B, torch.where(count_B > 0, weight_B + others_B, NOTHING)))
        return found


@register("gb_cosface")
class GBCosFace(Loss):
    """(softplus(2 s (b - t + margin)) + softplus(2 s (n - b + margin))) / 2, n = log-sum-exp(s n_j) / s. The boundary b of a sample is the
    middle of its own t and n, moved a little to the global boundary, a running mean of these middles; it has no gradient. "GB-CosFace:
    Rethinking Softmax-based Face Recognition", arXiv 2111.11186, in the form of its authors' code: scale 32, margin 0.16, pull 0.15.

    pull         how far a sample's boundary moves to the global one; 0 gives none of it
    share        of each batch in the running mean, which starts with the first batch's own; a batch sees what those before it left
    least, most  the global boundary stays between them
    """

    use = "As CosFace, with a boundary that is common to all samples; small effect, no cost."
    scale: Scale = 32.0
    margin: Margin = 0.16
    pull: Annotated[float, Within(0.0, 1.0, "it is the way from a sample's boundary to the global one")] = 0.15
    share: Annotated[float, Within(0.0, 1.0, "it is the part of a batch in a running mean")] = 0.01
    least: float = 0.5
    most: Cosine = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        Within(-1.0, self.most, "it is a cosine, and not above `most`")("least", self.least)

    def tracked(self) -> dict[str, float | Tensor]:
        return {"boundary": -2.0}  # none yet

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics = batch.against_classes(scale=self.scale)
        target_B, others_B = statistics.target_B, (statistics.non_target_B / self.scale).clamp(min=-2)  # where there is no other class
        middle_B = (target_B + others_B).detach() / 2
        running, mean = batch.kept("boundary").to(middle_B.dtype), middle_B.mean()
        boundary = torch.where(running < -1.5, mean, running).clamp(self.least, self.most)
        batch.track("boundary", torch.lerp(boundary, mean, self.share), 1.0)
        boundary_B = middle_B + self.pull * (boundary - middle_B)
        of_targets_B = softplus(2 * self.scale * (boundary_B - target_B + self.margin))
        return (of_targets_B + softplus(2 * self.scale * (others_B - boundary_B + self.margin))).mean() / 2
