"""PartialFC: the model-parallel classifier. Each rank holds the prototypes of its own classes; the loss is the global batch's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from partial_fc import bank, collectives, columns, sampling
from partial_fc.bank import Bank
from partial_fc.collectives import Group
from partial_fc.columns import Columns
from partial_fc.config import ClassifierConfig
from partial_fc.global_batch import GlobalBatch
from partial_fc.inputs import Check, check_labels, check_shapes
from partial_fc.losses import Loss
from partial_fc.memory import Memory
from partial_fc.sampling import Sample
from partial_fc.shards import ClassShard, initial_prototypes
from partial_fc.similarity import DTYPES, hardest_non_target
from partial_fc.sources import Consumer, Matrix
from partial_fc.substitution import substitute, substitute_from_bank

__all__ = ["ClassifierConfig", "PartialFC"]

MOST_CHECKS = 64  # kept unread, if no optimizer asks for them; as many batches for the bank


class PartialFC(nn.Module):
    """Prototype matrix [num_classes, width] sharded by rows over the ranks of `group`, with a loss on top.

    num_classes        identities of the whole job
    width              features per sample, D
    loss               from `losses.build`; may be replaced between steps by one of its kind (margin warm-up). What it learns are
                       parameters in `learned`, what it tracks buffers `tracked_...`: equal on every rank, but for numbers per class
    sample_rate        below 1: a step sees all classes of its batch and each other class with this probability; `prototypes.grad` is then
                       a sparse tensor of the sampled rows, which RowSGD alone updates
    dtype, storage_dtype, correct_rate, hard_negatives, non_finite, gather_dtype, substitution_...  see ClassifierConfig
    uneven_batches     ranks may bring different numbers of rows, none included, in any step; costs one more all-gather, of one number per
                       rank, for which the host waits. Without it every rank must bring equally many rows
    seed               of first prototypes and samples, which depend on the class id (and step) alone and not on the number of ranks
    group              process group; without an initialised one this is an ordinary single-process module
    kernel             "auto" or a name in similarity.KERNELS; see similarity_statistics
    class_counts       int64 [num_classes], images of each identity in the training set, for losses that ask for them
    feature_gradient   "averaged": multiplied by the world size, because a data-parallel engine (DDP, DeepSpeed) then averages over
                       ranks; "global": the gradient of the returned loss itself. Nowhere else does this factor appear.

    `prototypes` is this rank's [S, D] parameter, kept out of the data-parallel engine (which would average it over ranks). Ranks beyond
    the number of classes have none. `bank_features` and `bank_steps`, buffers [S, D] and [S], are there if substitution or the loss uses
    the bank of last features: see bank.py.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        loss: Loss,
        sample_rate: float = 1.0,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        storage_dtype: Literal["float32", "bfloat16"] = "float32",
        correct_rate: bool = False,
        hard_negatives: int = 0,
        non_finite: Literal["raise", "skip"] = "raise",
        substitution_rate: float = 0.0,
        substitution_source: Literal["batch", "bank"] = "batch",
        substitution_staleness: int = 200,
        uneven_batches: bool = False,
        gather_dtype: Literal["float32", "bfloat16"] = "float32",
        seed: int = 0,
        group: Group = None,
        kernel: str = "auto",
        feature_gradient: Literal["averaged", "global"] = "averaged",
        class_counts: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if feature_gradient not in ("averaged", "global"):
            raise ValueError(f"feature_gradient is {feature_gradient!r}, but must be 'averaged' or 'global'")
        ranks = collectives.world_size(group)
        self.shard = ClassShard.of_rank(num_classes, collectives.rank(group), ranks)
        self.config = ClassifierConfig(
            sample_rate=sample_rate,
            correct_rate=correct_rate,
            hard_negatives=hard_negatives,
            dtype=dtype,
            storage_dtype=storage_dtype,
            gather_dtype=gather_dtype,
            substitution_rate=substitution_rate,
            substitution_source=substitution_source,
            substitution_staleness=substitution_staleness,
            non_finite=non_finite,
        )
        self.width, self.loss, self.seed, self.group, self.uneven_batches = width, loss, seed, group, uneven_batches
        self.step = 0  # counts samples, or at rate 1 the optimizer's steps; a caller who resumes sets it
        self.sample: Sample | None = None  # of the newest step
        self.is_step_begun = False
        self.step_labels_B: Tensor | None = None  # what `begin_step` was given, of all ranks
        self.draws = 0  # samples since the optimizer's last step
        self.before_use: Callable[[Tensor], None] | None = None  # called with the rows of a new sample: a lazy optimizer's
        self.consumer: Consumer | None = None  # takes the gradient of prototypes chunk by chunk during backward
        self.skipped_steps = 0
        self._checks: list[Check] = []  # of this step, not yet read
        self._is_finite = True  # as far as they are
        self.kernel = kernel
        self.memory = Memory()
        self.gradient_factor = float(ranks) if feature_gradient == "averaged" else 1.0
        self.prototypes = nn.Parameter(initial_prototypes(self.shard, width, seed).to(device, DTYPES[storage_dtype]))
        # What the loss learns and tracks; of a loss put in its place later, the same.
        scalars = {name: torch.tensor(value, device=device) for name, value in loss.learned(num_classes).items()}
        vectors = {name: torch.full((self.shard.rows,), value, device=device) for name, value in loss.learned_by_class(num_classes).items()}
        self.learned = nn.ParameterDict({name: nn.Parameter(value.float()) for name, value in (scalars | vectors).items()})
        self.tracked_names = [*loss.tracked(), *loss.queued()]
        for name, value in loss.tracked().items():
            first = value.clone() if isinstance(value, Tensor) else torch.tensor(float(value))
            self.register_buffer(f"tracked_{name}", first.to(device))
        for name, rows in loss.queued().items():
            self.register_buffer(f"tracked_{name}", torch.zeros(rows, width, device=device))
        self.has_bank = loss.uses_bank() or (self.config.substitution_rate > 0 and substitution_source == "bank")
        if self.has_bank:
            first_bank = bank.empty(self.shard.rows, width, self.prototypes.device)
            self.register_buffer("bank_features", first_bank.features_SD)
            self.register_buffer("bank_steps", first_bank.steps_S)
        self._brought: deque[tuple[Tensor, Tensor, int]] = deque(maxlen=MOST_CHECKS)  # by this step's batches, for the bank
        self.class_counts_S = None if class_counts is None else self._counts_of_shard(class_counts)

    def _counts_of_shard(self, class_counts: Tensor) -> Tensor:
        if class_counts.shape != (self.shard.num_classes,):
            raise ValueError(f"class_counts has shape {tuple(class_counts.shape)}, but must be [{self.shard.num_classes}], one per class")
        mine = slice(self.shard.first, self.shard.first + self.shard.rows)
        return class_counts[mine].to(self.prototypes.device, torch.float32)

    def begin_step(self, labels_b: Tensor) -> None:
        """Opens a step of several micro-batches, whose labels on this rank are `labels_b`: all of them see one sample of classes. The
        optimizer's `step` closes it. Without it every call of `forward` is a step of its own.

        If classes are sampled, communicates 1 all-gather of the labels (8 bytes each), with uneven_batches 1 of N counts before it, and
        what `sampling.nearest` says."""
        check_labels(labels_b)
        if self.config.sample_rate < 1:
            self.step_labels_B = collectives.gather_constant(labels_b, self.group, self._counts(labels_b))
            self._draw(self.step_labels_B)
            self.is_step_begun = True

    def end_step(self) -> None:
        """What the optimizer does after its update: the step's features go into the bank, if there is one and they are finite, and the
        next call of `forward` or `begin_step` is a new step. Call it yourself if the prototypes' optimizer is neither RowSGD nor
        RowAdamW."""
        brought, self._brought = self._brought, deque(maxlen=MOST_CHECKS)
        if self.is_finite() and (kept := self.bank) is not None:
            for features_BD, labels_B, step in brought:  # in order: of several micro-batches the last one's feature stays
                kept.write(features_BD, labels_B, self.shard.first, step)
        self.step += self.config.sample_rate == 1
        self.is_step_begun, self.step_labels_B, self.draws, self._is_finite = False, None, 0, True

    @property
    def bank(self) -> Bank | None:
        return Bank(self.get_buffer("bank_features"), self.get_buffer("bank_steps")) if self.has_bank else None

    def is_finite(self) -> bool:
        """Whether an optimizer may use this step; on False no optimizer must, the backbone's included. The same on every rank.

        Waits until the device has checked this step's input, which it does before the first product: call it after `backward`, which
        keeps the device busy meanwhile. Raises ValueError for a label that is no class and, with non_finite="raise", for NaN or infinity
        in features; with "skip" these make the step False. A step is bad if one of its micro-batches is. On CPU `forward` raises already.
        """
        checks, self._checks = self._checks, []
        for check in checks:
            if not self._judge(check) and self._is_finite:
                self._is_finite = False
                self.skipped_steps += 1
        return self._is_finite

    def _judge(self, check: Check) -> bool:
        labels, features = check.faults()
        if labels or (features and self.config.non_finite == "raise"):
            self._is_finite = False  # for whoever goes on
            raise ValueError(labels or features)
        return not features

    def _check(self, features_BD: Tensor, labels_B: Tensor, counts: list[int]) -> None:
        step = self.step - self.is_step_begun  # `begin_step` has counted it already
        check = Check(features_BD, labels_B, self.shard.num_classes, counts, step, self.step_labels_B)
        if not torch.is_grad_enabled():
            self._judge(check)  # no optimizer will ask
            return
        self._checks.append(check)
        if check.is_ready or len(self._checks) == MOST_CHECKS:
            self.is_finite()

    def _counts(self, rows_b: Tensor) -> list[int]:
        """Rows of each rank."""
        if self.uneven_batches:
            counts = collectives.gather_counts(len(rows_b), rows_b.device, self.group)
        else:
            counts = [len(rows_b)] * collectives.world_size(self.group)
        if not any(counts):
            raise ValueError("the batch is empty on every rank: a step needs at least one sample")
        return counts

    def _draw(self, labels_B: Tensor) -> Sample:
        """A new sample for this step; without gradient (a validation loss) one that leaves no trace."""
        k, certain_n = self.config.hard_negatives, labels_B
        if k:
            options = {"dtype": self.config.dtype, "kernel": self.kernel, "group": self.group}
            nearest_n = sampling.nearest(self.shard, Matrix(self.prototypes, memory=self.memory), labels_B, k, **options)
            certain_n = torch.cat([labels_B, nearest_n])
        sample = sampling.draw(self.shard, certain_n, self.config.sample_rate, self.seed, self.step)
        if torch.is_grad_enabled():
            self.sample = sample
            self.step += 1
            self.draws += 1
            if self.before_use is not None:
                self.before_use(sample.rows_K)
        return sample

    def forward(self, features_bD: Tensor, labels_b: Tensor) -> Tensor:
        """Mean loss over the global batch, equal on every rank. Every rank calls it with its own rows, equally many unless uneven_batches.

        features_bD  float [b, D], with gradient     labels_b  int64 [b], global class ids
        Communicates 1 all-gather of B D floats (2 or 4 bytes each: gather_dtype), 1 of B labels (8 bytes) and what the loss asks
        for (see GlobalBatch);
        backward 1 reduce-scatter of B D floats of 4 bytes. uneven_batches: 1 all-gather of N counts (8 bytes) before them, and rows
        travel padded to the largest local batch m: N m rows instead of B.
        NaN or infinity, and labels that are no class, end in a ValueError or a skipped step: see `is_finite`.
        """
        check_shapes(features_bD, labels_b, self.width)
        counts = self._counts(labels_b)
        gather_dtype = torch.bfloat16 if self.config.gather_dtype == "bfloat16" else None
        if self.uneven_batches and torch.is_grad_enabled() and not features_bD.requires_grad:
            features_bD = features_bD.detach().requires_grad_()  # a rank without rows has a part in the reduce-scatter too
        features_bD = features_bD.to(torch.promote_types(self.prototypes.dtype, torch.float32))
        features_BD = collectives.gather_rows(features_bD, self.group, self.gradient_factor, counts, gather_dtype)
        labels_B = collectives.gather_constant(labels_b, self.group, counts)
        self._check(features_BD, labels_B, counts)
        return self.loss(self.global_batch(features_BD, labels_B))

    def global_batch(self, features_BD: Tensor, labels_B: Tensor) -> GlobalBatch:
        """What a loss sees; draws the step's sample of classes, unless `begin_step` has."""
        step = self.step - self.is_step_begun  # `begin_step` has counted it already
        if self.has_bank and torch.is_grad_enabled():
            self._brought.append((features_BD.detach(), labels_B, step))
        return GlobalBatch(
            features_BD,
            labels_B,
            step,
            self.shard,
            self._columns(features_BD, labels_B, step),
            {"dtype": self.config.dtype, "kernel": self.kernel, "group": self.group},
            dict(self.learned.items()),
            {name: self.get_buffer(f"tracked_{name}") for name in self.tracked_names},
            self.class_counts_S,
            self.bank,
        )

    def _columns(self, features_BD: Tensor, labels_B: Tensor, step: int) -> Columns:
        """Classes of the step; some prototypes may be replaced by features."""
        found, rate = self._of_step(labels_B), self.config.substitution_rate
        if not rate:
            return found
        if self.config.substitution_source == "bank":
            assert self.bank is not None
            return substitute_from_bank(found, self.bank, self.config.substitution_staleness, rate, self.seed, step)
        return substitute(found, features_BD, labels_B, rate, self.seed, step, self.group)

    def _of_step(self, labels_B: Tensor) -> Columns:
        if self.config.sample_rate == 1:
            return columns.of_all(self.shard, self.prototypes, labels_B, self.consumer, self.memory)
        sample = self.sample if self.is_step_begun else self._draw(labels_B)
        assert sample is not None
        rate = self.config.sample_rate if self.config.correct_rate else None
        return columns.of_sample(self.shard, self.prototypes, labels_B, sample, rate, self.consumer, self.memory)

    @torch.no_grad()
    def cosines(self, features_bD: Tensor, labels_b: Tensor) -> tuple[Tensor, Tensor]:
        """(target, hardest non-target) cosine of each of the B samples of the global batch, for monitoring; costs a forward pass.

        Communicates 1 all-gather of B D floats, 1 of B labels and 1 of 4 N B floats; uneven_batches as in `forward`. Values are not
        checked: of a row with NaN or a label that is no class the cosines mean nothing."""
        check_shapes(features_bD, labels_b, self.width)
        counts = self._counts(labels_b)
        features_BD = collectives.gather_constant(features_bD.float(), self.group, counts)
        labels_B = collectives.gather_constant(labels_b, self.group, counts)
        return hardest_non_target(features_BD, self.prototypes, labels_B, first_class=self.shard.first, group=self.group)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no optimizer, and its bank gets what it is brought itself."""
        return {**self.__dict__, "before_use": None, "consumer": None, "_brought": deque(maxlen=MOST_CHECKS)}

    def extra_repr(self) -> str:
        first, stop = self.shard.first, self.shard.first + self.shard.rows
        return f"classes [{first}, {stop}) of {self.shard.num_classes}, width {self.width}, {self.loss}"
