"""The training loop: batches -> backbone engine -> classifier -> both optimizers. Checkpoints, metrics and evaluation hang off step
boundaries. Between two lines of metrics the host waits for the device only to know that features and loss were finite, while backward is
under way, and gradients, while the backbone moves; with DeepSpeed at the end of each backward pass and four times in the step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from dali_loaders import TrainLoader, open_data
from dali_loaders.names import printable
from dali_loaders.order import build_order
from dali_loaders.progress import announce
from dali_loaders.remote import without_secrets
from dali_loaders.sources import check_images_per_identity
from partial_fc import GradScaler, PartialFC, RowAdamW, RowSGD
from partial_fc.optimizers import RowOptimizer
from pipeline import backbones, combinations, determinism, monitor, run_checkpoints, training_step, uneven_batches
from pipeline.agreement import Agreement
from pipeline.checkpoint import NotFiniteError, OwnerError
from pipeline.config import TrainConfig, as_text, options_of
from pipeline.course import Course
from pipeline.distributed import Place
from pipeline.ema import Ema
from pipeline.engine import build_engine, has_bfloat16
from pipeline.engine.parameters import freeze
from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.evaluator import Evaluator
from pipeline.lease import Lease
from pipeline.metrics_line import MetricsLine
from pipeline.monitor import Monitor, MonitorConfig
from pipeline.own_time import OwnTime
from pipeline.positives import check_positives, check_something_moves
from pipeline.same_data import open_on_all_ranks
from pipeline.stopping import Asked, Stop, Stopped, unsaved
from pipeline.watch import Watch


class Trainer:
    """One rank of a run. `fit` trains from where the run stands to its end; the state of a run is (samples consumed, weights, momentum):
    order, augmentation and dropout are functions of the seed and the sample or step number."""

    def __init__(
        self, config: TrainConfig, place: Place, resume: str = "auto", lease: Lease | None = None, watch: Watch | None = None
    ) -> None:
        self.config, self.place, self.lease = config, place, lease
        combinations.check(config)
        monitor.check(config.monitor)
        determinism.set_up(config.run.deterministic)
        run = config.run
        self.watch = watch or Watch(run.folder, place, run.timeout, Stop())
        self.stop, self.agreement = self.watch.stop, Agreement(run.timeout)
        group = config.data.images_per_identity
        uneven_batches.check(config, place.world_size)
        counts = uneven_batches.counts(config, place.world_size)
        self.counts = None if len({*counts}) == 1 else counts  # images of each rank in a micro-batch, where they differ
        if not config.data.train:
            raise ValueError("data.train is empty: give a folder of identities, a .tar or a .rec with --set data.train=PATH")
        self._begins("opening the data", config.data.train)
        self.source, self.fingerprint = open_on_all_ranks(config.data.train, lambda: open_data(config.data))
        self.steps_per_epoch = build_order(self.source, group, run.seed).epoch_length / run.batch
        least = config.data.min_images
        remedy = "train on them too with --set data.min_images=1"
        counts_C = check_images_per_identity(self.source, least, f"data.min_images is {least}", remedy)
        remark = check_positives(config.loss, counts_C, run.batch // run.accumulation, group)
        self.num_classes = len(self.source.identities)
        if sets := config.evaluation.sets():
            self._begins("opening the evaluation sets", ", ".join(path for _, _, path in sets))
        self.evaluator = Evaluator(config.evaluation, config.data, place, run.folder)

        self._begins("building the network", f"{config.backbone.name}, and the prototypes of {self.num_classes:,} identities")
        torch.manual_seed(run.seed)
        backbone = backbones.build(config.backbone, config.data.image_size)
        freeze(backbone, config.optimizer.frozen)
        check_something_moves(config.loss, backbone)
        self.engine = build_engine(config.engine, config.optimizer, backbone, place, run.accumulation, run.deterministic)
        width, options = config.backbone.width, asdict(config.classifier)
        options |= {"class_counts": torch.from_numpy(counts_C), "seed": run.seed, "device": place.device}
        self.classifier = PartialFC(self.num_classes, width, config.loss, **options)
        self.classifier_lr = config.optimizer.classifier_lr or config.optimizer.lr
        self.classifier_optimizer = self._build_classifier_optimizer()

        self.consumed = 0  # samples
        self.course = Course(GradScaler(place.device.type, enabled=config.engine.precision == "float16"))
        self.joint_norm: Tensor | None = None  # before clipping, if that is of backbone and classifier together
        self.cosines = torch.zeros(1), torch.zeros(1)  # target and hardest non-target, of the last step that is logged
        self.own_time = OwnTime(place.device)
        self.rate = 0.0  # of the backbone, in the last step
        self.total_steps = max(1, math.ceil(run.epochs * self.steps_per_epoch))
        self.ema = Ema(run.ema) if run.ema else None
        self.started_from: dict[str, Any] | None = None
        self.branch: str | None = None
        self.saver = run_checkpoints.saver(self)
        self._begins("looking for a checkpoint", self.checkpoints)
        resumed, self.resume_remarks = run_checkpoints.begin(self, resume)
        self.began_at = self.step
        self.watch.at("starting", self.step)
        first = self.step + bool(resumed)
        if resumed:
            self.evaluator.go_on(self.step, self.ema is not None, self.agreement)
        is_complete = bool(resumed) and self.step >= self.total_steps
        writers = MonitorConfig(writers=()) if is_complete and not self._lacks_figures() else config.monitor  # nothing is left to tell
        told: dict[str, Any] = {"first_step": first, "config": writers, "options": options_of(config), "lease": lease}
        self.monitor = Monitor(run.folder, self.total_steps, place.rank, **told)
        if not is_complete:
            self.monitor.text(first, "config", "```\n" + as_text(config) + "\n```")
        self.monitor.say(
            f"{len(self.source)} images of {self.num_classes} identities, ranks: {place.world_size} on {place.device.type}, "
            f"steps {self.step} to {self.total_steps}" + (f", resumed from {resumed}" if resumed else "")
        )
        if config.classifier.dtype == "bfloat16" and not has_bfloat16(place.device):
            self.monitor.say("this processor emulates bfloat16, several times slower than float32: use classifier.dtype=float32")
        remarks = [*self.source.account.remarks(config.data.train), *getattr(self.source, "remarks", ()), *self.evaluator.remarks]
        for line in filter(None, [*remarks, *self.resume_remarks, remark]):
            self.monitor.say(line)
        if is_complete:
            owed = ", ".join(map(without_secrets, self.evaluator.owed(self.step, averaged=self.ema is not None)))
            then = f"evaluating {owed}, of which it has no figures yet" if owed else "its figures are those it had"
            self.monitor.say(f"this run is complete: nothing is left to train, and {then}")
        self.loader = TrainLoader(
            self.source,
            config.data,
            seed=run.seed,
            global_batch=run.batch // run.accumulation,
            rank=place.rank,
            world_size=place.world_size,
            consumed=self.consumed,
            device=place.device,
            channels_last=True,  # faster in convolutions, on CPU and GPU
            # Under autocast the backbone rounds images to bfloat16 itself; 8-bit ones lose nothing on the way as float16.
            dtype=torch.float16 if place.device.type == "cuda" and config.engine.autocasts(place.device) else torch.float32,
            skipped_path=os.path.join(run.folder, "skipped.txt"),
        )
        self.line = MetricsLine(self)
        self.watch.begin(self.monitor.say if place.is_first else None, getattr(self.loader, "doing", None))

    def _begins(self, doing: str, what: str) -> None:
        self.watch.at(doing)
        announce(f"{doing}: {printable(without_secrets(what))}")

    def _build_classifier_optimizer(self) -> RowOptimizer:
        optimizer = self.config.optimizer
        options: dict[str, Any] = {"unsampled": optimizer.unsampled, "in_backward": optimizer.in_backward}
        if optimizer.classifier == "adamw":
            return RowAdamW(self.classifier, self.classifier_lr, weight_decay=optimizer.weight_decay, **options)
        return RowSGD(self.classifier, self.classifier_lr, optimizer.momentum, optimizer.weight_decay, **options)

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.consumed // self.config.run.batch

    def fit(self) -> dict[str, float]:
        """Trains to the end of the run and returns the last evaluation's figures. Stopped: it was asked to stop, and has saved."""
        self.stop.waits = True
        try:
            return self._fit()
        except Asked as request:
            raise self._stopped(request) from None

    def _fit(self) -> dict[str, float]:
        config = self.config
        self._heed(*self.agreement.highest(self.stop.asked()))
        figures = self.evaluate() if self._owes_evaluation() else None
        self.line.begin()
        while self.step < self.total_steps:
            self.watch.at("a training step", self.step)
            self.line.add(self._train_step())
            if self.step == self.began_at + 1:
                run_checkpoints.reserve(self)
            if self.logs(self.step):
                with self._refusing_not_finite():
                    self.line.write()
            saves = self._is_due(config.checkpoint.every_steps or config.checkpoint.every_epochs * self.steps_per_epoch)
            evaluates = self.step == self.total_steps or self._is_due(config.evaluation.every_epochs * self.steps_per_epoch)
            if saves or evaluates:
                with self.line.pause():
                    if evaluates:
                        figures = self.evaluate()
                    if saves:
                        self.save(figures if evaluates else None)
            self._end_step()
        self.finish_saving()
        return self.evaluate() if figures is None else figures

    def _end_step(self) -> None:
        """What all ranks do together between two steps. Asked, on all of them: to stop. 1 all-reduce of 24 bytes between hosts."""
        is_lost = self.lease is not None and not self.lease.is_ours()
        asked, busy, is_lost_anywhere = self.agreement.highest(self.stop.asked(), self.saver.is_busy(), int(is_lost))
        if is_lost_anywhere:
            raise OwnerError(f"{self.config.run.folder} was taken over by another run: this one ends, and writes no more")
        with self._refusing_not_finite():
            self.saver.go_on(busy)
        self.line.say_saved()
        if self.step < self.total_steps:
            self._heed(asked)

    def _heed(self, asked: int) -> None:
        """asked: the highest `Stop.asked` of all ranks"""
        if asked:
            raise Asked(asked)

    def _stopped(self, request: Asked) -> Stopped:
        """Sees to it that there is a checkpoint of the present step."""
        begun = self.saver.committed if self.saver.flight is None else self.saver.flight.step
        if self.step > self.began_at and begun != self.step:
            self.save()
        self.finish_saving()
        self.stop.obeyed()
        if self.step == self.began_at:
            return request.kind(unsaved(str(request)))
        path = f"{self.checkpoints}/step-{self.step:08d}"
        return request.kind(f"stopped by {request} at step {self.step:,}, saved as {path}: the same command continues")

    def _owes_evaluation(self) -> bool:
        """Whether the evaluation of the present step, of which there is a checkpoint, was broken off."""
        config = self.config.evaluation
        if self.step == 0 or self.step >= self.total_steps or not self.evaluator.names:
            return self.step == 0 and config.at_start
        return self._is_due(config.every_epochs * self.steps_per_epoch) and self._lacks_figures()

    def _lacks_figures(self) -> bool:
        """Whether there are sets of which the present step has no figures yet."""
        return bool(self.evaluator.owed(self.step, averaged=self.ema is not None))

    def _train_step(self) -> Tensor | None:
        """The loss of one step; None if it was left out."""
        return training_step.take(self)

    def logs(self, step: int) -> bool:
        return step % self.config.run.log_every == 0 or step == self.total_steps

    def _is_due(self, every_steps: float) -> bool:
        """True at the first step at or past each multiple of `every_steps` and at the last step; never for 0."""
        return every_steps > 0 and (int(self.step / every_steps) > int((self.step - 1) / every_steps) or self.step == self.total_steps)

    def evaluate(self) -> dict[str, float]:
        """Runs the configured evaluations over all ranks, also with averaged weights; returns the figures of the first, or nothing."""
        breaks = Breaks(self._breaks_off, lambda: self._heed(*self.agreement.highest(self.stop.asked())))
        breaks.agree()
        self.watch.at("evaluation", self.step)
        if self._lacks_figures() or not self.evaluator.names:
            self.line.write_prototypes()
        with torch.compiler.set_stance("force_eager"):  # batches of other sizes are not worth compiling for
            with self.engine.for_evaluation() as module:
                figures = self.evaluator.run(module, self.step, self.monitor, breaks=breaks)
            if self.ema:
                with self.ema.in_place_of(self.engine.module):
                    self.evaluator.run(self.engine.module, self.step, self.monitor, averaged=True, breaks=breaks)
        if self.step >= self.total_steps:  # before the last save, after which nothing of the run is left to tell
            self.monitor.outcome(self.evaluator.newest)
        return figures

    def _breaks_off(self) -> bool:
        self.watch.at("evaluation")
        return bool(self.stop.asked())

    @property
    def checkpoints(self) -> str:
        return self.config.checkpoint.folder or os.path.join(self.config.run.folder, "checkpoints")

    @contextmanager
    def _refusing_not_finite(self) -> Iterator[None]:
        try:
            yield
        except NotFiniteError as error:
            remedy = "lower optimizer.lr or lengthen optimizer.warmup_epochs"
            raise ValueError(f"{error}: {remedy}; {run_checkpoints.newest(self)}") from None

    def save(self, figures: dict[str, float] | None = None) -> None:
        """Begins a checkpoint of this step. Every rank calls it."""
        self.watch.at("saving", self.step)
        with self._refusing_not_finite():
            run_checkpoints.save(self, figures)

    def finish_saving(self) -> None:
        """Waits for the save that is under way. ValueError if the newest state could not be saved."""
        self.watch.at("saving")
        with self._refusing_not_finite():
            self.saver.finish()
        self.line.say_saved()
        if self.saver.trouble is not None:
            raise ValueError(f"{self.saver.trouble}: see to it, and run the same command, which goes on from the newest checkpoint")

    def close(self) -> None:
        self.watch.at("closing")
        self.loader.close()
        self.watch.begin(None, None)
        self.monitor.close()
