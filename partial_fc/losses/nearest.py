"""NPT-Loss: the nearest prototypes alone."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from partial_fc.fields import Margin, Within
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, register
from partial_fc.statistics import TopK

TITLE = "Nearest prototypes"


@register("npt")
class NPT(Loss):
    """sum over the k nearest other prototypes of relu(n_(k) - t + margin): what CosFace / scale tends to as its scale grows, for k = 1.
    Khalid et al., "NPT-Loss", TPAMI 2023 (arXiv 2103.03503): margin 0.5, their Delta / (2 r^2);
    k = 1 for ResNet-50, 6 for MobileFaceNet. Theirs is 2 r^2 (in the code 2 r) times this one: part of the learning rate here.

    k              nearest prototypes. Where there are fewer classes, as many as there are
    zero_negative  whether a non-target of cosine 0 is ranked among them, as in the authors' code, which writes 0 over the target before
                   it sorts; not in the paper
    """

    use = "Fine-tuning, when only the nearest identities still matter; no scale to choose. Its gradient to prototypes is sparse."
    margin: Margin = 0.5
    k: Annotated[int, Within(1, math.inf, "it is the number of nearest prototypes")] = 1
    zero_negative: bool = False

    def __call__(self, batch: GlobalBatch) -> Tensor:
        k = min(self.k, batch.num_classes)
        statistics = batch.against_classes(scale=1.0, statistic=TopK(k))
        nearest_Bk = statistics.non_target_B
        if self.zero_negative:
            nearest_Bk = torch.cat([nearest_Bk, torch.zeros_like(nearest_Bk[:, :1])], dim=1).topk(k, dim=1).values
        hinge_Bk = (nearest_Bk - statistics.target_B[:, None] + self.margin).relu()
        return hinge_Bk.where(nearest_Bk > -1.5, 0).sum(dim=1).mean()  # -2 stands for no class
