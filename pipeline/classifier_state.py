"""The classifier's part of a run: the tensors that a checkpoint holds of it, and what metrics show of its loss."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from partial_fc import PartialFC
from partial_fc.losses import Loss, name_of
from partial_fc.optimizers import RowOptimizer
from pipeline.checkpoint import Part, Saved, rows, whole

OF_THE_LOSS = ("learned.", "tracked_", "bank_")  # beginnings of the names of tensors that another loss may not have


def state_of(classifier: PartialFC, optimizer: RowOptimizer) -> dict[str, Part]:
    """By name, the tensors themselves: `prototypes` and `learned.NAME`, each with its optimizer's state behind a dot, `tracked_NAME` and
    `bank_NAME`. What has a row per class is one tensor of all classes, sharded over ranks; the rest is equal on every rank."""
    first, num_classes = classifier.shard.first, classifier.shard.num_classes
    replicated = {f"learned.{name}" for name in classifier.loss.learned(num_classes)}
    state: dict[str, Part] = {}
    for name, parameter in classifier.named_parameters():
        tensors = {name: parameter.data, **{f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}}
        for key, tensor in tensors.items():
            has_rows = tensor.ndim > 0 and name not in replicated
            state[key] = rows(tensor, first, num_classes) if has_rows else whole(tensor)
    for name, buffer in classifier.named_buffers():
        if not name.startswith(OF_THE_LOSS):
            continue  # images of each class, which the data tells
        state[name] = rows(buffer, first, num_classes) if name.startswith("bank_") else whole(buffer)
    return state


def load(saved: Saved, info: dict[str, Any], classifier: PartialFC, optimizer: RowOptimizer) -> list[str]:
    """Fills what the checkpoint has too, and leaves the rest as a new classifier has it. Returns a line on each difference. Each rank reads
    its own rows.

    info: what the checkpoint's saver said about it
    """
    ours = state_of(classifier, optimizer)
    # From another loss only what fits can be taken.
    common = {name for name, part in ours.items() if name in saved and saved.shape(name) == part.shape}
    if "prototypes" in saved and "prototypes" not in common:
        raise ValueError(f"it holds prototypes {list(saved.shape('prototypes'))}, but this run has {list(ours['prototypes'].shape)}")
    for name, parameter in classifier.named_parameters():
        # All or nothing: AdamW takes steps of up to 6 times its rate with moments that start anew under a count that goes on.
        state = {f"{name}.{key}" for key in optimizer.state[parameter]}
        common -= set() if state - {f"{name}.step"} <= common else state
    for name in common:
        saved.fill(name, ours[name].tensor, ours[name].start)
    anew = [name for name in ours if name not in common]
    left = [name for name in saved if name not in common and name.startswith(OF_THE_LOSS)]
    lines = []
    before, now = info.get("config", {}).get("loss", {}).get("name"), name_of(classifier.loss)
    if before not in (None, now):
        lines.append(f"the checkpoint was trained with loss {before!r}, this run has {now!r}: what both keep goes on")
    if anew:
        lines.append(f"the checkpoint has no {', '.join(anew)}: started anew")
    if left:
        lines.append(f"the checkpoint's {', '.join(sorted(left))}: left out, because this run has no counterpart")
    return lines


def small_tensors(classifier: PartialFC) -> list[Tensor]:
    """What a loss may write while it is computed, except for the bank: a step that is left out must not change these."""
    return [
        *(parameter.data for parameter in classifier.learned.values() if parameter.ndim == 0),
        *(buffer for name, buffer in classifier.named_buffers() if name.startswith("tracked_")),
    ]


def figures(classifier: PartialFC) -> dict[str, float]:
    """What the loss has learned and tracks, as metrics. Thresholds (numbers whose name ends so) are divided by the loss's scale, so that
    they are cosines; numbers per class are averaged. Every rank calls it, and waits for its device. 1 all-reduce per number per class.
    """
    num_classes, loss = classifier.shard.num_classes, classifier.loss
    scalars = loss.learned(num_classes)
    values: dict[str, float] = {}
    for name, parameter in classifier.learned.items():
        value = parameter.data
        if name not in scalars:
            value = value.double().sum()
            if dist.is_initialized():
                dist.all_reduce(value, group=classifier.group)
            value = value / num_classes
        if value.numel() == 1:
            scale = _scale_of(loss, name) if name.endswith(("threshold", "thresholds")) else None
            values[f"loss/{name}" if scale is None else name] = float(value) / (scale or 1.0)
    for name in classifier.tracked_names:
        tracked = classifier.get_buffer(f"tracked_{name}")
        if tracked.numel() == 1 and not name.endswith("_is_started"):
            values[f"loss/{name}"] = float(tracked)
    return values


def _scale_of(loss: Loss, name: str) -> float | None:
    """The scale of the loss that learns `name`; in a sum of losses, the scale of the part whose name begins it."""
    for part, _, inner in loss.weighted() if hasattr(loss, "weighted") else []:
        if name.startswith(f"{part}_"):
            return _scale_of(inner, name.removeprefix(f"{part}_"))
    scale = getattr(loss, "scale", None)
    return float(scale) if isinstance(scale, int | float) else None
