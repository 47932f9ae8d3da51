"""One optimizer step of a run: forward, backward and update of backbone and classifier, or the step left out, on all ranks alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dali_loaders import Batch, TrainLoader
from partial_fc import PartialFC, clip_grad_norm_
from partial_fc.optimizers import RowOptimizer
from pipeline import checkpoint, classifier_state
from pipeline.config import TrainConfig
from pipeline.distributed import Place
from pipeline.ema import Ema
from pipeline.engine import Engine
from pipeline.schedule import rate_factor

MOST_SKIPPED = 100  # steps in a row


class Run(Protocol):
    """What a Trainer has for this."""

    config: TrainConfig
    place: Place
    loader: TrainLoader
    engine: Engine
    classifier: PartialFC
    classifier_optimizer: RowOptimizer
    classifier_lr: float
    ema: Ema | None
    consumed: int  # samples
    skipped_in_a_row: int  # steps
    total_steps: int
    steps_per_epoch: float
    rate: float  # of the backbone, in the last step
    cosines: tuple[Tensor, Tensor]  # target and hardest non-target, of the last step that is logged
    joint_norm: Tensor | None  # of backbone and classifier before clipping, if they are clipped together

    @property
    def step(self) -> int: ...

    @property
    def checkpoints(self) -> str: ...

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
    batches: Iterable[Batch] = itertools.islice(run.loader, settings.accumulation)
    if settings.accumulation > 1 and run.config.classifier.sample_rate < 1:
        batches = list(batches)  # the sample of a step holds the classes of all its micro-batches
        run.classifier.begin_step(torch.cat([batch.labels for batch in batches]))
    total = torch.zeros((), device=run.place.device)
    # One batch of features that are not finite would spoil the running statistics of the backbone and of the loss forever.
    kept = [*run.engine.module.buffers(), *classifier_state.small_tensors(run.classifier)]
    buffers = [(buffer, buffer.clone()) for buffer in kept if run.config.classifier.non_finite == "skip"]
    for micro, batch in enumerate(batches, start=1):
        is_last = micro == settings.accumulation
        features_bD = run.engine.forward(batch.images, is_last)
        # The graph is cut here: the classifier's backward ends at the features, the engine continues with their gradient.
        leaf_bD = features_bD.detach().requires_grad_()
        if is_last and run.logs(run.step + 1):  # before prototypes move away from the features they are compared with
            run.cosines = run.classifier.cosines(leaf_bD, batch.labels)
        loss = run.classifier(leaf_bD, batch.labels) / settings.accumulation
        loss.backward()
        assert leaf_bD.grad is not None
        run.engine.backward(features_bD, leaf_bD.grad, is_last)
        total += loss.detach()
    is_finite = run.classifier.is_finite()
    if is_finite:
        if optimizer.clip_jointly:
            run.joint_norm = clip_grad_norm_(run.engine.module, run.classifier, optimizer.clip)
        run.engine.step(run.rate)
        if run.ema:
            run.ema.update(run.engine.module, run.step)
    else:
        run.engine.skip()
        for buffer, before in buffers:
            buffer.copy_(before)
    run.classifier_optimizer.step()
    run.classifier_optimizer.zero_grad()
    run.consumed += settings.batch
    run.skipped_in_a_row = 0 if is_finite else run.skipped_in_a_row + 1
    if run.skipped_in_a_row == MOST_SKIPPED:
        raise ValueError(
            f"{MOST_SKIPPED} steps in a row, up to step {run.step}, were skipped because their features held NaN or infinity: lower "
            f"optimizer.lr or lengthen optimizer.warmup_epochs; the newest checkpoint is {checkpoint.newest(run.checkpoints)}"
        )
    return total if is_finite else None
