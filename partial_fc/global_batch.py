"""The global batch as a loss sees it: what it may ask for (statistics against classes, against samples, of pairs), and what it may keep
from step to step (learned thresholds, running means). Every answer is equal on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from partial_fc import collectives
from partial_fc.bank import Bank, mixed
from partial_fc.collectives import Group
from partial_fc.columns import Columns
from partial_fc.kernels import Question
from partial_fc.kernels.entries import Entries, unit_rows
from partial_fc.maps import Map
from partial_fc.pairs import Reduction, hardest, pair_statistics
from partial_fc.shards import ClassShard
from partial_fc.similarity import Statistics, similarity_statistics
from partial_fc.sources import Constant, Matrix, SampledRows
from partial_fc.substitution import positives_of, share_of, within


@dataclass(frozen=True)
class GlobalBatch:
    """features_BD  of all ranks, in rank order, any norm, with gradient        labels_B  int64 global class ids
    step           of the classifier
    shard          this rank's classes
    columns        what there is of them in this step
    learned        parameters of the loss by name, trained with the prototypes: scalars, or [S] for this rank's classes
    tracked        running figures of the loss by name; see `track`
    class_counts_S images of each class of this rank, if the classifier was given them
    bank           of last features, if substitution or the loss uses it
    """

    features_BD: Tensor
    labels_B: Tensor
    step: int
    shard: ClassShard
    columns: Columns
    options: Mapping[str, Any] = field(default_factory=dict)  # dtype, kernel and group of similarity_statistics
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    tracked: Mapping[str, Tensor] = field(default_factory=dict)
    class_counts_S: Tensor | None = None
    bank: Bank | None = None
    prefix: str = ""
    trains: bool = field(default_factory=torch.is_grad_enabled)  # or is a validation loss, which leaves no trace
    uses: list[bool] = field(default_factory=list)  # of prototypes that move in backward

    @property
    def group(self) -> Group:
        return self.options.get("group")

    @property
    def num_classes(self) -> int:
        return self.shard.num_classes

    def norms(self) -> Tensor:
        """|features| [B], with gradient: a scale for losses that do not normalise them."""
        return collectives.replicated(unit_rows(self.features_BD)[1], self.group)

    def with_classes(
        self,
        *,
        scale: float | Tensor,
        reduction: Literal["log_sum_exp", "softplus_sum", "top_k"] = "log_sum_exp",
        k: int = 1,
        threshold: Tensor | None = None,
        map: Map | None = None,
        map_parameter_B: Tensor | None = None,
        class_bias_S: Tensor | None = None,
        bank_share_S: Tensor | None = None,
        **others: Any,
    ) -> Statistics:
        """Statistics against the classes of this step: see `similarity_statistics`, which has these options and more.

        scale         a number, or a vector [B] with gradient, complete on every rank, as `norms` is; backward then 1 all-reduce of B floats
        class_bias_S  by row of this rank's shard, with gradient: added to logits of non-targets
        bank_share_S  by row: each unit prototype, of targets too, is mixed with this share of its class's last feature
        """
        if isinstance(scale, Tensor):
            scale = collectives.shared(scale, self.group)
        if torch.is_grad_enabled() and self.columns.source.is_consumed:
            if self.uses:
                raise ValueError(
                    "this loss looks at prototypes twice in a step, of which in_backward=True moves them at once: use in_backward=False"
                )
            self.uses.append(True)
        columns = self.columns
        bias_n = None if reduction == "top_k" else columns.bias_n  # of logits: it would rank sampled classes before those of the batch
        if bank_share_S is not None:
            columns = mixed(columns, self._bank(), bank_share_S)
        if class_bias_S is not None:
            class_bias_n = class_bias_S if columns.rows_n is None else class_bias_S.index_select(0, columns.rows_n)
            if columns.samples is not None:
                class_bias_n = torch.cat([class_bias_n, collectives.shared(self.of_labels(class_bias_S), self.group)[columns.samples]])
            bias_n = class_bias_n if bias_n is None else bias_n + class_bias_n
        return similarity_statistics(
            self.features_BD,
            columns.source,
            self.labels_B,
            scale=scale,
            reduction=reduction,
            k=k,
            threshold=threshold,
            map=map,
            map_parameter_B=map_parameter_B,
            column_bias_S=bias_n,
            bias_is_bounded=class_bias_S is None,  # the correction of the sample rate alone
            included_S=columns.included_n,
            first_class=columns.first_class,
            classes_S=columns.classes_n,
            target_columns_B=columns.target_columns_B,
            masked_columns_B=columns.masked_columns_B,
            **{**self.options, **others},
        )

    @torch.no_grad()
    def targets(self) -> Tensor:
        """cos(x_i, w_{y_i}) [B] without gradient, for maps that need it before they look at the others. 1 all-reduce of B floats."""
        question = Question(unit_rows(self.features_BD)[0], self.columns.target_columns_B)
        target_B = torch.zeros_like(question.queries_BD[:, 0])
        if self.columns.source.shape[0]:
            target_B = Entries.of(question, self.columns.source, self.columns.target_columns_B).product_B
        return collectives.sum_packed([target_B], self.group)[0]

    def with_samples(
        self,
        *,
        scale: float | Tensor,
        reduction: Literal["log_sum_exp", "softplus_sum", "top_k"] = "log_sum_exp",
        one_per_identity: bool = True,
        label_bias_B: Tensor | None = None,
        **others: Any,
    ) -> tuple[Statistics, Tensor]:
        """Statistics against the samples of this batch in place of prototypes, and whether a sample has a positive [B]: the target is
        another sample of the identity (see `positives_of`), non-targets are one sample of every other identity of the batch, or all of
        them. Gradients flow to both sides. A sample never meets itself; where it has no positive, the target is 0 and means nothing.

        label_bias_B  added to the logits of non-targets, by sample that is one

        Each rank computes B / N columns. Communicates what `similarity_statistics` says.
        """
        if isinstance(scale, Tensor):
            scale = collectives.shared(scale, self.group)
        positives, mine = positives_of(self.labels_B), share_of(len(self.labels_B), self.group)
        statistics = similarity_statistics(
            self.features_BD,
            Matrix(self.features_BD[mine]),
            self.labels_B,
            scale=scale,
            reduction=reduction,
            target_columns_B=within(positives.rows_B, mine, positives.is_there_B),
            masked_columns_B=within(positives.first_B, mine),
            included_S=positives.is_first_B[mine] if one_per_identity else None,
            column_labels_S=None if one_per_identity else self.labels_B[mine],
            classes_S=self.labels_B[mine],
            column_bias_S=None if label_bias_B is None else collectives.shared(label_bias_B, self.group)[mine],
            **{**self.options, **others},
        )
        return statistics, positives.is_there_B

    def _bank(self) -> Bank:
        if self.bank is None:
            raise ValueError("this loss needs the bank of last features, but the classifier was made for a loss without it: make another")
        return self.bank

    def fresh(self, staleness: int | None = None) -> Tensor:
        """bool [S]: the classes of this rank whose last feature is at most so many steps old; with None all that have one."""
        return self._bank().fresh(self.step, staleness)

    def with_bank(
        self,
        *,
        scale: float,
        reduction: Literal["log_sum_exp", "softplus_sum", "top_k"] = "log_sum_exp",
        staleness: int | None = None,
        leaves_out_batch: bool = False,
        **others: Any,
    ) -> tuple[Statistics, Tensor]:
        """Statistics against the last features of earlier steps, without gradient to them, in place of prototypes; of all classes whose
        feature is fresh, in the sample of classes or not. And whether there is one of a sample's own class [B], its target, which means
        nothing where there is none.

        leaves_out_batch  classes of this batch are targets, but nobody's non-targets

        2 B S D operations, in backward 2 more. Communicates 1 all-reduce of B floats and what `similarity_statistics` says.
        """
        features_SD, is_fresh_S = self._bank().features_SD, self.fresh(staleness)
        rows_B = self.shard.rows_of(self.labels_B)
        included_S = is_fresh_S
        if leaves_out_batch:
            in_batch_S = torch.zeros(self.shard.rows + 1, dtype=torch.bool, device=rows_B.device)
            in_batch_S[rows_B.where(rows_B >= 0, self.shard.rows)] = True  # the last one takes what is not here
            included_S = is_fresh_S & ~in_batch_S[:-1]
        statistics = similarity_statistics(
            self.features_BD,
            Matrix(features_SD, memory=self.columns.source.memory),
            self.labels_B,
            scale=scale,
            reduction=reduction,
            first_class=self.shard.first,
            target_columns_B=rows_B,
            included_S=included_S,
            **{**self.options, **others},
        )
        return statistics, self.of_labels(is_fresh_S.to(features_SD.dtype)) > 0

    def with_constant_prototypes(self) -> GlobalBatch:
        """The same batch before prototypes to which nothing flows."""
        return replace(self, columns=self.columns._replace(source=Constant(self.columns.source)))

    def before(self, features_nD: Tensor, labels_n: Tensor) -> GlobalBatch:
        """Other samples before the classes of this step, the same on every rank. Samples whose class has no column on any rank have no
        target."""
        columns_n = self.columns.of_labels(labels_n, self.shard)
        return replace(self, features_BD=features_nD, labels_B=labels_n, columns=self.columns._replace(target_columns_B=columns_n))

    @torch.no_grad()
    def prototypes_of(self, labels_n: Tensor) -> tuple[Tensor, Tensor]:
        """(prototype of each class [n, D], without gradient; whether it takes part in this step). 1 all-reduce of n (D + 1) floats."""
        source, columns_n = self.columns.source, self.columns.of_labels(labels_n, self.shard)
        if not isinstance(source, Matrix | SampledRows):
            raise ValueError("this loss follows the movement of prototypes, some of which substitution replaces: use substitution_rate=0")
        is_here_n1 = (columns_n >= 0)[:, None]
        own_nx = self.features_BD.new_zeros(len(labels_n), source.shape[1] + 1)
        if source.shape[0]:
            own_nx[:, :-1] = source.load(columns_n.clamp(min=0)).where(is_here_n1, 0)
            own_nx[:, -1:] = is_here_n1
        (found_nx,) = collectives.sum_packed([own_nx], self.group)
        return found_nx[:, :-1], found_nx[:, -1] > 0

    def pairs(self, reduction: Reduction = hardest) -> tuple[Tensor, ...]:
        """What `reduction` makes of each sample's cosines with all samples: see `pair_statistics`."""
        return pair_statistics(self.features_BD, self.labels_B, reduction, group=self.group)

    def of_labels(self, vector_S: Tensor) -> Tensor:
        """[B]: what belongs to each sample's class, of a vector by row of this rank's shard, with gradient. 1 all-reduce of B numbers."""
        rows_B = self.labels_B - self.shard.first
        own_B = vector_S.new_zeros(len(rows_B))
        if self.shard.rows:
            is_here_B = (rows_B >= 0) & (rows_B < self.shard.rows)
            own_B = vector_S.index_select(0, rows_B.clamp(0, self.shard.rows - 1)).where(is_here_B, 0)
        return collectives.summed(own_B, self.group)

    def class_counts(self) -> Tensor:
        """Images [B] of each sample's identity in the training set. 1 all-reduce of B numbers."""
        if self.class_counts_S is None:
            raise ValueError("this loss needs the number of images of each identity: give PartialFC class_counts=, int64 [num_classes]")
        return self.of_labels(self.class_counts_S)

    @torch.no_grad()
    def track(self, name: str, value: Tensor, share: float) -> Tensor:
        """Moves a running figure this share of the way to a value, and returns it; without gradient (a validation loss), or where features
        are not finite, it stays."""
        tracked = self.tracked[self.prefix + name]
        self.keep(name, torch.lerp(tracked, value.to(tracked.dtype), share))
        return tracked.clone()

    def kept(self, name: str) -> Tensor:
        """What was kept under this name; not to be written to."""
        return self.tracked[self.prefix + name]

    @torch.no_grad()
    def keep(self, name: str, value: Tensor) -> None:
        """Keeps values for later steps, in a tensor of their shape; without gradient (a validation loss), or where features are not
        finite, in a step that nobody makes, nothing changes."""
        if self.trains:
            kept = self.tracked[self.prefix + name]
            kept.copy_(torch.where(self.features_BD.isfinite().all(), value.to(kept.dtype), kept))

    @torch.no_grad()
    def start(self, name: str, values_B: Tensor) -> None:
        """Gives a learned parameter its first value, where only data can tell it: the mean of `values_B`, of those above -inf, in the first
        step that has any; not without gradient, or where features are not finite."""
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
        """The same batch for a loss that is a part of another, with names of its own for what it keeps."""
        return replace(self, prefix=f"{self.prefix}{name}_")
