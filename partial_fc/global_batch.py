"""The global batch as a loss sees it: what it may ask for (statistics against classes, against samples, of pairs) and what it may keep from
step to step (learned thresholds, running means). Every answer is equal on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from partial_fc import collectives
from partial_fc.bank import Bank
from partial_fc.collectives import Group
from partial_fc.columns import Columns, of_bank, of_samples
from partial_fc.kernels import Problem
from partial_fc.kernels.exact_entries import target_products
from partial_fc.maps import Map
from partial_fc.pairs import Reduction, hardest, pair_statistics
from partial_fc.prototype_sources import AllRows, SampledRows
from partial_fc.renamed import refuse
from partial_fc.shards import ClassShard
from partial_fc.similarity import Statistics, similarity_statistics
from partial_fc.statistics import LOG_SUM_EXP, SoftplusSum, Statistic, TopK
from partial_fc.unit_rows import unit_rows

RENAMED = {
    "with_classes": "against_classes(scale=..., statistic=LogSumExp(), SoftplusSum(threshold) or TopK(k))",
    "with_samples": "against_samples",
    "with_bank": "against_bank",
    "with_constant_prototypes": "with_frozen_prototypes",
    "before": "with_features",
}


@dataclass(frozen=True)
class GlobalBatch:
    """What a loss is called with."""

    features_BD: Tensor  # of all ranks, in rank order, any norm, with gradient
    labels_B: Tensor  # int64 global class ids
    step: int  # of the classifier
    shard: ClassShard  # this rank's classes
    columns: Columns  # the classes of this step
    options: Mapping[str, Any] = field(default_factory=dict)  # dtype, kernel and group of similarity_statistics
    learned: Mapping[str, Tensor] = field(default_factory=dict)  # by name, trained with the prototypes: scalars, or [S] by class
    tracked: Mapping[str, Tensor] = field(default_factory=dict)  # running figures of the loss by name; see `track`
    class_counts_S: Tensor | None = None  # images of each class of this rank, if the classifier has them
    bank: Bank | None = None  # last features, if substitution or the loss uses them
    prefix: str = ""
    trains: bool = field(default_factory=torch.is_grad_enabled)  # False for a validation loss, which leaves no trace
    uses: list[bool] = field(default_factory=list)  # one entry per use of prototypes that move in backward

    @property
    def group(self) -> Group:
        return self.options.get("group")

    @property
    def num_classes(self) -> int:
        return self.shard.num_classes

    def norms(self) -> Tensor:
        """|features| [B], with gradient: a scale for losses that do not normalise features."""
        return collectives.divide_gradient(unit_rows(self.features_BD)[1], self.group)

    def against_classes(
        self,
        *,
        scale: float | Tensor,
        statistic: Statistic = LOG_SUM_EXP,
        map: Map | None = None,
        class_bias_S: Tensor | None = None,
        bank_share_S: Tensor | None = None,
        normalize: bool = True,
    ) -> Statistics:
        """Statistics against the classes of this step: see `similarity_statistics`.

        scale         a number, or a vector [B] with gradient, complete on every rank, such as `norms`; 1 all-reduce of B floats in backward
        class_bias_S  by row of this rank's shard, with gradient: added to the logits of non-targets
        bank_share_S  by row: each unit prototype, including targets, is mixed with this share of its class's last feature
        normalize     False takes prototypes as they are"""
        if torch.is_grad_enabled() and self.columns.source.moves_in_backward:
            if self.uses:
                raise ValueError(
                    "this loss looks at prototypes twice in a step, but in_backward=True moves them at the first: use in_backward=False"
                )
            self.uses.append(True)
        columns = self.columns._replace(normalize=normalize)
        if isinstance(statistic, SoftplusSum) and columns.bias_n is not None:
            raise ValueError("correct_rate corrects log-sum-exps, which this loss does not ask for: use correct_rate=False")
        if isinstance(statistic, TopK):
            columns = columns._replace(bias_n=None)  # a bias would rank sampled classes before those of the batch
        if bank_share_S is not None:
            columns = columns.mixed(self._bank(), bank_share_S)
        if class_bias_S is not None:
            of_samples_B = None
            if columns.placement.samples is not None:
                of_samples_B = collectives.sum_gradient(self.of_labels(class_bias_S), self.group)
            columns = columns.with_bias(columns.by_column(class_bias_S, of_samples_B))
        return self._statistics(columns, scale, statistic, map)

    def _statistics(self, columns: Columns, scale: float | Tensor, statistic: Statistic, map: Map | None = None) -> Statistics:
        if isinstance(scale, Tensor):
            scale = collectives.sum_gradient(scale, self.group)
        return similarity_statistics(self.features_BD, columns, statistic, scale=scale, map=map, **self.options)

    @torch.no_grad()
    def targets(self) -> Tensor:
        """cos(x_i, w_{y_i}) [B] without gradient, for maps that need it in advance. 1 all-reduce of B floats."""
        target_B = target_products(Problem(unit_rows(self.features_BD)[0], self.columns, LOG_SUM_EXP))
        return collectives.sum_packed([target_B], self.group)[0]

    def against_samples(
        self,
        *,
        scale: float | Tensor,
        statistic: Statistic = LOG_SUM_EXP,
        one_per_identity: bool = True,
        label_bias_B: Tensor | None = None,
        normalize: bool = True,
    ) -> tuple[Statistics, Tensor]:
        """(statistics against the samples of this batch in place of prototypes; [B] whether a sample has a positive). See `of_samples` for
        targets, non-targets and label_bias_B. Gradients flow to both sides. Without a positive the target is 0 and means nothing. Each rank
        computes B / N columns; communicates what `similarity_statistics` says."""
        columns, has_positive_B = of_samples(
            self.features_BD, self.labels_B, self.group, one_per_identity=one_per_identity, label_bias_B=label_bias_B, normalize=normalize
        )
        return self._statistics(columns, scale, statistic), has_positive_B

    def _bank(self) -> Bank:
        if self.bank is None:
            raise ValueError("this loss needs the bank of last features, but the classifier was made for a loss without it: make another")
        return self.bank

    def fresh(self, staleness: int | None = None) -> Tensor:
        """bool [S]: classes of this rank whose last feature is at most `staleness` steps old; with None all that have one."""
        return self._bank().fresh(self.step, staleness)

    def against_bank(
        self, *, scale: float, statistic: Statistic = LOG_SUM_EXP, staleness: int | None = None, leaves_out_batch: bool = False
    ) -> tuple[Statistics, Tensor]:
        """(statistics against the last features of earlier steps in place of prototypes; [B] whether a sample's own class has one). All
        classes with a fresh feature count, in the sample of classes or not. The target is a sample's own class and means nothing if that
        has no feature. No gradient flows to the bank. With leaves_out_batch, classes of this batch are targets but never non-targets. 2 B S
        D operations, 2 more in backward. Communicates 1 all-reduce of B floats and what `similarity_statistics` says."""
        bank, is_fresh_S = self._bank(), self.fresh(staleness)
        pool = self.columns.source.pool
        columns = of_bank(bank, self.shard, self.labels_B, is_fresh_S, leaves_out_batch=leaves_out_batch, pool=pool)
        return self._statistics(columns, scale, statistic), self.of_labels(is_fresh_S.to(bank.features_SD.dtype)) > 0

    def with_frozen_prototypes(self) -> GlobalBatch:
        """The same batch against prototypes without gradient."""
        return replace(self, columns=self.columns.frozen())

    def with_features(self, features_nD: Tensor, labels_n: Tensor) -> GlobalBatch:
        """Other samples, the same on every rank, against the classes of this step. Classes without a column on any rank are no targets."""
        columns = self.columns._replace(targets_B=self.columns.of_labels(labels_n, self.shard))
        return replace(self, features_BD=features_nD, labels_B=labels_n, columns=columns)

    @torch.no_grad()
    def prototypes_of(self, labels_n: Tensor) -> tuple[Tensor, Tensor]:
        """(prototype of each class [n, D], without gradient; whether it takes part in this step). 1 all-reduce of n (D + 1) floats."""
        source, columns_n = self.columns.source, self.columns.of_labels(labels_n, self.shard)
        if not isinstance(source, AllRows | SampledRows):
            raise ValueError("this loss follows the movement of prototypes, some of which substitution replaces: use substitution_rate=0")
        is_here_n1 = (columns_n >= 0)[:, None]
        own_nx = self.features_BD.new_zeros(len(labels_n), source.shape[1] + 1)
        if source.shape[0]:
            own_nx[:, :-1] = source.load(columns_n.clamp(min=0)).where(is_here_n1, 0)
            own_nx[:, -1:] = is_here_n1
        (found_nx,) = collectives.sum_packed([own_nx], self.group)
        return found_nx[:, :-1], found_nx[:, -1] > 0

    def pairs(self, reduction: Reduction = hardest) -> tuple[Tensor, ...]:
        """The result of `reduction` on each sample's cosines with all samples: see `pair_statistics`."""
        return pair_statistics(self.features_BD, self.labels_B, reduction, group=self.group)

    def of_labels(self, vector_S: Tensor) -> Tensor:
        """[B]: the value of each sample's class in a vector by row of this rank's shard, with gradient. 1 all-reduce of B numbers."""
        rows_B = self.shard.rows_of(self.labels_B)
        if self.shard.rows:
            own_B = vector_S.index_select(0, rows_B.clamp(min=0)).where(rows_B >= 0, 0)
        else:  # zeros with gradient: a rank without classes must take part in backward's collectives too
            own_B = vector_S.sum().expand(len(rows_B))
        return collectives.sum_values(own_B, self.group)

    def class_counts(self) -> Tensor:
        """Images [B] of each sample's identity in the training set. 1 all-reduce of B numbers."""
        if self.class_counts_S is None:
            raise ValueError("this loss needs the number of images of each identity: give PartialFC class_counts=, int64 [num_classes]")
        return self.of_labels(self.class_counts_S)

    @torch.no_grad()
    def track(self, name: str, value: Tensor, share: float) -> Tensor:
        """Moves a running figure by `share` towards a value and returns it; not without gradient or with non-finite features, as `keep`."""
        tracked = self.tracked[self.prefix + name]
        self.keep(name, torch.lerp(tracked, value.to(tracked.dtype), share))
        return tracked.clone()

    def kept(self, name: str) -> Tensor:
        """The tensor kept under this name; do not write to it."""
        return self.tracked[self.prefix + name]

    @torch.no_grad()
    def keep(self, name: str, value: Tensor) -> None:
        """Keeps values for later steps, in a tensor of their shape. Nothing changes without gradient (a validation loss), or if features
        are not finite, because no optimizer makes that step."""
        if self.trains:
            kept = self.tracked[self.prefix + name]
            kept.copy_(torch.where(self.features_BD.isfinite().all(), value.to(kept.dtype), kept))

    @torch.no_grad()
    def start(self, name: str, values_B: Tensor) -> None:
        """Sets a learned parameter whose first value only data can tell: to the mean of those `values_B` above -inf, in the first step that
        has any; not without gradient, or if features are not finite."""
        if not self.trains:
            return
        learned, is_started = self.learned[self.prefix + name], self.tracked[f"{self.prefix}{name}_is_started"]
        is_there_B = values_B > -torch.inf
        is_now = (is_started == 0) & is_there_B.any() & self.features_BD.isfinite().all()
        value = values_B.detach().where(is_there_B, 0).sum() / is_there_B.sum().clamp(min=1)
        learned.copy_(torch.where(is_now, value.to(learned.dtype), learned))
        is_started.masked_fill_(is_now, 1)

    def parameter(self, name: str) -> Tensor:
        return self.learned[self.prefix + name]

    def part(self, name: str) -> GlobalBatch:
        """The same batch for a part of a loss, which has its own names for what it keeps."""
        return replace(self, prefix=f"{self.prefix}{name}_")

    if not TYPE_CHECKING:  # a type checker would then accept any attribute

        def __getattr__(self, name: str) -> Any:
            refuse("GlobalBatch", name, RENAMED, AttributeError)
