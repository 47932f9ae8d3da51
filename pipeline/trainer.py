"""The training loop: batches -> backbone engine -> classifier -> both optimizers. Checkpoints, metrics and evaluation hang off step
boundaries. Between two lines of metrics the host waits for the device only to know that features were finite, while backward is under
way, and with DeepSpeed at the end of each backward pass and three times for the gradient norm."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dali_loaders import TrainLoader, open_data
from dali_loaders.order import build_order
from dali_loaders.sources import check_images_per_identity
from partial_fc import PartialFC, RowAdamW, RowSGD
from partial_fc.optimizers import RowOptimizer
from pipeline import backbones, checkpoint, classifier_state, run_checkpoints, training_step
from pipeline.agreement import Agreement
from pipeline.checkpoint import NotFiniteError
from pipeline.config import TrainConfig, as_text
from pipeline.distributed import Place
from pipeline.ema import Ema
from pipeline.engine import average_buffers, build_engine, has_bfloat16
from pipeline.engine.parameters import freeze
from pipeline.evaluation.evaluator import Evaluator
from pipeline.lease import Lease
from pipeline.monitor import Monitor
from pipeline.positives import check_positives, check_something_moves
from pipeline.same_data import open_on_all_ranks


class Trainer:
    """One rank of a run. `fit` trains from where the run stands to its end; the state of a run is (samples consumed, weights, momentum):
    order, augmentation and dropout are functions of the seed and the sample or step number."""

    def __init__(self, config: TrainConfig, place: Place, resume: str = "auto", lease: Lease | None = None) -> None:
        self.config, self.place, self.lease = config, place, lease
        run = config.run
        self.agreement = Agreement(run.timeout)
        group = config.data.images_per_identity
        if run.batch % (run.accumulation * place.world_size * group):
            groups = f" and data.images_per_identity = {group}" if group > 1 else ""
            raise ValueError(
                f"run.batch is {run.batch}, which {place.world_size} ranks with run.accumulation = {run.accumulation}{groups} do not "
                f"divide: use a multiple of {run.accumulation * place.world_size * group}"
            )
        if not config.data.train:
            raise ValueError("data.train is empty: give a folder of identities, a .tar or a .rec with --set data.train=PATH")
        self.source, self.fingerprint = open_on_all_ranks(config.data.train, lambda: open_data(config.data))
        self.steps_per_epoch = build_order(self.source, group, run.seed).epoch_length / run.batch
        least = config.data.min_images
        remedy = "train on them too with --set data.min_images=1"
        counts_C = check_images_per_identity(self.source, least, f"data.min_images is {least}", remedy)
        remark = check_positives(config.loss, counts_C, run.batch // run.accumulation, group)
        self.num_classes = len(self.source.identities)
        self.evaluator = Evaluator(config.evaluation, config.data, place, run.folder)

        torch.manual_seed(run.seed)
        backbone = backbones.build(config.backbone, config.data.image_size)
        freeze(backbone, config.optimizer.frozen)
        check_something_moves(config.loss, backbone)
        self.engine = build_engine(config.engine, config.optimizer, backbone, place, run.accumulation)
        width, options = config.backbone.width, asdict(config.classifier)
        options |= {"class_counts": torch.from_numpy(counts_C), "seed": run.seed, "device": place.device}
        self.classifier = PartialFC(self.num_classes, width, config.loss, **options)
        self.classifier_lr = config.optimizer.classifier_lr or config.optimizer.lr
        self.classifier_optimizer = self._build_classifier_optimizer()

        norms = [part for part in backbone.modules() if isinstance(part, nn.BatchNorm1d) and part.training]
        if run.batch == run.accumulation * place.world_size and norms:
            raise ValueError(
                f"run.batch is {run.batch}: one image per rank and micro-batch, of which backbone {config.backbone.name} cannot take batch "
                f"statistics: use at least {2 * run.batch}"
            )
        self.consumed, self.skipped_in_a_row = 0, 0  # samples, steps
        self.joint_norm: Tensor | None = None  # before clipping, if that is of backbone and classifier together
        self.cosines = torch.zeros(1), torch.zeros(1)  # target and hardest non-target, of the last step that is logged
        self.rate = 0.0  # of the backbone, in the last step
        self.total_steps = max(1, math.ceil(run.epochs * self.steps_per_epoch))
        self.ema = Ema(run.ema) if run.ema else None
        self.started_from: dict[str, Any] | None = None
        self.saver = run_checkpoints.saver(self)
        resumed, self.resume_remarks = run_checkpoints.begin(self, resume)
        first = self.step + bool(resumed)
        self.monitor = Monitor(run.folder, self.total_steps, place.rank, first_step=first, every=run.log_every, lease=lease)
        self.monitor.text(self.step, "config", "```\n" + as_text(config) + "\n```")
        self.monitor.say(
            f"{len(self.source)} images of {self.num_classes} identities, ranks: {place.world_size} on {place.device.type}, "
            f"steps {self.step} to {self.total_steps}" + (f", resumed from {resumed}" if resumed else "")
        )
        if config.classifier.dtype == "bfloat16" and not has_bfloat16(place.device):
            self.monitor.say("this processor emulates bfloat16, several times slower than float32: use classifier.dtype=float32")
        remarks = [*self.source.account.remarks(config.data.train), *getattr(self.source, "remarks", ()), *self.evaluator.remarks]
        for line in filter(None, [*remarks, *self.resume_remarks, remark]):
            self.monitor.say(line)
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

    def _build_classifier_optimizer(self) -> RowOptimizer:
        optimizer, accumulation = self.config.optimizer, self.config.run.accumulation
        if optimizer.in_backward and accumulation > 1:
            raise ValueError(
                f"optimizer.in_backward moves prototypes in every backward pass, but run.accumulation = {accumulation} takes several for a "
                "step: choose one of them"
            )
        options: dict[str, Any] = {"unsampled": optimizer.unsampled, "in_backward": optimizer.in_backward}
        if optimizer.classifier == "adamw":
            return RowAdamW(self.classifier, self.classifier_lr, weight_decay=optimizer.weight_decay, **options)
        return RowSGD(self.classifier, self.classifier_lr, optimizer.momentum, optimizer.weight_decay, **options)

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.consumed // self.config.run.batch

    def fit(self) -> dict[str, float]:
        """Trains to the end of the run and returns the last evaluation's figures."""
        config = self.config
        figures = self.evaluate() if self.step == 0 and config.evaluation.at_start else {}
        self._open_window()
        while self.step < self.total_steps:
            self.losses.append(self._train_step())
            if self.logs(self.step):
                self._log()
            saves = self._is_due(config.checkpoint.every_steps or config.checkpoint.every_epochs * self.steps_per_epoch)
            evaluates = self.step == self.total_steps or self._is_due(config.evaluation.every_epochs * self.steps_per_epoch)
            if saves or evaluates:
                if self.place.device.type == "cuda":
                    torch.cuda.synchronize()  # so that the pause does not swallow the time of steps still under way
                pause = time.perf_counter()
                if evaluates:
                    figures = self.evaluate()
                if saves:
                    self.save(figures if evaluates else {})
                self.window_start += time.perf_counter() - pause
            self._end_step()
        self.finish_saving()
        return figures or self.evaluate()

    def _end_step(self) -> None:
        """What all ranks do together between two steps."""
        if self.saver.flight is not None:
            with self._refusing_not_finite():
                (busy,) = self.agreement.highest(self.saver.is_busy())
                self.saver.go_on(busy)

    def _train_step(self) -> Tensor | None:
        """The loss of one step; None if it was left out."""
        return training_step.take(self)

    def logs(self, step: int) -> bool:
        return step % self.config.run.log_every == 0 or step == self.total_steps

    def _is_due(self, every_steps: float) -> bool:
        """True at the first step at or past each multiple of `every_steps` and at the last step; never for 0."""
        return every_steps > 0 and (int(self.step / every_steps) > int((self.step - 1) / every_steps) or self.step == self.total_steps)

    def _open_window(self) -> None:
        """Metrics are means over the steps since the last line of them."""
        self.losses: list[Tensor | None] = []
        self.window_start, self.waited_before = time.perf_counter(), self.loader.wait_seconds

    def _log(self) -> None:
        """One line of metrics; waits for the device."""
        target_B, hardest_B = self.cosines
        losses = [loss for loss in self.losses if loss is not None]
        loss = float(torch.stack(losses).mean()) if losses else math.nan
        seconds = time.perf_counter() - self.window_start
        waited = (self.loader.wait_seconds - self.waited_before) / seconds
        sums = torch.tensor([waited, len(self.loader.skipped)], device=self.place.device)
        dist.all_reduce(sums)
        waited, skipped = sums.tolist()
        if losses and not math.isfinite(loss):
            with self._refusing_not_finite():
                raise NotFiniteError(f"the loss is not finite at step {self.step}")
        if self.saver.trouble is not None:
            self.monitor.say(self.saver.trouble)
        values = {
            "loss": loss,
            "target_cosine": float(target_B.mean()),
            "hardest_non_target_cosine": float(hardest_B.mean()),
            "learning_rate": self.rate,
            "gradient_norm": self.engine.gradient_norm() if self.joint_norm is None else float(self.joint_norm),
            "images_per_second": len(self.losses) * self.config.run.batch / seconds,
            "wait_share": waited / self.place.world_size,
            "skipped_images": skipped,
            "skipped_steps": self.classifier.skipped_steps,
            "epoch": self.step / self.steps_per_epoch,
            **classifier_state.figures(self.classifier),
        }
        self.monitor.scalars(self.step, values)
        self._open_window()

    def evaluate(self) -> dict[str, float]:
        """Runs the configured evaluations over all ranks, also with averaged weights; returns the figures of the first, or nothing."""
        module = self.engine.module
        average_buffers(module)
        with torch.compiler.set_stance("force_eager"):  # batches of other sizes are not worth compiling for
            figures = self.evaluator.run(module, self.step, self.monitor)
            if self.ema:
                with self.ema.in_place_of(module):
                    self.evaluator.run(module, self.step, self.monitor, averaged=True)
        return figures

    @property
    def checkpoints(self) -> str:
        return self.config.checkpoint.folder or os.path.join(self.config.run.folder, "checkpoints")

    @contextmanager
    def _refusing_not_finite(self) -> Iterator[None]:
        try:
            yield
        except NotFiniteError as error:
            newest = checkpoint.newest(self.checkpoints, self.agreement)
            raise ValueError(
                f"{error}: lower optimizer.lr or lengthen optimizer.warmup_epochs; the newest good checkpoint is {newest and newest.path}"
            ) from None

    def save(self, figures: dict[str, float] | None = None) -> None:
        """Begins a checkpoint of this step. Every rank calls it."""
        with self._refusing_not_finite():
            run_checkpoints.save(self, figures)

    def finish_saving(self) -> None:
        """Waits for the save that is under way. ValueError if the newest state could not be saved."""
        with self._refusing_not_finite():
            self.saver.finish()
        if self.saver.trouble is not None:
            raise ValueError(f"{self.saver.trouble}: see to it, and run the same command, which goes on from the newest checkpoint")

    def close(self) -> None:
        self.loader.close()
        self.monitor.close()
