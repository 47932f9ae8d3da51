"""Writes a checkpoint as the first version of the project laid it out: names of tensors and fields stand here as text, because they are a
format. A change of names in the code must not reach this file."""

from __future__ import annotations

import json
import os
import zlib

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

CLASSIFIER = {"prototypes", "prototypes.step", "prototypes.momentum_buffer"}
OF_LOSSES = {
    "uss": {
        "learned.threshold",
        "learned.threshold.step",
        "learned.threshold.momentum_buffer",
        "tracked_threshold_is_started",
        "bank_features",
        "bank_steps",
    },
    "gce": {"tracked_queue", "tracked_queue_labels"},
    "sum": {
        "learned.1_thresholds",
        "learned.1_thresholds.step",
        "learned.1_thresholds.momentum_buffer",
        "tracked_1_thresholds_is_started",
    },
}
OF_THE_BACKBONE = ("backbone.", "optimizer.")
CONFIG = {
    "run": {"seed": 5, "batch": 24, "accumulation": 1, "epochs": 12 * 24 / 78, "margin_warmup": 0.3, "log_every": 1},
    "data": {
        "reader": "native",
        "min_images": 2,
        "images_per_identity": 1,
        "image_size": 32,
        "threads": 1,
        "prefetch": 2,
        "augment": {"flip": True, "rotate": 10, "zoom": 0.0, "shift": 0.0, "brightness": 0.2, "contrast": 0.0},
    },
    "backbone": {"name": "small_nobn", "width": 16, "dropout": 0.0},
    "classifier": {
        "sample_rate": 1.0,
        "correct_rate": False,
        "hard_negatives": 0,
        "dtype": "float32",
        "storage_dtype": "float32",
        "gather_dtype": "float32",
        "substitution_rate": 0.0,
        "substitution_source": "batch",
        "substitution_staleness": 200,
        "non_finite": "raise",
    },
    "optimizer": {
        "name": "sgd",
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 0.0005,
        "classifier_lr": 0.0,
        "schedule": "cosine",
        "power": 2.0,
        "warmup_epochs": 1,
        "clip": 5.0,
    },
    "engine": {"name": "ddp", "zero_stage": 1, "precision": "float32"},
    "checkpoint": {"every_epochs": 1.0, "every_steps": 5, "keep": 9},
    "evaluation": {"data": "", "pairs": [], "every_epochs": 0.0, "at_start": False, "flip": True, "batch_size": 64},
}
LOSSES = {
    "uss": {"name": "uss", "scale": 16.0, "margin": 0.1, "threshold": None, "source": "bank", "start": 0, "staleness": None},
    "gce": {
        "name": "gce",
        "scale": 16.0,
        "target_margin": 0.4,
        "non_target_margin": 0.05,
        "out_sample_weight": 1.0,
        "alpha": 0.5,
        "out_samples": "mean",
        "out_sample_gradient": False,
        "queue": 16,
    },
    "sum": {"name": "sum", "parts": [{"name": "cosface", "scale": 16.0}, {"name": "sample_bce", "scale": 16.0}], "weights": []},
}


def names(loss: str, found: set[str]) -> set[str]:
    """All names that the first version gave to the tensors of such a run; those of the backbone follow its modules."""
    return CLASSIFIER | OF_LOSSES[loss] | {name for name in found if name.startswith(OF_THE_BACKBONE)}


def write(path: str, step: int, loss: str, tensors: dict[str, Tensor], identities: str, data: str, folder: str) -> None:
    """identities: the checksum of the names of identities, which a run compares"""
    os.makedirs(path)
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path), no_dist=not torch.distributed.is_initialized())
    files = {}
    for name in sorted(os.listdir(path)):
        with open(os.path.join(path, name), "rb") as file:
            content = file.read()
        files[name] = [len(content), zlib.crc32(content)]
    config = {**CONFIG, "loss": LOSSES[loss], "run": {**CONFIG["run"], "folder": folder}, "data": {**CONFIG["data"], "train": data}}
    info = {
        "format": 1,
        "step": step,
        "num_classes": 13,
        "identities": identities,
        "width": 16,
        "backbone": "small_nobn",
        "image_size": 32,
        "optimizer": "sgd",
        "batch": 24,
        "images_per_identity": 1,
        "consumed": 24 * step,
        "skipped_steps": 0,
        "world_size": 1,
        "config": config,
        "files": files,
    }
    with open(os.path.join(path, "protoshard.json"), "w") as file:
        json.dump(info, file, indent=1)
