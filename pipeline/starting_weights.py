"""What a new run begins with when not with random numbers: the backbone of a checkpoint or of a file of weights, and if asked for, the
prototypes of the identities that both sets have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dali_loaders import open_source
from dali_loaders.identities import checksum
from dali_loaders.names import quoted
from dali_loaders.remote import without_secrets
from partial_fc import PartialFC
from partial_fc.growing import move_rows
from partial_fc.shards import ClassShard
from pipeline import checkpoint
from pipeline.checkpoint import Checkpoint
from pipeline.interop.weights import fit, read_weights


@dataclass(frozen=True)
class StartConfig:
    weights: str = ""  # --from: a checkpoint, a run's folder, a .pt or a .safetensors, whose backbone a new run begins with
    classifier: bool = False  # also the prototypes of the identities that the checkpoint's set has too, by name
    ema: bool = False  # the checkpoint's average of the weights (run.ema) in place of its last ones

    def __post_init__(self) -> None:
        for name in ("classifier", "ema"):
            if getattr(self, name) and not self.weights:
                raise ValueError(f"start.{name} needs the checkpoint that a new run begins with: give --from PATH (start.weights)")

    def is_that_of(self, origin: dict[str, Any]) -> bool:
        """Whether a run with this `Start.origin` was asked for in the same way, though perhaps from another folder."""
        is_same_source = without_secrets(self.weights) == origin["given"] or os.path.realpath(self.weights) == origin["path"]
        return is_same_source and (self.classifier, self.ema) == (origin["classifier"], origin["ema"])


class Start:
    """The source that a configuration names, found and checked. Every rank makes one.

    origin: what checkpoints of the new run say about it
    """

    def __init__(self, config: StartConfig) -> None:
        self.config = config
        self.is_file = os.path.isfile(config.weights)
        if not os.path.exists(config.weights) and "://" not in config.weights:
            path = quoted(config.weights)
            raise ValueError(f"--from (start.weights): {path} does not exist: give a checkpoint, a run's folder or a weight file")
        if self.is_file and (config.classifier or config.ema):
            name = "classifier" if config.classifier else "ema"
            raise ValueError(f"start.{name} takes more than a backbone, but {config.weights} is a weight file: give a checkpoint or a run")
        self.saved = None if self.is_file else checkpoint.locate(config.weights)
        self.path = config.weights if self.saved is None else self.saved.path
        self.info: dict[str, Any] = {} if self.saved is None else self.saved.info
        self.origin = {
            "given": without_secrets(config.weights),
            "path": os.path.realpath(without_secrets(config.weights)),
            "classifier": config.classifier,
            "ema": config.ema,
            "checkpoint": self.path,
            "step": self.info.get("step"),
        }

    def backbone(self, module: nn.Module, network: str) -> dict[str, Tensor]:
        """Weights and buffers under the names of `module`; ValueError that names keys if they are of another network."""
        if self.saved is None:
            weights = read_weights(self.path)
            if "input_layer.0.weight" in weights:
                raise ValueError(
                    f"{self.path} has the names of AdaFace and CVLface, of which the former takes blue, green, red: run `protoshard import "
                    "adaface` or `cvlface` with it, and give --from the folder that this makes"
                )
            return fit(weights, module, self.path, network)
        name = f"{self.path} ({self.info.get('backbone', 'a backbone')} of width {self.info.get('width', 'unknown')})"
        return fit(backbone_of(self.saved, self.config.ema), module, name, network)

    def prototypes(self, classifier: PartialFC, identities: Sequence[str]) -> str:
        """Fills the classifier's rows of the identities that the source has too, and says how many. Communicates as `move_rows`."""
        saved = self.saved
        if saved is None or "prototypes" not in saved:
            raise ValueError(f"start.classifier: {self.path} holds no prototypes: leave it out to take the backbone alone")
        num_classes, *width = saved.shape("prototypes") or (0,)
        if width != [classifier.width]:
            shown = " x ".join(map(str, width)) or "none"
            raise ValueError(f"start.classifier: prototypes of {self.path} have width {shown}, but this run has {classifier.width}")
        names = self._identities(saved, num_classes)
        label_of = {name: label for label, name in enumerate(identities)}
        new_labels = np.array([label_of.get(name, -1) for name in names], np.int64)
        common = int((new_labels >= 0).sum())
        if not common:
            raise ValueError(
                f"start.classifier: none of the {num_classes} identities of {self.path} (such as {names[0]!r}) is among the "
                f"{len(identities)} of this run (such as {identities[0]!r}): leave it out to take the backbone alone"
            )
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        old = ClassShard.of_rank(num_classes, rank, ranks)
        old_SD = torch.empty(old.rows, classifier.width, dtype=saved.dtype("prototypes"), device=classifier.prototypes.device)
        saved.fill("prototypes", old_SD, old.first * classifier.width)
        move_rows(old_SD, old, classifier.prototypes.data, classifier.shard, new_labels, classifier.group)
        # A .rec without names beside it calls identities by their labels.
        are_numbers = all(name == str(label) for label, name in enumerate(identities))
        caution = ", by their numbers, since the set has no names: right only if both sets number the same people" if are_numbers else ""
        return f"prototypes of {common} of {len(identities)} identities taken over{caution}"

    def _identities(self, saved: Checkpoint, num_classes: int) -> list[str]:
        """From the checkpoint or, where an earlier version wrote it, from the set that it was trained on."""
        names = saved.identities()
        data = self.info.get("config", {}).get("data", {})
        if names is None and isinstance(data.get("train"), str):
            with contextlib.suppress(ValueError, OSError):  # gone or damaged
                names = open_source(data["train"], str(data.get("reader", "native"))).identities
        if names is None or len(names) != num_classes or self.info.get("identities") not in (None, checksum(names)):
            raise ValueError(
                f"start.classifier: {self.path} does not name its identities, and the set that it was trained on, "
                f"{data.get('train') or 'which it does not name'}, is gone or has changed: leave it out to take the backbone alone"
            )
        return names


def backbone_of(saved: Checkpoint, ema: bool = False) -> dict[str, Tensor]:
    """Weights and buffers of the backbone of a checkpoint, or with `ema` the averages that the run kept of them."""
    prefix = "ema." if ema else "backbone."
    weights = {name.removeprefix(prefix): saved.whole(name) for name in saved if name.startswith(prefix)}
    if not weights:
        raise ValueError(f"{saved.path} holds no averaged weights: its run had run.ema=0" if ema else f"{saved.path} holds no backbone")
    return weights
