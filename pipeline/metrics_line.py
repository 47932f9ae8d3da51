"""The lines of metrics of a run: means over the steps since the last line, what the device and the host hold, and what is said of saves."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import classifier_state, training_step
from pipeline.checkpoint import NotFiniteError
from pipeline.checkpoint.folder import NAME
from pipeline.monitor.json_lines import rows_at_end
from pipeline.prototype_figures import prototype_figures

GIB = 1 << 30


class Run(training_step.Run, Protocol):
    """What a Trainer has for this."""


class MetricsLine:
    """Collects one line at a time. Between two of them nothing waits for the device."""

    def __init__(self, run: Run) -> None:
        self._run, self._process = run, psutil.Process()
        self._said = run.saver.committed
        self._losses: list[Tensor | None] = []
        self._start = self._waited_before = 0.0

    def begin(self) -> None:
        """Before the first step: from here on time counts."""
        self._losses = []
        self._run.own_time.take()
        self._start, self._waited_before = time.perf_counter(), self._run.loader.wait_seconds

    def add(self, loss: Tensor | None) -> None:
        """The loss of a step; None if it was left out."""
        self._losses.append(loss)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no training: its time is left out of the speed."""
        if self._run.place.device.type == "cuda":
            torch.cuda.synchronize()  # so that the pause does not swallow the time of steps still under way
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def write(self) -> None:
        """Writes the line, which waits for the device, and begins the next. NotFiniteError for the loss. Every rank calls it. 2 all-reduces
        of some numbers, and those of the loss's own figures."""
        run = self._run
        target_B, hardest_B = run.cosines
        losses = [loss for loss in self._losses if loss is not None]
        loss = float(torch.stack(losses).mean()) if losses else math.nan
        seconds = time.perf_counter() - self._start
        waited = (run.loader.wait_seconds - self._waited_before) / seconds
        own_N = [0.0] * run.place.world_size  # of every rank, each of which knows its own
        own_N[run.place.rank] = run.own_time.take() / max(1, len(self._losses))
        sums = torch.tensor([waited, len(run.loader.skipped), *own_N], device=run.place.device)
        dist.all_reduce(sums)
        waited, skipped, *own_N = sums.tolist()
        if losses and not math.isfinite(loss):
            raise NotFiniteError(f"the loss is not finite at step {run.step}")
        if run.saver.trouble is not None:
            run.monitor.say(run.saver.trouble)
        values = {
            "loss": loss,
            "target_cosine": float(target_B.mean()),
            "hardest_non_target_cosine": float(hardest_B.mean()),
            "learning_rate": run.rate,
            "gradient_norm": run.engine.gradient_norm() if run.joint_norm is None else float(run.joint_norm),
            "images_per_second": len(self._losses) * run.config.run.batch / seconds,
            "wait_share": waited / run.place.world_size,
            "save_stall": run.saver.stall,
            **_differences(own_N),
            "skipped_images": skipped,
            "skipped_steps": run.classifier.skipped_steps,
            **run.course.figures(run.config.run.spike),
            "epoch": run.step / run.steps_per_epoch,
            **classifier_state.figures(run.classifier),
            **self._memory(),
        }
        run.monitor.scalars(run.step, values)
        self.begin()

    def _memory(self) -> dict[str, float]:
        """The most that any rank has: of host memory now, of its GPU's since the last line."""
        names, held = ["memory/host_gib"], [self._process.memory_info().rss]
        if self._run.place.device.type == "cuda":
            names += ["memory/gpu_gib", "memory/gpu_reserved_gib"]
            held += [torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()]
            torch.cuda.reset_peak_memory_stats()
        most = torch.tensor(held, dtype=torch.float64, device=self._run.place.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return dict(zip(names, (most / GIB).tolist(), strict=True))

    def write_prototypes(self) -> None:
        """A line on the prototypes, at an evaluation, unless it was written before that was broken off. Every rank calls it."""
        run = self._run
        values, histograms = prototype_figures(run.classifier, run.classifier_optimizer)
        rows = rows_at_end(Path(run.config.run.folder, "metrics.jsonl"), run.step)
        if any(values.keys() <= row.keys() for row in rows):
            return
        run.monitor.scalars(run.step, values)
        for name, counted in histograms.items():
            run.monitor.histogram(run.step, name, *counted)

    def say_saved(self) -> None:
        """A line on a checkpoint that is complete, once."""
        committed = self._run.saver.committed
        if committed not in (None, self._said):
            self._said = committed
            self._run.monitor.say(f"checkpoint saved: {self._run.checkpoints}/{NAME.format(committed)}")


def _differences(own_N: list[float]) -> dict[str, float]:
    """Between ranks, in the seconds of a step that each needs itself."""
    if len(own_N) == 1:
        return {}
    slowest = max(own_N)
    return {
        "step_seconds/quickest": min(own_N),
        "step_seconds/slowest": slowest,
        "step_seconds/slowest_rank": float(own_N.index(slowest)),
    }
