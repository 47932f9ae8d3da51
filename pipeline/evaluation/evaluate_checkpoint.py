"""Evaluates the backbone of a checkpoint on a data set: what `protoshard eval` does on each of its ranks."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dali_loaders.remote import without_secrets
from pipeline import backbones, checkpoint
from pipeline.checkpoint import Checkpoint
from pipeline.config import TrainConfig, from_dict
from pipeline.distributed import join
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.protocols import open_protocol
from pipeline.evaluation.report_lines import lines
from pipeline.resolve import resolve
from pipeline.starting_weights import backbone_of


def load_backbone(saved: Checkpoint, device: torch.device, ema: bool = False, recipe: str | None = None) -> tuple[nn.Module, TrainConfig]:
    """The backbone of a checkpoint on `device`, and the configuration of its run, without its loss. `ema`, `recipe`: as below."""
    if recipe:
        resolve(recipe)
    if "config" not in saved.info:
        raise ValueError(f"{saved.path} does not say which network it is of, as runs and imports do")
    # The loss is left out, because it may be defined in a recipe file that is not at hand.
    config = from_dict({name: part for name, part in saved.info["config"].items() if name != "loss"})
    torch.backends.cudnn.allow_tf32 = config.engine.precision != "float32"  # as in the run's own evaluations
    name = config.backbone.name
    if name not in backbones.names():
        remedy = f"{recipe} does not register it either" if recipe else "name the recipe file that registers it: --recipe FILE.py"
        raise ValueError(f"{saved.path} has backbone {name!r}, which is none of protoshard's: {remedy}")
    with torch.device(device):
        module = backbones.build(config.backbone, config.data.image_size)
    try:
        module.load_state_dict(backbone_of(saved, ema))
    except RuntimeError as error:  # lines of what is missing, unknown or of another shape
        raise ValueError(f"{saved.path} does not fit backbone {name!r} as it is now: {' '.join(str(error).split())[:400]}") from error
    return module, config


def evaluate_checkpoint(
    path: str,
    data: str,
    protocol: str | None = None,
    options: Mapping[str, Any] | None = None,
    as_json: bool = False,
    figure: str | None = None,
    no_flip: bool = False,
    ema: bool = False,
    recipe: str | None = None,
) -> None:
    """Prints the figures of the newest checkpoint at `path` on the set `data`, and draws its ROC curve to the file `figure`. With `ema`,
    those of the average that the run kept of its weights. `recipe` is needed for the backbone, and the protocol, that it registers, and for
    nothing else: the configuration is that of the checkpoint. `protocol`, `options`: as `evaluate` has them."""
    if figure:
        from pipeline.evaluation import figures  # first, because the evaluation takes long
    place = join()
    saved = checkpoint.locate(path)
    module, config = load_backbone(saved, place.device, ema, recipe)
    comparison = open_protocol(protocol, data, config.data, options)
    if place.is_first and not as_json:
        log = logging.getLogger(__name__)
        log.warning("evaluating %s on %s", saved.path, without_secrets(data))
        for line in comparison.source.account.remarks(data):
            log.warning(line)
    report = comparison.evaluate(
        Embedder(
            module,
            config.data,
            batch_size=config.evaluation.batch_size,
            flip=config.evaluation.flip and not no_flip,
            device=place.device,
            rank=place.rank,
            world_size=place.world_size,
        )
    )
    if not place.is_first:
        return
    if figure:
        figures.save_png(figures.roc_figure({without_secrets(data): report, **report.groups}, "ROC"), figure)
    if as_json:
        print(json.dumps(report.as_dict()))
        return
    print("\n".join(lines(report)))
