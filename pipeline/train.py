"""One rank of a training run: what `protoshard train`, torchrun and Ray all call."""

from __future__ import annotations

import os

from dali_loaders.progress import show_warnings
from pipeline import heartbeat, run_folder, stopping
from pipeline.config import TrainConfig
from pipeline.distributed import join
from pipeline.lease import Lease
from pipeline.resolve import resolve
from pipeline.start import description
from pipeline.trainer import Trainer
from pipeline.watch import Watch, meeting


def train_recipe(recipe: str, overrides: list[str], resume: str = "auto") -> dict[str, float]:
    """`train` for a process of its own: it runs the recipe itself, because a loss that a recipe file defines cannot be sent to it."""
    return train(resolve(recipe, overrides), resume)


def train(config: TrainConfig, resume: str = "auto", keep_stop: bool = False) -> dict[str, float]:
    """Trains `config` to its end in this process's place in the job and returns the last evaluation's figures.

    resume: "auto" continues the newest complete checkpoint of the run's folder, "none" starts afresh (an earlier run is kept under another
    name), a path starts from that checkpoint. Bad input raises ValueError with one sentence.
    keep_stop: a file FOLDER/stop that is there already asks this run to stop, and not one before.
    Stopped: the run was asked to stop, and has saved. The process ends with exit code 76 where another rank is lost.
    """
    show_warnings()
    os.umask(os.umask(0o022) | 0o002)  # no file of a run can be written by everybody, whatever the user's mask admits
    folder, minutes = config.run.folder, config.run.timeout
    with stopping.heeded() as stop:
        heartbeat.record_collectives(folder)
        with meeting(minutes):
            place = join(config.engine.device, minutes)
            run_folder.check(config, place, resume)
            lease = Lease(folder, place, config.checkpoint.folder)
        try:
            stop.watch(folder, place.rank, keep_stop)
            with Watch(folder, place, minutes, stop, lease.token) as watch:
                return _train(config, resume, lease, watch)
        finally:
            lease.release()


def _train(config: TrainConfig, resume: str, lease: Lease, watch: Watch) -> dict[str, float]:
    trainer = None
    try:
        trainer = Trainer(config, lease.place, resume, lease, watch)
        trains = trainer.step < trainer.total_steps
        run_folder.mark(config, lease.place, description(trainer) if trains and lease.place.is_first else None)
        return trainer.fit()
    except BaseException as error:
        watch.note(error)
        raise
    finally:
        if trainer is not None:
            trainer.close()
