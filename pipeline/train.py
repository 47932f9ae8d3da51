"""One rank of a training run: what `protoshard train`, torchrun and Ray all call."""

from __future__ import annotations

import logging
import os

from pipeline import run_folder
from pipeline.config import TrainConfig
from pipeline.distributed import join
from pipeline.lease import Lease
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
    os.umask(os.umask(0o022) | 0o002)  # no file of a run can be written by everybody, whatever the user's mask admits
    place = join(config.engine.device, config.run.timeout)
    run_folder.check(config, place, resume)
    lease = Lease(config.run.folder, place, config.checkpoint.folder)
    try:
        trainer = Trainer(config, place, resume, lease)
        run_folder.mark(config, place)
        try:
            return trainer.fit()
        finally:
            trainer.close()
    finally:
        lease.release()
