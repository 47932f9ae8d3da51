"""Where a run's figures go beside metrics.jsonl and the console."""

from __future__ import annotations

from dataclasses import dataclass

WRITERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class MonitorConfig:
    writers: tuple[str, ...] = ("tensorboard",)  # beside metrics.jsonl: tensorboard, wandb (Weights & Biases), both, or none
    images: int = 5000  # of each labelled set, at the end of the run, in the projector and among which hard pairs are sought; 0: none

    def __post_init__(self) -> None:
        for name in self.writers:
            if name not in WRITERS:
                raise ValueError(f"monitor.writers has {name!r}, but must be one or several of {', '.join(WRITERS)}, or nothing")
        if len(set(self.writers)) < len(self.writers):
            raise ValueError(f"monitor.writers is {', '.join(self.writers)}: name each once")
        if not 0 <= self.images <= 10_000:
            raise ValueError(f"monitor.images is {self.images}, but must be from 0, which is none, to 10000, which a browser still shows")
