"""Short real training runs for tests: procedural faces, a backbone without batch statistics, float32."""

from __future__ import annotations

import contextlib
import json
import os
from unittest import mock

from torch import Tensor

from dali_loaders.config import AugmentConfig, DataConfig
from dali_loaders.faces import FacesConfig, write_faces
from partial_fc import losses
from partial_fc.classifier import ClassifierConfig
from pipeline.backbones import BackboneConfig
from pipeline.checkpoint import CheckpointConfig
from pipeline.config import RunConfig, TrainConfig
from pipeline.engine import EngineConfig
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.monitor.config import MonitorConfig
from pipeline.schedule import OptimizerConfig
from pipeline.train import train
from pipeline.trainer import Trainer

BATCH, IMAGES = 24, 13 * 6


def faces(folder: str) -> str:
    """A tar of 13 identities x 6 images of 32 pixels."""
    path = os.path.join(folder, "faces.tar")
    if not os.path.exists(path):
        write_faces(path, FacesConfig(identities=13, images_per_identity=6, size=32), workers=1)
    return path


def configuration(data: str, folder: str, steps: int, engine: str = "ddp", **changes) -> TrainConfig:
    run = {"folder": folder, "batch": BATCH, "epochs": steps * BATCH / IMAGES, "log_every": 1, "margin_warmup": 0.3, "seed": 5}
    run |= changes.pop("run", {})
    return TrainConfig(
        run=RunConfig(**run),
        data=DataConfig(train=data, image_size=32, threads=1, augment=AugmentConfig(rotate=10, brightness=0.2)),
        backbone=BackboneConfig(changes.pop("backbone", "small_nobn"), width=16, dropout=0.0),
        classifier=ClassifierConfig(changes.pop("sample_rate", 1.0)),
        loss=losses.build("cosface", scale=16.0, margin=0.2),
        optimizer=OptimizerConfig(lr=0.05, schedule="cosine", warmup_epochs=1, **changes.pop("optimizer", {})),
        engine=EngineConfig(engine, **{"precision": "float32", **changes.pop("engine_options", {})}),
        checkpoint=CheckpointConfig(every_steps=changes.pop("save_every", 10**6), keep=9),
        evaluation=changes.pop("evaluation", EvaluationConfig()),
        monitor=changes.pop("monitor", MonitorConfig(())),  # whose pictures would take half the time of a run
    )


def train_losses(config: TrainConfig, resume: str = "auto") -> list[float]:
    """Trains on every rank that calls it; the losses of all steps of the run's metrics file."""
    train(config, resume)
    with open(os.path.join(config.run.folder, "metrics.jsonl")) as file:
        rows = [json.loads(line) for line in file]
    return [row["loss"] for row in rows if "loss" in row]


class InterruptionError(Exception):
    """Stands for whatever ends a run in the middle of nowhere."""


def train_until(config: TrainConfig, step: int, resume: str = "auto") -> None:
    """Trains on every rank that calls it and breaks off before step `step` is done."""
    train_step = Trainer._train_step

    def limited(self: Trainer) -> Tensor:
        if self.step == step:
            self.saver.finish()  # so that the newest checkpoint is always the same
            raise InterruptionError
        return train_step(self)

    with mock.patch.object(Trainer, "_train_step", limited), contextlib.suppress(InterruptionError):
        train(config, resume)
