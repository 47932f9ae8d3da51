"""What of a run is in its checkpoints: written at a step boundary, taken over by a run that goes on, and in part by a new run that starts
from another one's weights."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor

from dali_loaders import Source
from partial_fc import PartialFC
from partial_fc.optimizers import RowOptimizer
from pipeline import checkpoint, classifier_state
from pipeline.checkpoint.parts import Held, Part
from pipeline.config import TrainConfig, as_dict
from pipeline.course import Course
from pipeline.distributed import Place
from pipeline.ema import Ema
from pipeline.engine import Engine
from pipeline.same_data import ORDER, differences
from pipeline.starting_weights import Start

LABELS = {"identities": "identity names with the checksum"}  # what sentences call an entry of the checkpoint


class Run(Protocol):
    """What a Trainer has for this."""

    config: TrainConfig
    place: Place
    source: Source
    fingerprint: dict[str, Any]  # of the source
    engine: Engine
    classifier: PartialFC
    classifier_optimizer: RowOptimizer
    ema: Ema | None
    course: Course
    consumed: int  # samples
    started_from: dict[str, Any] | None  # `Start.origin`

    @property
    def step(self) -> int: ...

    @property
    def checkpoints(self) -> str: ...

    def check_finite(self, tensors: Iterable[Tensor]) -> None: ...


def identity(run: Run) -> dict[str, Any]:
    """What a checkpoint and the run that goes on from it must agree on."""
    config = run.config
    return {
        "num_classes": run.fingerprint["num_classes"],
        "identities": run.fingerprint["identities"],
        "width": config.backbone.width,
        "backbone": config.backbone.name,
        "image_size": config.data.image_size,
        "optimizer": config.optimizer.name,
        "frozen": sorted(config.optimizer.frozen),
        "batch": config.run.batch,
        "images_per_identity": config.data.images_per_identity,
    }


def order(run: Run) -> dict[str, Any]:
    """What decides which image stands at which place of the stream, beside what is in `identity`."""
    values = {**run.fingerprint, "seed": run.config.run.seed}
    return {key: values[key] for key in ORDER}


def save(run: Run) -> str:
    """Writes a checkpoint of this step and returns its path. Every rank calls it."""
    info = {
        **identity(run),
        **order(run),
        "consumed": run.consumed,
        "skipped_steps": run.classifier.skipped_steps,
        "course": run.course.state(),
        "world_size": run.place.world_size,
        "started_from": run.started_from,
        "config": as_dict(run.config),
    }
    run.classifier_optimizer.flush()
    parts = run.engine.state()
    if run.ema:
        parts |= run.ema.state(run.engine.module)
    state = {**_whole(parts), **classifier_state.state_of(run.classifier, run.classifier_optimizer)}
    # A checkpoint that cannot be continued should not push out one that can.
    run.check_finite(_local(tensor) for tensor in state.values() if tensor.is_floating_point())
    return checkpoint.save(run.checkpoints, run.step, state, info, run.config.checkpoint.keep, run.source.identities)


def begin(run: Run, resume: str) -> tuple[str | None, list[str]]:
    """Brings a new Trainer to where its run stands: on from the checkpoint that `resume` (auto, none or a path) means, else from the
    weights that the configuration names (start.weights), else as it is. Returns the checkpoint it goes on from, and lines on what was and
    was not taken over. Every rank calls it."""
    path = _checkpoint_of(run, resume)
    if path is not None:
        return path, _go_on(run, path)
    lines = _start(run, Start(run.config.start)) if run.config.start.weights else []
    if resume == "none":
        checkpoint.set_aside(run.config.run.folder)  # once nothing can be refused any more
    if run.ema:
        run.ema.restart(run.engine.module)
    return None, lines


def _checkpoint_of(run: Run, resume: str) -> str | None:
    folder, source = run.config.run.folder, run.config.start.weights
    if resume != "none":
        return checkpoint.newest(run.checkpoints) if resume == "auto" else checkpoint.locate(resume)
    if source and _is_within(source, folder):
        raise ValueError(f"--resume none would rename {folder}, where {source} lies: choose another folder with --set run.folder=PATH")
    return None


def _is_within(path: str, folder: str) -> bool:
    folder = os.path.realpath(folder)
    return os.path.commonpath([os.path.realpath(path), folder]) == folder


def _start(run: Run, source: Start) -> list[str]:
    """A new run with the weights of another one: step 0, and nothing of its optimizers' state."""
    config = run.config
    size = config.data.image_size
    network = f"backbone {config.backbone.name} of width {config.backbone.width} for images of {size} x {size}"
    with run.engine.for_evaluation() as module:
        weights = source.backbone(module, network)
    run.engine.load(Held({f"backbone.{name}": tensor for name, tensor in weights.items()}))
    run.started_from = source.origin
    lines = [f"a new run with the {'averaged ' if config.start.ema else ''}backbone weights of {source.path}"]
    if config.start.classifier:
        lines.append(source.prototypes(run.classifier, run.source.identities))
        kept = sorted({*run.classifier.learned, *run.classifier.tracked_names})
        lines += [f"what the loss learns and keeps starts anew: {', '.join(kept)}"] if kept else []
    return lines


def _go_on(run: Run, path: str) -> list[str]:
    info = checkpoint.read_info(path)
    _check_start(run, path, info)
    if "batch" in info:  # written by a run, not imported
        info = {"images_per_identity": 1, "frozen": [], **info}  # what earlier versions did
    for key, ours in identity(run).items():
        # An imported checkpoint may lack a classifier, and so its class count, or an optimizer.
        if info.get(key) not in (None, ours):
            raise ValueError(
                f"checkpoint {path} has {LABELS.get(key, key)} {info[key]}, but this run has {ours}: go on with the recipe and data it was "
                "trained with, or begin a new run with its backbone, with --from instead of --resume and a run.folder of its own"
            )
    lines = _check_order(run, path, info)
    lines += _load(run, path, info)
    run.course.load(info.get("course", {}))
    run.consumed, run.started_from = info["consumed"], info.get("started_from")
    run.classifier.skipped_steps = info.get("skipped_steps", 0)
    checkpoint.supersede(run.checkpoints, run.step)
    return lines


def roll_back(run: Run) -> str | None:
    """Weights and optimizer state of the newest sound checkpoint, which is returned; the place in the data stays as it is. None if there is
    no checkpoint. Every rank calls it."""
    path = checkpoint.newest(run.checkpoints)
    if path is not None:
        info = checkpoint.read_info(path)
        _load(run, path, info)
        run.course.roll_back(info.get("course", {}))
    return path


def _load(run: Run, path: str, info: dict[str, Any]) -> list[str]:
    lines = classifier_state.load(path, info, run.classifier, run.classifier_optimizer)
    run.engine.load(
        Held(
            {
                **checkpoint.load_replicated(path, "backbone."),
                **checkpoint.load_replicated(path, "optimizer."),
                **checkpoint.load_replicated(path, "buffers_of_ranks"),
            }
        )
    )
    return lines + _load_ema(run, path)


def _check_order(run: Run, path: str, info: dict[str, Any]) -> list[str]:
    """Images that stand elsewhere than before would come twice in an epoch, or not at all. Earlier versions did not write down where."""
    changed = ", ".join(differences(order(run), info))
    if not changed:
        return []
    if run.config.data.changed == "refuse":
        raise ValueError(
            f"the data has changed since checkpoint {path}: {changed}. Go on with the data as it was, or admit the change with --set "
            "data.changed=continue: from here on images come in a new order, in the epoch under way some twice or not at all"
        )
    return [f"the data has changed since the checkpoint ({changed}): a new order, in this epoch some images come twice or not at all"]


def _check_start(run: Run, path: str, info: dict[str, Any]) -> None:
    """A restart of a run goes on from its own checkpoints, with the same --from or without it; with another, they belong to another run."""
    start, before = run.config.start, info.get("started_from")
    if start.weights and (before is None or not start.is_that_of(before)):
        began = "did not begin with another one's weights"
        if before:
            began = f"began with {before['given']} (classifier={before['classifier']}, ema={before['ema']})"
        raise ValueError(
            f"--from {start.weights}: the run of checkpoint {path} {began}. To begin a new run, give it a folder of its own with --set "
            "run.folder=PATH, or keep the one there aside with --resume none; to go on with that run, leave out --from"
        )


def _load_ema(run: Run, path: str) -> list[str]:
    saved = checkpoint.load_replicated(path, "ema")
    if not run.ema:
        return ["the checkpoint's average of the weights: left out, because run.ema is 0"] if saved else []
    run.ema.restart(run.engine.module)
    if not saved:
        return ["the checkpoint has no average of the weights: it starts with the weights as they are"]
    run.ema.load(run.engine.module, Held(saved))
    return []


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(parts: dict[str, Part]) -> dict[str, Tensor]:
    import torch
    import torch.distributed as dist

    mine = [(name, part.tensor.detach().cpu().reshape(-1), part.shape, part.start) for name, part in parts.items()]
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    state: dict[str, Tensor] = {}
    for name, tensor, shape, start in [one for each in found for one in each]:
        out = state.setdefault(name, torch.zeros(shape, dtype=tensor.dtype))
        out.view(-1)[start : start + tensor.numel()] = tensor
    return state
