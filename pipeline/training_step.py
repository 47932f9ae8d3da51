"""One optimizer step of a run: forward, backward and update of backbone and classifier, or the step left out, on all ranks alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dali_loaders import Batch
from partial_fc import clip_grad_norm_
from pipeline import checkpoint, classifier_state
from pipeline.schedule import rate_factor

if TYPE_CHECKING:
    from pipeline.trainer import Trainer

MOST_SKIPPED = 100  # steps in a row


def take(trainer: Trainer) -> Tensor | None:
    """The loss of one step; None if it was left out."""
    run, optimizer = trainer.config.run, trainer.config.optimizer
    # Dropout depends on (seed, step, rank) only, so a resumed run repeats what an uninterrupted one does.
    torch.manual_seed(int(np.random.SeedSequence((run.seed, trainer.step, trainer.place.rank)).generate_state(1)[0]))
    if run.margin_warmup:
        share = min(1.0, trainer.step / (run.margin_warmup * trainer.total_steps))
        trainer.classifier.loss = trainer.config.loss.with_margins(share)
    trainer.classifier.step = trainer.step
    factor = rate_factor(optimizer, trainer.step, trainer.total_steps, trainer.steps_per_epoch)
    trainer.rate = optimizer.lr * factor
    for group in trainer.classifier_optimizer.param_groups:  # before backward, which may move prototypes
        group["lr"] = trainer.classifier_lr * factor
    batches: Iterable[Batch] = itertools.islice(trainer.loader, run.accumulation)
    if run.accumulation > 1 and trainer.config.classifier.sample_rate < 1:
        batches = list(batches)  # the sample of a step holds the classes of all its micro-batches
        trainer.classifier.begin_step(torch.cat([batch.labels for batch in batches]))
    total = torch.zeros((), device=trainer.place.device)
    # One batch of features that are not finite would spoil the running statistics of the backbone and of the loss forever.
    kept = [*trainer.engine.module.buffers(), *classifier_state.small_tensors(trainer.classifier)]
    buffers = [(buffer, buffer.clone()) for buffer in kept if trainer.config.classifier.non_finite == "skip"]
    for micro, batch in enumerate(batches, start=1):
        is_last = micro == run.accumulation
        features_bD = trainer.engine.forward(batch.images, is_last)
        # The graph is cut here: the classifier's backward ends at the features, the engine continues with their gradient.
        leaf_bD = features_bD.detach().requires_grad_()
        if is_last and trainer.logs(trainer.step + 1):  # before prototypes move away from the features they are compared with
            trainer.cosines = trainer.classifier.cosines(leaf_bD, batch.labels)
        loss = trainer.classifier(leaf_bD, batch.labels) / run.accumulation
        loss.backward()
        assert leaf_bD.grad is not None
        trainer.engine.backward(features_bD, leaf_bD.grad, is_last)
        total += loss.detach()
    is_finite = trainer.classifier.is_finite()
    if is_finite:
        if optimizer.clip_jointly:
            trainer.joint_norm = clip_grad_norm_(trainer.engine.module, trainer.classifier, optimizer.clip)
        trainer.engine.step(trainer.rate)
        if trainer.ema:
            trainer.ema.update(trainer.engine.module, trainer.step)
    else:
        trainer.engine.skip()
        for buffer, before in buffers:
            buffer.copy_(before)
    trainer.classifier_optimizer.step()
    trainer.classifier_optimizer.zero_grad()
    trainer.consumed += run.batch
    trainer.skipped_in_a_row = 0 if is_finite else trainer.skipped_in_a_row + 1
    if trainer.skipped_in_a_row == MOST_SKIPPED:
        raise ValueError(
            f"{MOST_SKIPPED} steps in a row, up to step {trainer.step}, were skipped because their features held NaN or infinity: lower "
            f"optimizer.lr or lengthen optimizer.warmup_epochs; the newest checkpoint is {checkpoint.newest(trainer.checkpoints)}"
        )
    return total if is_finite else None
