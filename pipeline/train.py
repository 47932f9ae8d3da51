"""One rank of a training run: what `protoshard train`, torchrun and Ray all call."""

from __future__ import annotations

import logging

from pipeline.config import TrainConfig
from pipeline.distributed import FolderLock, join
from pipeline.resolve import resolve
from pipeline.trainer import Trainer


def train_recipe(recipe: str, overrides: list[str], resume: str = "auto") -> dict[str, float]:
    """`train` for a process of its own: it runs the recipe itself, because a loss that a recipe file defines cannot be sent to it."""
    return train(resolve(recipe, overrides), resume)


def train(config: TrainConfig, resume: str = "auto") -> dict[str, float]:
    """Trains `config` to its end in this process's place in the job and returns the last evaluation's figures.

    resume: "auto" continues the newest complete checkpoint of the run's folder, "none" starts afresh (an earlier run is kept under another
    name), a path starts from that checkpoint. Bad input raises ValueError with one sentence.
    """
    logging.basicConfig(format="%(message)s")
    place = join(config.engine.device, config.run.timeout)
    lock = FolderLock(config.run.folder, place)
    try:
        trainer = Trainer(config, place, resume)
        lock.follow()
        try:
            return trainer.fit()
        finally:
            trainer.close()
    finally:
        lock.release()
