"""Batches that the ranks do not divide: how many images of each micro-batch a rank has, and which numbers of ranks a run cannot have."""

from __future__ import annotations

import torch
from torch import nn

from dali_loaders.order import part_of_rank
from pipeline import backbones
from pipeline.config import TrainConfig
from pipeline.engine.parameters import freeze


def counts(config: TrainConfig, ranks: int) -> list[int]:
    """Images of each rank in a micro-batch: whole groups, so that ranks differ by at most one of data.images_per_identity images."""
    size, group = config.run.batch // config.run.accumulation, config.data.images_per_identity
    return [len(part_of_rank(size, rank, ranks, group)) for rank in range(ranks)]


def check(config: TrainConfig, ranks: int) -> None:
    """ValueError, with counts that work, where a rank would have no group of images, or too few for batch statistics. Neither needs the
    ranks themselves, so whoever is about to start them asks first."""
    batch, parts, group = config.run.batch, config.run.accumulation, config.data.images_per_identity
    if batch % (parts * group):
        raise ValueError(
            f"run.batch is {batch}, which run.accumulation = {parts} and data.images_per_identity = {group} do not divide: use a multiple "
            f"of {parts * group}"
        )
    least = min(counts(config, ranks))
    if least == 0:
        raise ValueError(_too_many(config, ranks, group))
    if least == 1 and _takes_batch_statistics(config):
        raise ValueError(_too_many(config, ranks, 2, f", of which backbone {config.backbone.name} takes batch statistics"))


def _too_many(config: TrainConfig, ranks: int, least: int, why: str = "") -> str:
    batch, parts = config.run.batch, config.run.accumulation
    size = batch // parts
    images = f"{size} image{'s' * (size > 1)}"
    micro = f"micro-batches of {images}" if parts > 1 else images
    each = f"each of {ranks} ranks" if ranks > 1 else "its rank"
    remedies = [f"at most {size // least} rank{'s' * (size // least > 1)}"] if size >= least else []
    if parts > 1 and batch >= least * ranks:
        remedies.append(f"a run.accumulation that divides {batch} and is at most {batch // (least * ranks)}")
    remedies.append(f"a run.batch of at least {least * ranks * parts}")
    said = f"{', '.join(remedies[:-1])}, or {remedies[-1]}" if len(remedies) > 1 else remedies[0]
    return f"run.batch is {batch}: its {micro} cannot give {each} at least {least}{why}; use {said}"


def _takes_batch_statistics(config: TrainConfig) -> bool:
    """Of features, where one image has none. Those of a picture's pixels are of many numbers."""
    with torch.device("meta"):
        backbone = backbones.build(config.backbone, config.data.image_size)
    freeze(backbone, config.optimizer.frozen)
    return any(isinstance(part, nn.BatchNorm1d) and part.training for part in backbone.modules())
