"""AdamW on the rows of a PartialFC."""

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from partial_fc.classifier import PartialFC
from partial_fc.optimizers.row_optimizer import RowOptimizer

LARGEST_GAP = 0.5  # ratio of consecutive terms in the series of "lazy", at most


class RowAdamW(RowOptimizer):
    """AdamW (Loshchilov & Hutter, ICLR 2019), equal to torch.optim.AdamW to rounding. Options: see RowOptimizer.

    The bias correction counts the classifier's steps, also for rows that were frozen in some of them (as in torch.optim.SparseAdam): with a
    count per row, rarely sampled rows would make large steps for a long time.

    "lazy" makes up missed steps with a series, cut where the rest is below rounding: a few passes over a chunk in cache, more for more
    steps that may have been missed. To keep them few, all rows are brought up to date whenever epsilon has doubled relative to the root of
    a second moment without gradient: after 4, 20, 82 and 298 steps, then every `most_missed`; more often for a second beta below 0.999."""

    state_names = ("exp_avg", "exp_avg_sq")
    most_missed = 256

    def __init__(
        self,
        classifier: PartialFC,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        unsampled: Literal["frozen", "lazy"] = "frozen",
        in_backward: bool = False,
    ) -> None:
        if lr < 0 or weight_decay < 0 or eps <= 0:
            raise ValueError(f"RowAdamW needs lr >= 0, weight_decay >= 0 and eps > 0, but got {lr}, {weight_decay} and {eps}")
        if not (0 <= betas[0] < 1 and 0 < betas[1] < 1):
            raise ValueError(f"RowAdamW needs betas in [0, 1) and (0, 1), but got {betas[0]} and {betas[1]}")
        super().__init__(classifier, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, unsampled, in_backward)

    def _move(self, group: dict[str, Any], step: int, grad_nD: Tensor, weight_nD: Tensor, *state_nD: Tensor) -> None:
        mean_nD, square_nD = state_nD
        steps = torch.full((), step, dtype=torch.float32, device=weight_nD.device)  # torch adds this step itself
        options = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        options |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "amsgrad": False, "maximize": False}
        adamw([weight_nD], [grad_nD], [mean_nD], [square_nD], [], [steps], fused=True, **options)

    def _missed_step(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """(log of both betas, a, e, d): the weight becomes d weight - a mean / (sqrt(square) + e)."""
        (first, second), lr = group["betas"], float(group["lr"])
        corrected = math.sqrt(1 - second ** (step + 1))
        slope = lr * corrected / (1 - first ** (step + 1))
        return math.log(max(first, 1e-300)), math.log(second), slope, group["eps"] * corrected, 1 - lr * group["weight_decay"]

    def _coefficients(self) -> np.ndarray:
        """For each s: decay of weight, mean and square, E, and the terms of the series, the last one first.

        In a row that misses step s and all later ones, mean and square only decay. With root = sqrt(square) before step s, step t moves the
        weight by -a_st mean / (root + e_st), where a_st includes the weight decay of the steps after t. With E the largest e_st, gap_st = 1
        - e_st / E and y = E / (root + E), which lies in (0, 1], all of these steps together move it by -mean times

            sum_t a_st / (root + e_st) = y sum_p y^p sum_t (a_st / E) gap_st^p.

        No term is negative, and the terms from p on are below (largest gap)^p of the sum."""
        log_first, log_second, slope, floor, decay = np.array(self._missed).T
        first_s, root_s = _running_sum(log_first), _running_sum(log_second / 2)  # logs of what is left before step s = 0 ... T
        decay_s = np.append(np.cumprod(decay[::-1])[::-1], 1.0)
        is_missed_st = np.tri(len(slope) + 1, len(slope), -1) == 0  # t >= s
        root_st = np.where(is_missed_st, root_s[1:] - root_s[:, None], 0.0)
        first_st = np.where(is_missed_st, first_s[1:] - first_s[:, None], -np.inf)
        e_st = np.where(is_missed_st, floor * np.exp(-root_st), 0.0)
        a_st = slope * decay_s[1:] * np.exp(first_st - root_st)
        largest_s = np.append(e_st[:-1].max(axis=1), 1.0)  # row T misses nothing
        gap_st = np.where(is_missed_st, 1 - e_st / largest_s[:, None], 0.0)
        accuracy = torch.finfo(self.state[self.classifier.prototypes]["exp_avg"].dtype).eps
        count = max(2, math.ceil(math.log(accuracy) / math.log(max(gap_st.max(), accuracy))))
        terms = [(a_st * gap_st**power).sum(axis=1) / largest_s for power in reversed(range(count))]
        kept = [np.exp(first_s[-1] - first_s), np.exp(2 * (root_s[-1] - root_s))]
        return np.stack([decay_s, *kept, largest_s, *terms], axis=1)

    def _make_up(self, coefficients_n1: list[Tensor], weight_nD: Tensor, *state_nD: Tensor) -> None:
        mean_nD, square_nD = state_nD
        decay, mean_kept, square_kept, largest, *terms = coefficients_n1
        y_nD = square_nD.sqrt().add_(largest)
        torch.div(largest, y_nD, out=y_nD)
        sum_nD = (y_nD * terms[0]).add_(terms[1])
        for term in terms[2:]:
            torch.addcmul(term, sum_nD, y_nD, out=sum_nD)
        weight_nD.mul_(decay).sub_(sum_nD.mul_(y_nD).mul_(mean_nD))
        mean_nD.mul_(mean_kept)
        square_nD.mul_(square_kept)

    def _must_flush(self) -> bool:
        _, log_second, _, floor, _ = np.array(self._missed).T
        log_e = np.log(floor) - log_second.cumsum() / 2
        return super()._must_flush() or log_e.max() - log_e.min() > -math.log(1 - LARGEST_GAP)


def _running_sum(x: np.ndarray) -> np.ndarray:
    """[T + 1]: the sums of the first 0, 1, ..., T numbers."""
    return np.append(0.0, x.cumsum())
