"""GCE and GB-CosFace: thresholds computed from the whole batch."""

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
    """(log-sum-exp [B] of the values with another label than one's own, -1e30 if there are none; their number [B]). Values with label -1
    never count. O(M log M) and exact: sums from the left and from the right of one's own label, never a difference."""
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
    """Global Cross-Entropy: a reconstruction of the loss of GFace (Zhao et al., TIP 2025), of which we have only the abstract. A target
    similarity must exceed the non-targets of its own row and those of other samples; the non-targets of a row must stay below the targets
    of its own and of other samples. K_i are the samples of other identities.

    out_sample_weight    w; 0 with equal margins is CosFace
    alpha                weight of the target's term
    out_samples          "mean" over K_i, which makes the loss independent of the batch size, or "sum"
    out_sample_gradient  False: terms of other samples are an adaptive threshold without gradient; see docs/experiments.md
    queue                samples of earlier steps and micro-batches that also count as other samples; keeps 2 numbers and a label each"""

    formula = (
        r"\alpha \mathrm{softplus}\left(A_i - s (t_i - m_t)\right) + (1-\alpha) \mathrm{softplus}\left(a_i + s m_n + R_i\right),\qquad A_i "
        r"= \log\left(e^{a_i} + \frac{w}{|K_i|}\sum_{k\in K_i} e^{a_k}\right),\qquad R_i = \log\left(e^{-s t_i} + "
        r"\frac{w}{|K_i|}\sum_{k\in K_i} e^{-s t_k}\right),\qquad w = \text{out sample weight},\quad m_t = \text{target margin},\quad m_n "
        r"= \text{non target margin}"
    )
    use = "Where similarities of different samples must be comparable: one threshold for all."
    scale: Scale = 64.0
    target_margin: Margin = 0.4  # on the target against the non-targets
    non_target_margin: Margin = 0.05  # on the non-targets against the targets
    out_sample_weight: Annotated[float, Within(0.0, 1e6, "it weighs the terms of other samples")] = 1.0
    alpha: Annotated[float, Within(0.0, 1.0, "it is the target term's share")] = 0.5
    out_samples: Literal["mean", "sum"] = "mean"
    out_sample_gradient: bool = False
    queue: Annotated[int, Within(0, 1 << 24, "it is a number of samples")] = 0

    def tracked(self) -> dict[str, float | Tensor]:
        if not self.queue:
            return {}
        return {"queue": torch.zeros(2, self.queue, dtype=torch.float32), "queue_labels": torch.full((self.queue,), -1)}

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics = batch.against_classes(scale=self.scale)
        below_B, above_B = statistics.non_target_B.clamp(min=NOTHING), -self.scale * statistics.target_B
        all_below_B, all_above_B = self._with_others(batch, below_B, above_B)
        target_B = softplus(all_below_B + above_B + self.scale * self.target_margin)
        non_target_B = softplus(below_B + self.scale * self.non_target_margin + all_above_B)
        return (self.alpha * target_B + (1 - self.alpha) * non_target_B).mean()

    def _with_others(self, batch: GlobalBatch, *values_B: Tensor) -> list[Tensor]:
        """Each log-sum-exp with that of the other samples added: A and R."""
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
    """The authors' code of "GB-CosFace: Rethinking Softmax-based Face Recognition", arXiv 2111.11186: scale 32, margin 0.16, pull 0.15. The
    boundary b of a sample, without gradient, is the middle v of its target and non-targets, moved a little to a running mean of middles.

    pull         how far a sample's boundary moves to the global one; 0 ignores the global one
    share        of each batch in the running mean, which starts with that of the first batch; a batch sees the mean of those before it
    least, most  limits of the global boundary"""

    formula = (
        r"\frac{1}{2} \mathrm{softplus}\left(2s (b_i - t_i + m)\right) + \frac{1}{2} \mathrm{softplus}\left(2s (a_i/s - b_i + "
        r"m)\right),\qquad b_i = v_i + \rho (\bar v - v_i),\qquad v_i = \frac{t_i + a_i/s}{2},\qquad \rho = \text{pull},\quad \bar v = "
        r"\text{running mean of } v_i \text{, between least and most}"
    )
    use = "Like CosFace, with a boundary that is common to all samples; small effect, no cost."
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
        target_B, others_B = statistics.target_B, (statistics.non_target_B / self.scale).clamp(min=-2)  # -2 if there is no other class
        middle_B = (target_B + others_B).detach() / 2
        running, mean = batch.kept("boundary").to(middle_B.dtype), middle_B.mean()
        boundary = torch.where(running < -1.5, mean, running).clamp(self.least, self.most)
        batch.track("boundary", torch.lerp(boundary, mean, self.share), 1.0)
        boundary_B = middle_B + self.pull * (boundary - middle_B)
        of_targets_B = softplus(2 * self.scale * (boundary_B - target_B + self.margin))
        return (of_targets_B + softplus(2 * self.scale * (others_B - boundary_B + self.margin))).mean() / 2
