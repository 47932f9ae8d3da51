"""One optimizer step of a run: forward, backward and update of backbone and classifier, or the step left out, on all ranks alike."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dali_loaders import Batch, TrainLoader
from dali_loaders.names import printable
from partial_fc import clip_grad_norm_, found_non_finite
from partial_fc.batch_check import NonFiniteError, ToHost
from pipeline import classifier_state, run_checkpoints
from pipeline.monitor import Monitor
from pipeline.own_time import OwnTime
from pipeline.schedule import rate_factor

SPIKE = "the loss was a spike"


class Run(run_checkpoints.Run, Protocol):
    """What a Trainer has for this."""

    loader: TrainLoader
    monitor: Monitor
    classifier_lr: float
    total_steps: int
    steps_per_epoch: float
    rate: float  # of the backbone, in the last step
    own_time: OwnTime
    cosines: tuple[Tensor, Tensor]  # target and hardest non-target, of the last step that is logged
    counts: list[int] | None  # images of each rank in a micro-batch, where they differ
    joint_norm: Tensor | None  # of backbone and classifier before clipping, if they are clipped together

    def logs(self, step: int) -> bool: ...


def take(run: Run) -> Tensor | None:
    """The loss of one step; None if it was left out."""
    settings, optimizer = run.config.run, run.config.optimizer
    # Dropout depends on (seed, step, rank) only, so a resumed run repeats what an uninterrupted one does.
    torch.manual_seed(int(np.random.SeedSequence((settings.seed, run.step, run.place.rank)).generate_state(1)[0]))
    if settings.margin_warmup:
        share = min(1.0, run.step / (settings.margin_warmup * run.total_steps))
        run.classifier.loss = run.config.loss.with_margins(share)
    run.classifier.step = run.step
    factor = rate_factor(optimizer, run.step, run.total_steps, run.steps_per_epoch)
    run.rate = optimizer.lr * factor
    for group in run.classifier_optimizer.param_groups:  # before backward, which may move prototypes
        group["lr"] = run.classifier_lr * factor
    if optimizer.in_backward or run.classifier_optimizer.is_lazy:  # then prototypes move before the step
        run.saver.fence()
    run.own_time.begin()
    batches: Iterable[Batch] = itertools.islice(run.loader, settings.accumulation)
    if settings.accumulation > 1 and run.config.classifier.sample_rate < 1:
        batches = list(batches)  # the sample of a step holds the classes of all its micro-batches
        in_step = run.counts and [settings.accumulation * count for count in run.counts]
        run.classifier.begin_step(torch.cat([batch.labels for batch in batches]), in_step)
    total = torch.zeros((), device=run.place.device)
    indices: list[np.ndarray] = []
    # A step that is left out would spoil the running statistics of the backbone and of the loss forever.
    kept = _Kept([*run.engine.module.buffers(), *classifier_state.small_tensors(run.classifier)])
    try:
        for micro, batch in enumerate(batches, start=1):
            is_last = micro == settings.accumulation
            indices.append(batch.indices)
            features_bD = run.engine.forward(batch.images, is_last)
            run.own_time.end()
            # The graph is cut here: the classifier's backward ends at the features, the engine continues with their gradient.
            leaf_bD = features_bD.detach().requires_grad_()
            if is_last and run.logs(run.step + 1):  # before prototypes move away from the features they are compared with
                run.cosines = run.classifier.cosines(leaf_bD, batch.labels, run.counts)
            loss = run.classifier(leaf_bD, batch.labels, run.counts) / settings.accumulation
            total += loss.detach()
            run.course.scaler.scale(loss).backward()
            assert leaf_bD.grad is not None
            run.engine.backward(features_bD, leaf_bD.grad, is_last)
            run.own_time.begin()
        run.saver.fence()
        fault = _step(run, total)
    except NonFiniteError as error:  # found on all ranks alike
        raise NonFiniteError(f"{error}; {_name_images(run, run.step + 1, indices)}") from error
    run.classifier_optimizer.step()
    run.classifier_optimizer.zero_grad()
    if fault:
        kept.restore()
    elif run.ema:
        run.ema.update(run.engine.module, run.step)
    run.consumed += settings.batch
    _remember(run, fault, total, indices)
    return None if fault else total


def _step(run: Run, total: Tensor) -> str | None:
    """Moves the backbone, unless something of the step is not finite or its loss is a spike. Returns what is wrong, on every rank the same,
    and then the classifier leaves the step out too."""
    usual, factor = run.course.usual_loss, run.config.run.spike
    loss = ToHost(total.reshape(1)) if factor else None
    if not run.classifier.is_finite():
        run.engine.skip()
        return "features or loss held NaN or infinity"
    is_spike = loss is not None and usual is not None and loss.read()[0] > factor * usual > 0
    scaler = run.course.scaler
    if scaler.is_enabled():
        scaler.unscale_gradients_(run.engine.gradients())
        scaler.unscale_(run.classifier_optimizer)
    if run.config.optimizer.clip_jointly:
        run.joint_norm = clip_grad_norm_(run.engine.module, run.classifier, run.config.optimizer.clip)
        sizes = [run.joint_norm]
    else:
        sizes = run.engine.clip()
    # Ranks decide together, even on the loss, which they all computed.
    sizes += [torch.full((1,), torch.inf, device=run.place.device)] if is_spike else []
    left_out = found_non_finite(sizes, run.classifier)
    if scaler.is_enabled():
        scaler.update()
    run.engine.step(run.rate, left_out)
    if not ToHost(left_out.reshape(1)).read()[0]:  # while the device moves the backbone
        return None
    (spikes,) = run.agreement.highest(int(is_spike))
    if not spikes and not scaler.is_enabled() and run.config.classifier.non_finite == "raise":
        raise NonFiniteError(
            f"the gradient of step {run.step} holds NaN or infinity, though its loss is finite: lower optimizer.lr, or leave such steps "
            "out with classifier.non_finite=skip"
        )
    run.classifier.leave_out()
    return SPIKE if spikes else "a gradient held NaN or infinity"


def _remember(run: Run, fault: str | None, total: Tensor, indices: list[np.ndarray]) -> None:
    course, settings = run.course, run.config.run
    if fault is None:
        course.skipped_in_a_row, course.has_moved = 0, True
        if settings.spike:
            course.losses.append(float(total))
        return
    course.skipped_in_a_row += 1
    if fault == SPIKE:
        _roll_back(run, float(total))
    if course.skipped_in_a_row >= settings.most_skipped:
        raise ValueError(
            f"{course.skipped_in_a_row} steps in a row, up to step {run.step}, were left out, the last because {fault}: lower optimizer.lr "
            f"or lengthen optimizer.warmup_epochs; {run_checkpoints.newest(run)}; "
            f"{_name_images(run, run.step, indices)}"
        )


def _roll_back(run: Run, loss: float) -> None:
    course = run.course
    said = f"step {run.step}: its loss {loss:.4g} is more than {run.config.run.spike:g} times the usual {course.usual_loss:.4g}; left out"
    path = run_checkpoints.roll_back(run) if course.has_moved else None
    if path is not None:
        said += f", and went on with the weights of {path}"
    elif course.has_moved:
        said += ", but there is no checkpoint to go back to yet"
    run.monitor.say(said)


def _name_images(run: Run, step: int, indices: list[np.ndarray]) -> str:
    """Writes FOLDER/not-finite-STEP.txt, a line of rank, index and name for each image of the step, and says so. Every rank calls it."""
    numbers = [int(index) for part in indices if part is not None for index in part]
    mine = [f"{run.place.rank}\t{number}\t{printable(run.source.name(number))}" for number in numbers]
    lines = run.agreement.gather(mine)
    path = os.path.join(run.config.run.folder, f"not-finite-{step}.txt")
    if run.place.is_first:
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write("\n".join(["rank\tindex\tname", *itertools.chain.from_iterable(lines)]) + "\n")
        except OSError as error:  # the run ends with its own fault, not with that of the disk
            return f"its images could not be written to {path} ({error.strerror})"
    return f"{path} names the images of that step"


class _Kept:
    """Numbers that a step may change before it is known whether it counts."""

    def __init__(self, tensors: list[Tensor]) -> None:
        kinds = {tensor.dtype: [other for other in tensors if other.dtype == tensor.dtype] for tensor in tensors}
        self.groups = [(group, [torch.empty_like(tensor) for tensor in group]) for group in kinds.values()]
        for tensors, copies in self.groups:
            torch._foreach_copy_(copies, tensors)  # in few launches

    def restore(self) -> None:
        for tensors, copies in self.groups:
            torch._foreach_copy_(tensors, copies)
