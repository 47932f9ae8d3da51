"""Options of the optimizers of backbone and classifier, and their learning rate over the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimizerConfig:
    """SGD or AdamW, for the backbone and for the classifier. Usual for faces: lr 0.1 per 1024 images of batch, momentum 0.9, decay 5e-4."""

    name: Literal["sgd", "adamw"] = "sgd"  # of the backbone
    classifier: Literal["sgd", "adamw"] = "sgd"  # of the classifier, which moves the prototypes of a step row by row
    lr: float = 0.1  # peak, for the whole batch of a step; not scaled by anything
    momentum: float = 0.9  # of SGD
    weight_decay: float = 5e-4  # of backbone and classifier; of SGD a part of the gradient, of AdamW apart from it
    classifier_lr: float = 0.0  # 0: the same as lr
    lr_factors: tuple[tuple[str, float], ...] = ()  # parts of the backbone and factors of lr, [["fc", 10]]; the first that names one counts
    layer_decay: float = 1.0  # factor of lr per layer of the backbone, from the last to the first
    no_decay: tuple[str, ...] = ()  # parts of the backbone without weight decay, such as *.bias
    frozen: tuple[str, ...] = ()  # parts of the backbone that do not move, batch statistics included: parameters, modules or patterns
    unsampled: Literal["frozen", "lazy"] = "frozen"  # prototypes outside a step's sample stay, or move later as if they had been in it
    in_backward: bool = False  # prototypes move during backward, and their gradient is never whole in memory
    schedule: Literal["polynomial", "cosine", "steps"] = "polynomial"  # of lr: towards 0, or by a factor at epochs
    power: float = 2.0  # of the polynomial
    step_epochs: tuple[float, ...] = ()  # of the steps: epochs at which the rate is multiplied by step_factor
    step_factor: float = 0.1  # of the steps: what the rate is multiplied by
    warmup_epochs: float = 0.0  # epochs over which the rate rises evenly from 0 to lr
    clip: float = 5.0  # largest norm of the backbone's gradient; 0 switches clipping off
    clip_jointly: bool = False  # clip bounds the norm over backbone and classifier, and one factor scales both; needs engine.name=ddp

    def __post_init__(self) -> None:
        for name, allowed in (
            ("name", ("sgd", "adamw")),
            ("classifier", ("sgd", "adamw")),
            ("unsampled", ("frozen", "lazy")),
            ("schedule", ("polynomial", "cosine", "steps")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)!r}, but must be one of {', '.join(allowed)}")
        for name in ("lr", "classifier_lr", "weight_decay", "warmup_epochs", "clip", "power"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}, but must be finite and not negative")
        if not all(0 <= epoch < math.inf for epoch in self.step_epochs):
            raise ValueError(f"optimizer.step_epochs is {self.step_epochs}, but must hold epochs, finite and not negative")
        if (self.schedule == "steps") != bool(self.step_epochs):
            raise ValueError(
                f"optimizer.step_epochs is {self.step_epochs}, but optimizer.schedule is {self.schedule}: steps need epochs, alone"
            )
        if not 0 < self.step_factor <= 1:
            raise ValueError(f"optimizer.step_factor is {self.step_factor}, but must be above 0 and at most 1")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optimizer.layer_decay is {self.layer_decay}, but must be above 0 and at most 1, which is no decay")
        for rate in self.lr_factors:
            if not (isinstance(rate, tuple) and len(rate) == 2 and isinstance(rate[0], str) and isinstance(rate[1], int | float)):
                raise ValueError(f'optimizer.lr_factors holds {rate!r}, but must hold pairs of a name and a factor, such as [["fc", 10]]')
            if isinstance(rate[1], bool) or not 0 < rate[1] < math.inf:
                raise ValueError(f"optimizer.lr_factors gives {rate[0]!r} the factor {rate[1]}, but it must be a positive number")
        if self.clip_jointly and (self.in_backward or not self.clip):
            raise ValueError("optimizer.clip_jointly needs the gradients of a whole step, and a clip above 0: set in_backward=False")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum is {self.momentum}, but must be at least 0 and below 1")


def rate_factor(config: OptimizerConfig, step: int, total_steps: int, steps_per_epoch: float) -> float:
    """Learning rate of `step` (from 0) as a share of the peak: linear warm-up from 1/warmup_steps, then decay towards 0, or in steps."""
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.schedule == "steps":
        return config.step_factor ** sum(step >= round(epoch * steps_per_epoch) for epoch in config.step_epochs)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return (1 - progress) ** config.power
