"""One step of the classifier's optimizer: its number, its sample of classes, the checks of its input, and what the bank gets after it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from partial_fc.batch_check import BatchCheck, LossCheck, RanksCheck
from partial_fc.sampling import ClassSample

MOST_CHECKS = 64  # kept unread if no optimizer asks for them, and batches kept for the bank


@dataclass
class Step:
    first: int = 0  # number of the step, or of its first sample of classes
    sample: ClassSample | None = None  # the newest one
    draws: int = 0  # samples so far; an optimizer allows only one
    is_begun: bool = False  # by `begin_step`: all micro-batches see one sample
    labels_B: Tensor | None = None  # what `begin_step` was given, of all ranks
    checks: list[BatchCheck | LossCheck | RanksCheck] = field(default_factory=list)  # not read yet
    is_finite: bool = True  # according to the checks read so far
    brought: deque[tuple[Tensor, Tensor, int]] = field(default_factory=lambda: deque(maxlen=MOST_CHECKS))  # features, labels and number

    @property
    def next_draw(self) -> int:
        """The number that keys the next sample; every sample has its own."""
        return self.first + self.draws

    @property
    def number(self) -> int:
        """The number of the next batch, and of the sample that it sees."""
        return self.next_draw - self.is_begun

    def draw(self, sample: ClassSample) -> None:
        self.sample = sample
        self.draws += 1

    def next(self, samples: bool) -> Step:
        """The step after this one: the number grows by the samples drawn, or by 1 if classes are never sampled."""
        return Step(self.first + (self.draws if samples else 1), self.sample)
