"""Checks of the classifier's input. Shapes are checked at once; values are checked on the device, from the gathered batch, so that every
rank finds the same, and the host reads the result when the optimizer is about to use the step."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from partial_fc.device_policy import policy_of


class NonFiniteError(ValueError):
    """NaN or infinity, found on every rank alike."""


def check_shapes(features_bD: Tensor, labels_b: Tensor, width: int) -> None:
    if features_bD.ndim != 2 or features_bD.shape[1] != width:
        raise ValueError(f"features have shape {tuple(features_bD.shape)}, but must be [samples, {width}], the width of the prototypes")
    if not features_bD.is_floating_point():
        raise ValueError(f"features are {features_bD.dtype}, but must be floating-point numbers")
    check_labels(labels_b)
    if len(labels_b) != len(features_bD):
        raise ValueError(f"there are {len(features_bD)} rows of features, but {len(labels_b)} labels: bring one label per row")


def check_labels(labels_b: Tensor) -> None:
    if labels_b.dtype != torch.int64 or labels_b.ndim != 1:
        raise ValueError(
            f"labels are {labels_b.dtype} of shape {tuple(labels_b.shape)}, but must be torch.int64 of shape [samples]: "
            "convert them with labels.long()"
        )


class ToHost:
    """Numbers on their way from the device to the host, which goes on."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers.to("cpu", non_blocking=True)  # into pinned memory
        self.is_ready = policy_of(numbers.device).host_looks  # whether `read` will certainly not wait
        self.copied = torch.cuda.Event() if numbers.is_cuda else None
        if self.copied is not None:
            self.copied.record()

    def read(self) -> list:
        if self.copied is not None:
            self.copied.synchronize()
        return self.numbers.tolist()


class RanksCheck:
    """Check of what ranks bring to a batch, before it is gathered: equally many rows, else what comes after would end without a word, or
    never; and a shard of their own.

    told_N2   int64, of each rank: its rows, and the mark of its shard (place.mark_of)
    expected  rows of each rank; None: equally many, unless they may differ"""

    def __init__(self, told_N2: Tensor, step: int, may_differ: bool, expected: Sequence[int] | None = None) -> None:
        self.told, self.step, self.may_differ, self.expected = ToHost(told_N2), step, may_differ, expected
        self.is_ready = self.told.is_ready

    def rows(self) -> list[int]:
        """Of each rank. Waits for the device."""
        return [rows for rows, _ in self.told.read()]

    def faults(self) -> tuple[str | None, str | None]:
        """(what is wrong, None). Waits for the device."""
        rows, marks = zip(*self.told.read(), strict=True)
        other = next((rank for rank, count in enumerate(rows) if count != rows[0]), 0)
        twin = next((rank for rank, mark in enumerate(marks) if marks.index(mark) < rank), 0)
        if twin:
            return (
                f"ranks {marks.index(marks[twin])} and {twin} hold the same prototypes, which should be of different classes: keep the "
                "classifier out of engines that broadcast or shard parameters (DDP: partial_fc.keep_out_of_ddp; DeepSpeed, FSDP: give the "
                "backbone alone), and load into each rank its own shard"
            ), None
        if self.expected is not None:
            wrong = next((rank for rank, pair in enumerate(zip(rows, self.expected, strict=True)) if pair[0] != pair[1]), None)
            if wrong is not None:
                return (
                    f"at step {self.step} rank {wrong} brings {rows[wrong]} rows, but counts says {self.expected[wrong]}: give every rank "
                    "the same counts, of the rows that each brings"
                ), None
        elif other and not self.may_differ:
            return (
                f"at step {self.step} rank 0 brings {rows[0]} rows, but rank {other} brings {rows[other]}: make the classifier with "
                "uneven_batches=True, give counts=, or leave out the last, incomplete batch (drop_last)"
            ), None
        return None, None


class LossCheck:
    """Check that a loss, equal on every rank, is a finite number: finite features may still overflow on the way to it."""

    def __init__(self, loss: Tensor, step: int) -> None:
        self.step = step
        self.found = ToHost(loss.detach().reshape(1))
        self.is_ready = self.found.is_ready

    def faults(self) -> tuple[str | None, str | None]:
        """(None, what is wrong). Waits for the device."""
        (loss,) = self.found.read()
        if math.isfinite(loss):
            return None, None
        return None, (
            f"the loss of step {self.step} is {loss}, though its features are finite: lower the learning rate, or leave such steps out "
            "with non_finite=skip"
        )


class BatchCheck:
    """Checks of one global batch: labels are classes, and features finite. Made without waiting for the device; see `faults`.

    counts         rows per rank, to name the rank of a row
    step_labels_B  the only labels allowed, if `begin_step` has fixed the classes of a step"""

    def __init__(
        self, features_BD: Tensor, labels_B: Tensor, num_classes: int, counts: list[int], step: int, step_labels_B: Tensor | None = None
    ) -> None:
        self.num_classes, self.counts, self.step = num_classes, counts, step
        is_wrong_B = (labels_B < 0) | (labels_B >= num_classes)
        is_unknown_B = torch.full_like(is_wrong_B, step_labels_B is not None)
        if step_labels_B is not None and len(step_labels_B):
            sorted_B = step_labels_B.sort().values  # torch.isin would wait for the device
            is_unknown_B = sorted_B[torch.searchsorted(sorted_B, labels_B).clamp_(max=len(sorted_B) - 1)] != labels_B
        smallest_B, largest_B = features_BD.detach().amin(dim=1), features_BD.detach().amax(dim=1)  # both propagate NaN; isfinite is slow
        is_infinite_B = ~(smallest_B.isfinite() & largest_B.isfinite())
        bad_3B = torch.stack([is_wrong_B, is_unknown_B, is_infinite_B])
        row_3 = bad_3B.byte().argmax(dim=1)  # the first of several
        self.found = ToHost(torch.stack([bad_3B.sum(dim=1), row_3, labels_B[row_3]]))
        self.is_ready = self.found.is_ready

    def faults(self) -> tuple[str | None, str | None]:
        """(what is wrong with labels, what is wrong with features), each a sentence or None. Waits for the device."""
        (wrong, unknown, infinite), (wrong_row, unknown_row, infinite_row), (wrong_label, unknown_label, _) = self.found.read()
        labels = features = None
        if wrong:
            labels = (
                f"label {wrong_label} of {self._place(wrong_row)} is not a class: labels must lie in [0, {self.num_classes}), and {wrong} "
                f"of {sum(self.counts)} in this batch do not; compare the labels of the data with num_classes"
            )
        elif unknown:
            labels = (
                f"label {unknown_label} of {self._place(unknown_row)} was not given to begin_step, which must see the labels of all "
                "micro-batches of a step"
            )
        if infinite:
            features = (
                f"features of {self._place(infinite_row)} hold NaN or infinity, as do {infinite} of {sum(self.counts)} rows in this batch: "
                "lower the learning rate or look for broken input, or leave such steps out with non_finite=skip"
            )
        return labels, features

    def _place(self, row: int) -> str:
        for rank, rows in enumerate(self.counts):
            if row < rows:
                return f"rank {rank} at step {self.step} (row {row} of its batch)"
            row -= rows
        raise AssertionError(f"row {row} lies behind the last rank's")
