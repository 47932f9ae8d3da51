"""When a run saves, where to, and which checkpoints stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CheckpointConfig:
    folder: str = ""  # a folder or an address (s3://, gs://); "" is checkpoints/ in the run's folder
    every_epochs: float = 1.0  # also one at the end of the run
    every_steps: int = 0  # if positive, this instead of every_epochs
    keep: int = 3  # newest ones kept
    keep_every: int = 0  # if positive, those whose step it divides are kept for ever
    best: str = ""  # a figure of an evaluation as metrics name it, such as test/eer or lfw/accuracy: the best one's checkpoint is kept too
    asynchronous: bool = True  # the step waits for a copy in this rank's memory only; False: until all is written, without that memory
    differences: Literal["refuse", "continue"] = "refuse"  # of optimizer or frozen layers between a checkpoint and this run

    def __post_init__(self) -> None:
        if not 0 < self.every_epochs < 1e9:
            raise ValueError(f"checkpoint.every_epochs is {self.every_epochs}, but must be positive and below 1e9")
        for name, least in (("every_steps", 0), ("keep", 1), ("keep_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"checkpoint.{name} is {getattr(self, name)}, but must be at least {least}")
        if self.differences not in ("refuse", "continue"):
            raise ValueError(f"checkpoint.differences is {self.differences!r}, but must be refuse or continue")
