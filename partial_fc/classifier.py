"""PartialFC: the model-parallel classifier. Each rank holds the prototypes of its own classes; the loss is the global batch's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from partial_fc import collectives, sampling
from partial_fc.collectives import Group
from partial_fc.losses import Loss
from partial_fc.sampling import Sample
from partial_fc.shards import ClassShard, initial_prototypes
from partial_fc.similarity import hardest_non_target, similarity_statistics


@dataclass(frozen=True)
class ClassifierConfig:
    sample_rate: float = 1.0  # share of the classes without a sample in the batch that take part in a step; 0.1 is usual above a million
    correct_rate: bool = False  # weigh each sampled negative by 1 / sample_rate, so that log-sum-exps estimate those over all classes

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate is {self.sample_rate}, but must be above 0 and at most 1")


class PartialFC(nn.Module):
    """Prototype matrix [num_classes, width] sharded by rows over the ranks of `group`, with a loss on top.

    num_classes        identities of the whole job
    width              features per sample, D
    loss               from `losses.build`; may be replaced between steps (margin warm-up)
    sample_rate        below 1: a step sees all classes of its batch and each other class with this probability; `prototypes.grad` is then
                       a sparse tensor of the sampled rows, which RowSGD alone updates
    correct_rate       see ClassifierConfig
    seed               of first prototypes and samples, which depend on the class id (and step) alone and not on the number of ranks
    group              process group; without an initialised one this is an ordinary single-process module
    kernel             "auto" (chunked) or a name in similarity.KERNELS
    feature_gradient   "averaged": multiplied by the world size, because a data-parallel engine (DDP, DeepSpeed) then averages over
                       ranks; "global": the gradient of the returned loss itself. Nowhere else does this factor appear.

    `prototypes` is this rank's [S, D] parameter, float32, kept out of the data-parallel engine (which would average it over ranks).
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        loss: Loss,
        sample_rate: float = 1.0,
        *,
        correct_rate: bool = False,
        seed: int = 0,
        group: Group = None,
        kernel: str = "auto",
        feature_gradient: Literal["averaged", "global"] = "averaged",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if feature_gradient not in ("averaged", "global"):
            raise ValueError(f"feature_gradient is {feature_gradient!r}, but must be 'averaged' or 'global'")
        ranks = collectives.world_size(group)
        self.shard = ClassShard.of_rank(num_classes, collectives.rank(group), ranks)
        self.config = ClassifierConfig(sample_rate, correct_rate)
        self.width, self.loss, self.seed, self.group = width, loss, seed, group
        self.step = 0  # numbers the samples; counts calls, unless the caller sets it
        self.sample: Sample | None = None  # of the newest step
        self.is_step_begun = False
        self.draws = 0  # samples since RowSGD's last step
        self.kernel = "chunked" if kernel == "auto" else kernel
        self.gradient_factor = float(ranks) if feature_gradient == "averaged" else 1.0
        self.prototypes = nn.Parameter(initial_prototypes(self.shard, width, seed).to(device))

    def begin_step(self, labels_b: Tensor) -> None:
        """Fixes one sample for all micro-batches of a step, whose labels on this rank are `labels_b`, until RowSGD's `step`.

        1 all-gather of labels. Without it every call of `forward` is a step of its own."""
        if self.config.sample_rate < 1:
            self._draw(collectives.gather_constant(labels_b, self.group))
            self.is_step_begun = True

    def end_step(self) -> None:
        """What RowSGD does after its update: the next call of `forward` or `begin_step` draws anew."""
        self.is_step_begun, self.draws = False, 0

    def _draw(self, labels_B: Tensor) -> None:
        self.sample = sampling.draw(self.shard, labels_B, self.config.sample_rate, self.seed, self.step)
        self.step += 1
        self.draws += 1

    def forward(self, features_bD: Tensor, labels_b: Tensor) -> Tensor:
        """Mean loss over the global batch, equal on every rank. Every rank calls it with its own, equally many, rows.

        features_bD  float [b, D], with gradient     labels_b  int64 [b], global class ids
        Communicates 1 all-gather of B D floats, 1 of B labels, 1 all-reduce of 2 B floats; backward 1 reduce-scatter of B D floats.
        """
        features_BD = collectives.gather_rows(features_bD.float(), self.group, self.gradient_factor)
        labels_B = collectives.gather_constant(labels_b, self.group)
        scale, kernel, group = self.loss.scale, self.kernel, self.group
        if self.config.sample_rate == 1:
            first = self.shard.first
            return self.loss(
                similarity_statistics(features_BD, self.prototypes, labels_B, scale=scale, first_class=first, kernel=kernel, group=group)
            )
        if not self.is_step_begun:
            self._draw(labels_B)
        assert self.sample is not None
        statistics = similarity_statistics(
            features_BD,
            nn.functional.embedding(self.sample.rows_K, self.prototypes, sparse=True),
            self.sample.columns_of(labels_B - self.shard.first),
            scale=scale,
            column_bias_S=self._bias(self.sample),
            bias_is_bounded=True,  # at most C sample_rate classes, each weighed by at most 1 / sample_rate
            kernel=kernel,
            group=group,
        )
        return self.loss(statistics)

    def _bias(self, sample: Sample) -> Tensor:
        """0 for positives, which are always in; the correction for the others; -inf for padding."""
        correction = -math.log(self.config.sample_rate) if self.config.correct_rate else 0.0
        bias_K = torch.where(sample.is_positive_K, 0.0, correction).to(self.prototypes)
        return bias_K.masked_fill_(~sample.is_real_K, -torch.inf)

    @torch.no_grad()
    def cosines(self, features_bD: Tensor, labels_b: Tensor) -> tuple[Tensor, Tensor]:
        """(target, hardest non-target) cosine of each of the B samples of the global batch, for monitoring; costs a forward pass."""
        features_BD = collectives.gather_constant(features_bD.float(), self.group)
        labels_B = collectives.gather_constant(labels_b, self.group)
        return hardest_non_target(features_BD, self.prototypes, labels_B, first_class=self.shard.first, group=self.group)

    def extra_repr(self) -> str:
        first, stop = self.shard.first, self.shard.first + self.shard.rows
        return f"classes [{first}, {stop}) of {self.shard.num_classes}, width {self.width}, {self.loss}"
