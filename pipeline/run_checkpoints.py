"""What of a run is in its checkpoints: written at a step boundary, taken over by a run that goes on, and in part by a new run that starts
from another one's weights."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import platform
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import torch

import partial_fc
from dali_loaders import Source
from partial_fc import PartialFC
from partial_fc.optimizers import RowOptimizer
from pipeline import checkpoint, classifier_state, same_run
from pipeline.agreement import Agreement
from pipeline.checkpoint import Checkpoint, Held, NotFiniteError, Part, Saved, Saver, Without, checksum
from pipeline.config import TrainConfig, as_dict
from pipeline.course import Course
from pipeline.distributed import Place
from pipeline.ema import Ema
from pipeline.engine import Engine
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.set_names import AVERAGED
from pipeline.lease import Lease
from pipeline.lease_files import LOGS, is_used
from pipeline.run_folder import data_paths
from pipeline.starting_weights import Start

log = logging.getLogger(__name__)

OF_JOB = "PROTOSHARD_JOB"  # the variable in which the ranks of a job of launch/multinode.sh find its name
MOVED = ("prototypes", "optimizer.")  # beginnings of the names of what only an optimizer's step changes; a loss may set what it learns
# Beginnings of the figures by which a checkpoint can be the best, also of a group of a set.
TO_COMPARE = ("accuracy", "eer", "map", "mfr", "rank", "spread", "tar_at_far", "tpir_at_fpir")


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
    evaluator: Evaluator
    agreement: Agreement
    lease: Lease | None
    saver: Saver
    course: Course
    steps_per_epoch: float
    consumed: int  # samples
    started_from: dict[str, Any] | None  # `Start.origin`
    branch: str | None  # of which checkpoint, by `_fingerprint`, --resume PATH made this run another one's, or went back in it

    @property
    def step(self) -> int: ...

    @property
    def checkpoints(self) -> str: ...


def saver(run: Run) -> Saver:
    """ValueError for a figure, in checkpoint.best, that no evaluation of this run gives."""
    best = run.config.checkpoint.best
    sets = [name + end for name in run.evaluator.names.values() for end in ("", AVERAGED)[: 1 + bool(run.ema)]]
    of_sets = [best.removeprefix(f"{name}/").split("/") for name in sets if best.startswith(f"{name}/")]
    if best and not any(part.startswith(TO_COMPARE) for parts in of_sets for part in parts):
        remedy = f"such as {sets[0]}/eer" if sets else "and there is none: name a set with evaluation.data, .pairs or .protocols"
        raise ValueError(f"checkpoint.best is {best!r}, but must be a figure of one of this run's evaluation sets, {remedy}")
    owner = {} if run.lease is None else {"check_owner": run.lease.check}
    return Saver(run.checkpoints, run.config.checkpoint, run.agreement, **owner)


def save(run: Run, figures: dict[str, float] | None = None) -> None:
    """Begins a checkpoint of this step, with the figures of all sets if `figures` are those of an evaluation of it. Every rank calls it."""
    best, newest = run.config.checkpoint.best, run.evaluator.newest if figures else {}
    if newest and best and best not in newest and run.agreement.rank == 0:
        log.warning("checkpoint.best is %r, which is none of the figures: they are %s", best, ", ".join(newest))
    info = {
        **same_run.identity(run),
        **same_run.order(run),
        "consumed": run.consumed,
        "epoch": run.step / run.steps_per_epoch,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "owner": run.lease and run.lease.token,
        "skipped_steps": run.classifier.skipped_steps,
        "figures": newest,
        "course": run.course.state(),
        "branch": run.branch,
        "world_size": run.place.world_size,
        "started_from": run.started_from,
        "code": code_version(),
        "config": as_dict(run.config),
    }
    run.classifier_optimizer.flush()
    run.saver.start(run.step, state(run), info, run.source.identities)


def reserve(run: Run) -> None:
    """Gets the memory that saves will need. Every rank calls it, after a step: then all of the optimizers' state is there."""
    run.saver.reserve(state(run))


def state(run: Run) -> dict[str, Part]:
    """This rank's parts of all tensors of a checkpoint; rows that wait for missed steps (optimizer.unsampled=lazy) as they are."""
    parts = {**run.engine.state(), **classifier_state.state_of(run.classifier, run.classifier_optimizer)}
    if run.ema:
        parts |= run.ema.state(run.engine.module)
    moved = {f"backbone.{name}" for name, _ in run.engine.module.named_parameters()}
    return {name: replace(part, settled=name in moved or name.startswith(MOVED)) for name, part in parts.items()}


@functools.cache
def code_version() -> dict[str, str | None]:
    """What wrote a checkpoint: versions, and the commit where this is a checkout."""
    root, commit = Path(__file__).resolve().parents[1], None
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), "rev-parse", "HEAD"]
            commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return {"protoshard": partial_fc.__version__, "commit": commit, "torch": torch.__version__}


def begin(run: Run, resume: str) -> tuple[str | None, list[str]]:
    """Brings a new Trainer to where its run stands: on from the checkpoint that `resume` (auto, none or a path) means, else from the
    weights that the configuration names (start.weights), else as it is. Returns the checkpoint it goes on from, and lines on what was and
    was not taken over. Every rank calls it."""
    saved = _checkpoint_of(run, resume)
    if saved is not None:
        after = None if resume == "auto" else _after(run, saved)
        if after is not None:
            line = (
                f"--resume {saved.path} began this run, so it goes on; to go back once more, change an option or choose another run.folder"
            )
            return after.path, [line, *_go_on(run, after)]
        lines = _go_on(run, saved)
        run.branch = run.branch if resume == "auto" else _fingerprint(saved)
        return saved.path, lines
    lines = _start(run, Start(run.config.start)) if run.config.start.weights else []
    if resume == "none":
        set_aside(run.config.run.folder, run.agreement)  # once nothing can be refused any more
        checkpoint.supersede(run.checkpoints, -1, run.agreement)  # of those that lie elsewhere
        if run.lease:
            run.lease.follow()
    if run.ema:
        run.ema.restart(run.engine.module)
    return None, lines


def _checkpoint_of(run: Run, resume: str) -> Checkpoint | None:
    folder = run.config.run.folder
    if resume != "none":
        return checkpoint.newest(run.checkpoints, run.agreement) if resume == "auto" else checkpoint.locate(resume, run.agreement)
    for source in [run.config.start.weights, *data_paths(run.config)]:
        if source and _is_within(source, folder):
            raise ValueError(f"--resume none would rename {folder}, where {source} lies: choose another folder with --set run.folder=PATH")
    return None


def _after(run: Run, saved: Checkpoint) -> Checkpoint | None:
    """The run's newest checkpoint, if it began at `saved` with the same configuration: the same command, given again, goes on."""
    try:
        newest = checkpoint.newest(run.checkpoints, run.agreement)
    except ValueError:  # all are damaged, and put aside
        return None
    same = newest is not None and newest.info.get("branch") == _fingerprint(saved) and not same_run.changed(run, newest.info)
    return newest if same else None


def _fingerprint(saved: Checkpoint) -> str:
    """Of all that a checkpoint says: also of when and by which run it was written."""
    return checksum.of(json.dumps(saved.info, sort_keys=True).encode())


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


def _go_on(run: Run, saved: Checkpoint) -> list[str]:
    path, info = saved.path, saved.info
    if info.get("consumed") is None:
        raise ValueError(f"checkpoint {path} is not that of a run: begin a new run with its weights, with --from instead of --resume")
    same_run.check_start(run, path, info)
    lines = same_run.check_identity(run, saved)
    lines += same_run.check_order(run, path, info)
    lines += _take_over(run, saved)
    run.consumed, run.started_from, run.branch = info["consumed"], info.get("started_from"), info.get("branch")
    run.classifier.skipped_steps = info.get("skipped_steps", 0)
    run.course.load(info.get("course", {}))
    if checkpoint.supersede(run.checkpoints, run.step, run.agreement, saved):
        run.saver.committed = run.step  # and need not be saved again
    return lines + same_run.changed_fields(run, info)


def newest(run: Run) -> str:
    """For a sentence at the end of a run: the newest sound checkpoint, once what is being saved is there too. Every rank calls it."""
    with contextlib.suppress(NotFiniteError):
        run.saver.finish()
    try:
        found = checkpoint.newest(run.checkpoints, run.agreement)
    except ValueError as error:
        return str(error)
    return "there is no checkpoint yet" if found is None else f"the newest good checkpoint is {found.path}"


def roll_back(run: Run) -> str | None:
    """Weights and optimizers as in the newest sound checkpoint, whose path is returned, or None where there is none; the run's place in the
    data stays. Every rank calls it."""
    run.saver.finish()
    saved = checkpoint.newest(run.checkpoints, run.agreement)
    if saved is not None:
        _take_over(run, saved)
        run.course.roll_back(saved.info.get("course", {}))
    return None if saved is None else saved.path


def _take_over(run: Run, saved: Checkpoint) -> list[str]:
    optimizer, because = run.config.optimizer, None
    if saved.info.get("optimizer") not in (None, optimizer.name):
        because = "because it is of another kind"
    elif optimizer.name == "adamw" and run.config.engine.name == "deepspeed" and not _have_moved_alike(saved, optimizer.frozen):
        because = "because some weights have moved less often than others, which DeepSpeed does not count"  # see classifier_state.load
    tensors: Saved = Without(saved, "optimizer.") if because else saved
    lines = [f"the state of the backbone's optimizer starts anew, {because}"] if because else []
    lines += classifier_state.load(saved, saved.info, run.classifier, run.classifier_optimizer)
    run.engine.load(tensors)
    return lines + _load_ema(run, saved)


def _have_moved_alike(saved: Checkpoint, frozen: tuple[str, ...]) -> bool:
    """Whether AdamW has made the same number of steps with all weights of the backbone that move from here on."""
    counts = {float(saved.whole(name)) for name in saved if name.startswith("optimizer.") and name.endswith(".step")}
    return set(saved.info.get("frozen", ())) == set(frozen) and len(counts) < 2


def _load_ema(run: Run, saved: Saved) -> list[str]:
    is_saved = any(name.startswith("ema.") for name in saved)
    if not run.ema:
        return ["the checkpoint's average of the weights: left out, because run.ema is 0"] if is_saved else []
    run.ema.restart(run.engine.module)
    if not is_saved:
        return ["the checkpoint has no average of the weights: it starts with the weights as they are"]
    run.ema.load(run.engine.module, saved)
    return []


def set_aside(folder: str, agreement: Agreement) -> None:
    """Renames an earlier run's folder, so that a new start loses nothing, and makes an empty one. Every rank calls it. Where FOLDER is a
    symbolic link, that is done to the folder it leads to."""
    folder = os.path.realpath(folder) if os.path.islink(folder) else folder
    fault = None
    if agreement.rank == 0 and os.path.isdir(folder) and is_used(folder):
        number = next(number for number in itertools.count(1) if not os.path.exists(f"{folder}.{number}"))
        try:
            os.rename(folder, f"{folder}.{number}")
            os.makedirs(folder)
            _bring_back_logs(f"{folder}.{number}", folder)
            print(f"kept the earlier run as {folder}.{number}", file=sys.stderr)
        except OSError as error:  # it is mounted, say
            fault = f"the earlier run in {folder} cannot be renamed ({error.strerror}): move it yourself"
    fault = agreement.of_first(fault)
    if fault:
        raise ValueError(fault)


def _bring_back_logs(aside: str, folder: str) -> None:
    """Those of the present job, which a launcher has begun in the folder of the earlier run; open files come along."""
    job = os.environ.get(OF_JOB)
    if job and os.path.isdir(os.path.join(aside, LOGS, job)):
        with contextlib.suppress(OSError):
            os.makedirs(os.path.join(folder, LOGS))
            os.rename(os.path.join(aside, LOGS, job), os.path.join(folder, LOGS, job))
