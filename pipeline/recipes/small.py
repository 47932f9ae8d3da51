"""Recipes that train in minutes on a CPU, on small images; `photos` takes a larger network where there is a GPU."""

from __future__ import annotations

import torch

from dali_loaders.config import AugmentConfig, DataConfig
from partial_fc import losses
from pipeline.backbones import BackboneConfig
from pipeline.config import RunConfig, TrainConfig
from pipeline.engine import EngineConfig
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.recipes.data import find_data
from pipeline.schedule import OptimizerConfig


def dogs_small() -> TrainConfig:
    """protoshard train dogs_small --ranks 2

    848 identities, 4,179 images. On dogs/test.tar (150 other identities): EER 0.13, rank-1 0.75, after 3 minutes on 2 cores.
    """
    return TrainConfig(
        run=RunConfig(batch=64, epochs=40),
        data=DataConfig(
            train=find_data("dogs/train.tar"),
            image_size=64,
            augment=AugmentConfig(flip=True, rotate=10, zoom=0.15, shift=0.08, brightness=0.2, contrast=0.2),
        ),
        backbone=BackboneConfig("small", width=128),
        loss=losses.build("cosface", scale=32.0, margin=0.3),
        optimizer=OptimizerConfig(lr=0.1, schedule="cosine", warmup_epochs=1),
        evaluation=EvaluationConfig(data=find_data("dogs/test.tar"), at_start=True),
    )


def omniglot_small() -> TrainConfig:
    """protoshard train omniglot_small --ranks 2

    964 characters, 19,280 images. On omniglot/test.tar (361 other characters): EER 0.045, rank-1 0.91, after 8 minutes on 2 cores.
    """
    return TrainConfig(
        run=RunConfig(batch=128, epochs=20),
        # A mirrored character is another character.
        data=DataConfig(
            train=find_data("omniglot/train.tar"), image_size=64, augment=AugmentConfig(flip=False, rotate=12, zoom=0.15, shift=0.08)
        ),
        backbone=BackboneConfig("small", width=128),
        loss=losses.build("cosface", scale=32.0, margin=0.3),
        optimizer=OptimizerConfig(lr=0.1, schedule="cosine", warmup_epochs=1),
        evaluation=EvaluationConfig(data=find_data("omniglot/test.tar"), flip=False, at_start=True),
    )


def faces_small() -> TrainConfig:
    """protoshard train faces_small --ranks 2, which launch/quickstart.sh does

    400 drawn identities, 8,000 images. On 100 other identities: EER 0.057, rank-1 0.93, after 2 minutes on 4 cores.
    """
    return TrainConfig(
        run=RunConfig(batch=128, epochs=12, margin_warmup=0.33, log_every=20),
        data=DataConfig(train=find_data("faces/train.tar"), image_size=64),
        backbone=BackboneConfig("small", width=128),
        loss=losses.build("cosface", scale=24.0, margin=0.2),
        optimizer=OptimizerConfig(lr=0.1, schedule="cosine", warmup_epochs=1),
        evaluation=EvaluationConfig(data=find_data("faces/test.tar"), at_start=True),
    )


def photos() -> TrainConfig:
    """protoshard train photos --ranks 2 --set data.train=FOLDER evaluation.data=OTHERS

    Your own images: FOLDER holds a folder for each identity, OTHERS the same of identities that are not in FOLDER (without it nothing is
    measured). Faces should be cut out and upright. On a CPU a small network on 64 x 64 pixels, on a GPU iresnet18 on 112 x 112 (not run).
    Of dogs/train.tar, on dogs/test.tar (150 other identities): EER 0.13, rank-1 0.74, after 6 minutes on 2 shared cores.
    """
    on_gpu = torch.cuda.is_available()
    return TrainConfig(
        run=RunConfig(batch=128 if on_gpu else 64, epochs=40, margin_warmup=0.33),
        data=DataConfig(
            image_size=112 if on_gpu else 64,
            augment=AugmentConfig(flip=True, rotate=10, zoom=0.15, shift=0.08, brightness=0.2, contrast=0.2),
        ),
        backbone=BackboneConfig("iresnet18", width=512) if on_gpu else BackboneConfig("small", width=128),
        loss=losses.build("cosface", scale=32.0, margin=0.3),
        optimizer=OptimizerConfig(lr=0.1, schedule="cosine", warmup_epochs=1),
        engine=EngineConfig(name="ddp"),
        evaluation=EvaluationConfig(at_start=True),
    )
