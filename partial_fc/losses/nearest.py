"""NPT-Loss: only the nearest prototypes count."""

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
    """Khalid et al., "NPT-Loss", TPAMI 2023 (arXiv 2103.03503): margin 0.5, the paper's Delta / (2 r^2); k = 1 for ResNet-50, 6 for
    MobileFaceNet. For k = 1 it is the limit of CosFace / scale as the scale grows. The paper's loss is 2 r^2 times this one (2 r in the
    code), a factor that belongs to the learning rate here.

    k              number of nearest prototypes; with fewer classes, all of them
    zero_negative  also ranks a cosine of 0, as in the authors' code, which writes 0 over the target before sorting; not in the paper"""

    formula = r"\sum_{l=1}^{k}\max\left(0, n_{i(l)} - t_i + m\right),\qquad n_{i(1)} \ge n_{i(2)} \ge \dots"
    use = "Fine-tuning, when only the nearest identities still matter; no scale to choose. Only k + 1 prototypes per sample get a gradient."
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
