"""PartialFC: the model-parallel classifier. Each rank holds the prototypes of its own classes; the loss is the global batch's."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from partial_fc import bank, collectives, place, sampling
from partial_fc.bank import Bank
from partial_fc.batch_check import BatchCheck, LossCheck, NonFiniteError, RanksCheck, check_labels, check_shapes
from partial_fc.buffer_pool import BufferPool
from partial_fc.collectives import Group, SharedGroup
from partial_fc.columns import Columns, of_classes, of_sampled
from partial_fc.config import ClassifierConfig
from partial_fc.fields import hint_at
from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, build, kept_by
from partial_fc.prototype_sources import AllRows, Companion, Consumer
from partial_fc.sampling import ClassSample
from partial_fc.shards import ClassShard, initial_prototypes
from partial_fc.similarity import DTYPES, nearest_classes, similarity_statistics
from partial_fc.statistics import TopK
from partial_fc.step import MOST_CHECKS, Step
from partial_fc.substitution import substitute, substitute_from_bank

__all__ = ["ClassifierConfig", "PartialFC"]

# Keeps torch.compile out. torch.compiler.disable would import Dynamo together with this file, which takes a second and brings
# torch.distributed.nn: if that is imported before there is a process group, destroying the group may hang while DDP lives (torch 2.13).
eager = getattr(torch, "_disable_dynamo", torch.compiler.disable)


class PartialFC(nn.Module):
    """Prototype matrix [num_classes, width], sharded by rows over the ranks of `group`, with a loss on top.

    num_classes       identities of the whole job
    width             features per sample, D
    loss              from `losses.build`, or a name for its defaults; may be replaced between steps by one that learns and keeps the same
                      (margin warm-up). What it learns are parameters in `learned`, what it tracks buffers `tracked_...`; all of these but
                      numbers per class are equal on every rank
    sample_rate       below 1, a step sees all classes of its batch and each other class with this probability; `prototypes.grad` is then a
                      sparse tensor of sampled rows and of padding (of value 0), which only RowSGD and RowAdamW update
    options           fields of ClassifierConfig, such as dtype, storage_dtype, correct_rate, hard_negatives and substitution_rate
    uneven_batches    lets ranks bring different numbers of rows, including none, in any step; the host then waits for these numbers. By
                      default every rank must bring the same number of rows, or as many as the argument `counts` of a call says
    seed              of initial prototypes and samples, which depend only on the class id (and step), not on the number of ranks
    group             process group; without an initialised one this is an ordinary single-process module
    kernel            "auto" or a name in similarity.KERNELS; see similarity_statistics
    class_counts      int64 [num_classes], images of each identity in the training set, for losses that need them, and for smaller samples:
                      batches must then be drawn at random, so that no rank has many more of the labels than of the images
    feature_gradient  "averaged": multiplied by the world size, because a data-parallel engine (DDP, DeepSpeed) then averages over ranks;
                      "global": the gradient of the returned loss. This factor appears nowhere else

    `prototypes` is this rank's [S, D] parameter; keep it out of the data-parallel engine, which would average it over ranks. Ranks beyond
    the number of classes have no rows. Buffers `bank_features` [S, D] and `bank_steps` [S] exist if substitution or the loss uses them."""

    def __init__(
        self,
        num_classes: int,
        width: int,
        loss: Loss | str,
        sample_rate: float = 1.0,
        *,
        uneven_batches: bool = False,
        seed: int = 0,
        group: Group = None,
        kernel: str = "auto",
        feature_gradient: Literal["averaged", "global"] = "averaged",
        class_counts: Tensor | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        """See the class. ValueError or TypeError, with a sentence, for an option that does not exist or does not go with the others."""
        super().__init__()
        if feature_gradient not in ("averaged", "global"):
            raise ValueError(f"feature_gradient is {feature_gradient!r}, but must be 'averaged' or 'global'")
        self.made = collectives.rank(group), collectives.world_size(group)
        if self.made[0] < 0:
            raise ValueError("this rank is not in the group of the classifier: make it on the ranks of the group only")
        self.shard = ClassShard.of_rank(num_classes, *self.made)
        for name in options.keys() - ClassifierConfig.__dataclass_fields__.keys():
            raise TypeError(f"PartialFC has no option {name!r}: {hint_at(name, ClassifierConfig.__dataclass_fields__)}")
        # Somebody's own loop may not ask `is_finite` before it moves the backbone, as the trainer does.
        self.config = ClassifierConfig(sample_rate=sample_rate, **{"non_finite": "raise", **options})
        device = torch.get_default_device() if device is None else device
        self.width, self.seed, self.uneven_batches = width, seed, uneven_batches
        self.loss = loss = build(loss) if isinstance(loss, str) else loss
        self.shared_group = SharedGroup(group)
        self.rows_before = -1  # that this rank brought to the last step
        self.current = Step()
        self.skipped_steps = 0
        self.companion: Companion | None = None  # a RowOptimizer
        self.consumer: Consumer | None = None  # takes the gradient of prototypes chunk by chunk during backward
        self.kernel = kernel
        self.pool = BufferPool()
        self.gradient_factor = float(self.made[1]) if feature_gradient == "averaged" else 1.0
        self.prototypes = nn.Parameter(initial_prototypes(self.shard, width, seed).to(device, DTYPES[self.config.storage_dtype]))
        # What the loss learns and tracks; a loss put in its place later uses the same.
        wide: dict[str, Any] = {"dtype": torch.float32, "device": device}
        scalars = {name: torch.tensor(value, **wide) for name, value in loss.learned(num_classes).items()}
        vectors = {name: torch.full((self.shard.rows,), value, **wide) for name, value in loss.learned_by_class(num_classes).items()}
        self.learned = nn.ParameterDict({name: nn.Parameter(value) for name, value in (scalars | vectors).items()})
        self.tracked_names = [*loss.tracked(), *loss.queued()]
        for name, value in loss.tracked().items():
            first = value.clone() if isinstance(value, Tensor) else torch.tensor(float(value), **wide)
            self.register_buffer(f"tracked_{name}", first.to(device))
        for name, rows in loss.queued().items():
            self.register_buffer(f"tracked_{name}", torch.zeros(rows, width, **wide))
        self.has_bank = loss.uses_bank() or (self.config.substitution_rate > 0 and self.config.substitution_source == "bank")
        if self.has_bank:
            first_bank = bank.empty(self.shard.rows, width, self.prototypes.device)
            self.register_buffer("bank_features", first_bank.features_SD)
            self.register_buffer("bank_steps", first_bank.steps_S)
        self.count_images(class_counts)

    def count_images(self, class_counts: Tensor | None) -> None:
        """Takes over the images of each identity, int64 [num_classes]; None where they are unknown."""
        self.register_buffer("class_counts_S", None, persistent=False)
        self.label_share = 1.0  # the share of labels that can be this rank's
        if class_counts is None:
            return
        class_counts = torch.as_tensor(class_counts)
        if class_counts.shape != (self.shard.num_classes,):
            raise ValueError(f"class_counts has shape {tuple(class_counts.shape)}, but must be [{self.shard.num_classes}], one per class")
        mine = slice(self.shard.first, self.shard.first + self.shard.rows)
        self.class_counts_S = class_counts[mine].to(self.prototypes.device, torch.float32)
        if not self.config.hard_negatives:  # labels are drawn by image or by identity, hard negatives by neither
            of_images = float(class_counts[mine].sum()) / max(1.0, float(class_counts.sum()))
            self.label_share = max(of_images, self.shard.rows / self.shard.num_classes)

    @property
    def group(self) -> Group:
        return self.shared_group.group

    @property
    def loss(self) -> Loss:
        return self._loss

    @loss.setter
    def loss(self, loss: Loss) -> None:
        before = getattr(self, "_loss", loss)
        if kept_by(loss) != kept_by(before):
            raise ValueError(
                f"{type(loss).__name__} cannot take the place of {type(before).__name__}, because it learns or keeps other numbers from "
                "step to step: make another classifier"
            )
        self._loss = loss

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss":  # which torch would register, if it is a module
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def step(self) -> int:
        """Number of samples of classes, or at rate 1 of optimizer steps; a part of `state_dict`."""
        return self.current.next_draw

    @step.setter
    def step(self, number: int) -> None:
        self.current.first = number - self.current.draws

    @property
    def sample(self) -> ClassSample | None:
        """The classes of the newest step; None at rate 1."""
        return self.current.sample

    @eager
    def begin_step(self, labels_b: Tensor, counts: Sequence[int] | None = None) -> None:
        """Opens a step of several micro-batches, which all see one sample of classes; `labels_b` and `counts` are of all of them. The
        optimizer's `step` closes it. Without this call every `forward` is a step of its own. Communicates, if classes are sampled, 1
        all-gather of 2 N numbers and 1 of the labels (8 bytes each), and with hard_negatives what `nearest_classes` says."""
        check_labels(labels_b)
        self._check_shard()
        if self.config.sample_rate < 1:
            labels_B = collectives.gather_constant(labels_b, self.group, self._counts(labels_b, counts))
            with torch.enable_grad():  # a step for training, wherever it is opened
                self._draw(labels_B)
            self.current.labels_B, self.current.is_begun = labels_B, True

    @eager
    def end_step(self) -> None:
        """Ends a step after the optimizer's update: its features go into the bank, if there is one and they are finite, and the next call
        of `forward` or `begin_step` starts a new step. Call it yourself if the prototypes' optimizer is neither RowSGD nor RowAdamW."""
        if self.is_finite() and (kept := self.bank) is not None:
            for features_BD, labels_B, step in self.current.brought:  # in order: the feature of the last micro-batch stays
                kept.write(features_BD, labels_B, self.shard.first, step)
        self.current = self.current.next(self.config.sample_rate < 1)

    @property
    def bank(self) -> Bank | None:
        return Bank(self.get_buffer("bank_features"), self.get_buffer("bank_steps")) if self.has_bank else None

    def is_finite(self) -> bool:
        """Whether optimizers, including that of the backbone, may use this step; the same on every rank. Waits until the device has checked
        the step's features and its loss: call it after `backward`, which keeps the device busy meanwhile. Raises ValueError for a label
        that is not a class and, with non_finite="raise", for NaN or infinity in features or loss; with "skip" these make the step False. A
        step is bad if one of its micro-batches is bad. On CPU `forward` already raises."""
        checks, self.current.checks = self.current.checks, []
        for check in checks:
            if not self._judge(check):
                self.leave_out()
        return self.current.is_finite

    def leave_out(self) -> None:
        """Makes this step a bad one (`is_finite`), on every rank. ValueError if in_backward=True has used the gradient already."""
        if self.current.is_finite:
            self.current.is_finite = False
            self.skipped_steps += 1
        if self.companion is not None and self.companion.has_moved:
            raise ValueError(
                f"step {self.current.first} is to be left out, but in_backward=True has moved prototypes by it: go back to a "
                "checkpoint, and set in_backward=False if it happens again"
            )

    def _judge(self, check: BatchCheck | LossCheck | RanksCheck) -> bool:
        labels, features = check.faults()
        if labels or (features and self.config.non_finite == "raise"):
            self.current.is_finite = False  # if the caller goes on
            raise ValueError(labels) if labels else NonFiniteError(features)
        return not features

    def _check(self, kind: type[BatchCheck] | type[LossCheck], *of: Any) -> None:
        if kind is LossCheck and not torch.is_grad_enabled():
            return
        check = kind(*of)
        if not torch.is_grad_enabled():
            self._judge(check)  # no optimizer will
            return
        self.current.checks.append(check)
        if check.is_ready or len(self.current.checks) >= 2 * MOST_CHECKS:  # of features and loss
            self.is_finite()

    def _check_shard(self) -> None:
        place.check_place(self.made, self.group)
        place.check_whole(self.prototypes, (self.shard.rows, self.width))

    def _counts(self, rows_b: Tensor, told: Sequence[int] | None) -> list[int]:
        """Rows of each rank, which are `told` or equal. Where they are neither, with uneven_batches, the host waits for them; else a rank
        whose own number has changed does, and so knows of others before the gathering that would hang."""
        rank, ranks = self.made
        if told is not None and len(told) != ranks:
            raise ValueError(f"counts has {len(told)} numbers, but must have one for each of {ranks} ranks: how many rows it brings")
        counts = [len(rows_b)] * ranks if told is None else list(told)
        if ranks > 1:
            waits = self.uneven_batches and told is None
            mark = place.mark_of(self.prototypes, rank)
            told_2 = torch.cat([torch.full_like(mark, len(rows_b)), mark])
            told_N2 = collectives.gather_constant(told_2[None], self.group)
            check = RanksCheck(told_N2, self.current.number, self.uneven_batches, told)
            is_usual, self.rows_before = len(rows_b) == (self.rows_before if told is None else counts[rank]), len(rows_b)
            if torch.is_grad_enabled() and is_usual and not (check.is_ready or waits):
                self.current.checks.append(check)
            else:
                self._judge(check)
            counts = check.rows() if waits else counts
        if not any(counts):
            raise ValueError("the batch is empty on every rank: a step needs at least one sample")
        return counts

    def _draw(self, labels_B: Tensor) -> ClassSample:
        """A new sample for this step; without gradient (a validation loss) it leaves no trace."""
        k, certain_n = self.config.hard_negatives, labels_B
        if k:
            nearest_n = nearest_classes(self.shard, AllRows(self.prototypes, pool=self.pool), labels_B, k, **self._products())
            certain_n = torch.cat([labels_B, nearest_n])
        sample = sampling.draw(self.shard, certain_n, self.config.sample_rate, self.seed, self.current.next_draw, self.label_share)
        if torch.is_grad_enabled():
            self.current.draw(sample)
            if self.companion is not None:
                self.companion.before_use(sample.rows_K)
        return sample

    @eager
    def forward(self, features_bD: Tensor, labels_b: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """Mean loss over the global batch, equal on every rank. Every rank calls it with its own rows.

        features_bD  float [b, D], with gradient
        labels_b     int64 [b], global class ids
        counts       b of every rank (0 is allowed), if they differ and are known: then the host waits for nothing

        Communicates 1 all-gather of 2 N numbers (for which the host waits with uneven_batches), 1 of B D floats (gather_dtype), 1 of B
        labels and what the loss asks for (see GlobalBatch); backward 1 reduce-scatter of B D float32. Different numbers of rows travel
        padded. NaN, infinity and labels that are not classes end in a ValueError or a skipped step: see `is_finite`."""
        gather_dtype = torch.bfloat16 if self.config.gather_dtype == "bfloat16" else None
        features_BD, labels_B, counts = self._gather(features_bD, labels_b, counts, gather_dtype)
        number = self.current.number
        self._check(BatchCheck, features_BD, labels_B, self.shard.num_classes, counts, number, self.current.labels_B)
        loss = self.loss(self.global_batch(features_BD, labels_B))
        self._check(LossCheck, loss, number)
        return loss

    def _gather(
        self, features_bD: Tensor, labels_b: Tensor, told: Sequence[int] | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, list[int]]:
        """(features of all ranks, their labels, rows of each rank); features travel as `dtype`."""
        check_shapes(features_bD, labels_b, self.width)
        self._check_shard()
        counts = self._counts(labels_b, told)
        if (self.uneven_batches or told is not None) and torch.is_grad_enabled() and not features_bD.requires_grad:
            features_bD = features_bD.detach().requires_grad_()  # a rank without rows takes part in the reduce-scatter too
        features_bD = features_bD.to(torch.promote_types(self.prototypes.dtype, torch.float32))
        features_BD = collectives.gather_rows(features_bD, self.group, self.gradient_factor, counts, dtype)
        return features_BD, collectives.gather_constant(labels_b, self.group, counts), counts

    def _products(self) -> dict[str, Any]:
        """Options of similarity_statistics."""
        return {"dtype": self.config.dtype, "kernel": self.kernel, "group": self.group, "tile_megabytes": self.config.tile_megabytes}

    def global_batch(self, features_BD: Tensor, labels_B: Tensor) -> GlobalBatch:
        """What a loss sees. Draws the step's sample of classes unless `begin_step` has."""
        step = self.current.number
        if self.has_bank and torch.is_grad_enabled():
            self.current.brought.append((features_BD.detach(), labels_B, step))
        return GlobalBatch(
            features_BD,
            labels_B,
            step,
            self.shard,
            self._columns(features_BD, labels_B, step),
            self._products(),
            dict(self.learned.items()),
            {name: self.get_buffer(f"tracked_{name}") for name in self.tracked_names},
            self.class_counts_S,
            self.bank,
        )

    def _columns(self, features_BD: Tensor, labels_B: Tensor, step: int) -> Columns:
        """The classes of the step; some prototypes may be replaced by features."""
        config = self.config
        if config.sample_rate == 1:
            columns = of_classes(AllRows(self.prototypes, self.consumer, self.pool), labels_B, self.shard.first)
        else:
            sample = self.current.sample if self.current.is_begun else self._draw(labels_B)
            assert sample is not None
            corrected_rate = config.sample_rate if config.correct_rate else None
            columns = of_sampled(self.shard, self.prototypes, labels_B, sample, corrected_rate, self.consumer, self.pool)
        if not config.substitution_rate:
            return columns
        if config.substitution_source == "batch":
            return substitute(columns, features_BD, labels_B, config.substitution_rate, self.seed, step, self.group)
        assert self.bank is not None
        return substitute_from_bank(columns, self.bank, config.substitution_staleness, config.substitution_rate, self.seed, step)

    @eager
    @torch.no_grad()
    def cosines(self, features_bD: Tensor, labels_b: Tensor, counts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """(target, hardest non-target) cosine of each of the B samples of the global batch, for monitoring; costs a forward pass.
        Communicates 1 all-gather of 2 N numbers, 1 of B D floats, 1 of B labels and 1 of 4 N B floats; counts as in `forward`.
        Values are not checked: cosines of a row with NaN, or with a label that is not a class, mean nothing."""
        features_BD, labels_B, _ = self._gather(features_bD, labels_b, counts)
        columns = of_classes(self.prototypes, labels_B, self.shard.first)
        statistics = similarity_statistics(features_BD, columns, TopK(), scale=1.0, **self._products())
        return statistics.target_B, statistics.non_target_B[:, 0]

    def gradient_values(self) -> Tensor:
        """The gradient of prototypes: [S, D], or [K, D] of the sampled rows, the sum over micro-batches; an empty tensor if there is none.
        Writing to it changes the gradient. Raises ValueError if micro-batches saw several samples of classes."""
        gradient, sample = self.prototypes.grad, self.sample
        if gradient is None:
            return self.prototypes.detach()[:0]
        if not gradient.is_sparse:
            return gradient
        self.refuse_several_samples()
        assert sample is not None
        values_KD, columns = gradient._values(), len(sample.rows_K)
        if len(values_KD) > columns:  # autograd only concatenates those of micro-batches
            values_KD = values_KD.view(-1, columns, values_KD.shape[1]).sum(dim=0)
            self.prototypes.grad = torch.sparse_coo_tensor(sample.rows_K[None], values_KD, gradient.shape, check_invariants=False)
        return values_KD

    def refuse_several_samples(self) -> None:
        """ValueError if classes were sampled more than once in this step."""
        if self.current.draws > 1:
            raise ValueError(
                f"{self.current.draws} samples of classes were drawn since the last step, and their gradients do not add up: call "
                "classifier.begin_step(labels of all micro-batches) first"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `to`, `half`, `cuda` and the like call."""
        place.check_dtype(fn(self.prototypes.detach().new_empty(0, dtype=torch.float32)).dtype)
        super()._apply(fn, recurse)
        if self.companion is not None:
            self.companion.after_move()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.companion is not None:
            self.companion.flush()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def get_extra_state(self) -> Tensor:
        """A part of `state_dict`: the step, and the classes that the state is of."""
        return place.saved_place(self.step, self.shard)

    def set_extra_state(self, state: Tensor) -> None:
        """Goes on at the step that `load_state_dict` found."""
        self.step = int(state[0].round())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if (saved := state_dict.get(f"{prefix}_extra_state")) is not None:
            place.check_saved(saved, self.shard)
        elif self.config.sample_rate == 1:  # of an earlier version; below 1 the step matters, and torch says that it is missing
            state_dict[f"{prefix}_extra_state"] = self.get_extra_state()
        if self.companion is not None:
            self.companion.flush()  # steps that rows missed were those of the weights before
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no optimizer, and its bank keeps only what the copy itself is given."""
        if self.companion is not None:
            self.companion.flush()
        current = replace(self.current, brought=deque(maxlen=MOST_CHECKS), checks=[])
        return {**self.__dict__, "companion": None, "consumer": None, "current": current}

    def extra_repr(self) -> str:
        """The classes of this rank, the width and the loss, for `print`."""
        first, stop = self.shard.first, self.shard.first + self.shard.rows
        return f"classes [{first}, {stop}) of {self.shard.num_classes}, width {self.width}, {self.loss}"
