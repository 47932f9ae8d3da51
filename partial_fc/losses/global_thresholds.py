"""GCE and GB-CosFace: thresholds that come from the whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partial_fc.global_batch import GlobalBatch
from partial_fc.losses import Loss, check_range, check_scale, register, softplus


@register("gb_cosface")
@dataclass(frozen=True)
class GBCosFace(Loss):
    """(softplus(2 s (b - t + margin)) + softplus(2 s (n - b + margin))) / 2, n = log-sum-exp(s n_j) / s. The boundary b of a sample is the
    middle of its own t and n, moved a little to the global boundary, a running mean of these middles; it has no gradient. "GB-CosFace:
    Rethinking Softmax-based Face Recognition", arXiv 2111.11186, in the form of its authors' code: scale 32, margin 0.16, pull 0.15.

    pull         how far a sample's boundary moves to the global one; 0 gives none of it
    share        of each batch in the running mean, which starts with the first batch's own; a batch sees what those before it left
    least, most  the global boundary stays between them
    """

    scale: float = 32.0
    margin: float = 0.16
    pull: float = 0.15
    share: float = 0.01
    least: float = 0.5
    most: float = 0.7

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_range("margin", self.margin, 0.0, 2.0, "cosines differ by at most 2")
        check_range("pull", self.pull, 0.0, 1.0, "it is the way from a sample's boundary to the global one")
        check_range("share", self.share, 0.0, 1.0, "it is the part of a batch in a running mean")
        check_range("most", self.most, -1.0, 1.0, "it is a cosine")
        check_range("least", self.least, -1.0, self.most, "it is a cosine, and not above `most`")

    def tracked(self) -> dict[str, float]:
        return {"boundary": -2.0}  # none yet

    def __call__(self, batch: GlobalBatch) -> Tensor:
        statistics = batch.with_classes(scale=self.scale)
        target_B, others_B = statistics.target_B, (statistics.non_target_B / self.scale).clamp(min=-2)  # where there is no other class
        middle_B = (target_B + others_B).detach() / 2
        running, mean = batch.tracked[batch.prefix + "boundary"].to(middle_B.dtype), middle_B.mean()
        boundary = torch.where(running < -1.5, mean, running).clamp(self.least, self.most)
        batch.track("boundary", torch.lerp(boundary, mean, self.share), 1.0)
        boundary_B = middle_B + self.pull * (boundary - middle_B)
        of_targets_B = softplus(2 * self.scale * (boundary_B - target_B + self.margin))
        return (of_targets_B + softplus(2 * self.scale * (others_B - boundary_B + self.margin))).mean() / 2
