"""What monitoring costs: windows of training steps that end with a line of metrics, and windows without, in turn in one run.

python -m benchmarks.monitor faces_small --rounds 9
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import record
from dali_loaders.progress import show_warnings
from pipeline.commands import Overrides
from pipeline.config import TrainConfig
from pipeline.distributed import join
from pipeline.resolve import resolve
from pipeline.trainer import Trainer


def measure(config: TrainConfig, rounds: int) -> dict[str, Any]:
    """The cost of a line, in two ways: `ratio` is the median over rounds of the time of `run.log_every` steps with a line by that without
    one; `share` is the time of what a line adds (the cosines of its step, and the line) by that of the steps, which is less noisy. The
    cost of an evaluation beside its own figures, `evaluation_s`, is that of its pictures and of the prototypes."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(replace(config, run=replace(config.run, folder=folder, epochs=1e6)), join(config.engine.device))
        try:
            return _measure(trainer, rounds)
        finally:
            trainer.close()


def _measure(trainer: Trainer, rounds: int) -> dict[str, Any]:
    steps, is_cuda = trainer.config.run.log_every, trainer.place.device.type == "cuda"
    added: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = now()
            result = call(*arguments)
            added[-1] += now() - began
            return result

        return run

    def now() -> float:
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def window(has_line: bool) -> float:
        trainer.logs = lambda step: has_line and step % steps == 0  # type: ignore[method-assign]
        began = now()
        for _ in range(steps):
            trainer.line.add(trainer._train_step())
            if trainer.logs(trainer.step):
                write()
        return now() - began

    write = timed(trainer.line.write)
    trainer.classifier.cosines = timed(trainer.classifier.cosines)
    added.append(0.0)
    trainer.line.begin()
    window(True)  # to warm up
    pairs = []
    for number in range(rounds):
        added.append(0.0)
        order = (True, False) if number % 2 else (False, True)
        times = {has_line: window(has_line) for has_line in order}
        pairs.append((times[True], times[False]))
    with_s, without_s = np.array(pairs).T
    began = now()
    trainer.line.write_prototypes()
    row: dict[str, Any] = {
        "network": trainer.config.backbone.name,
        "batch": trainer.config.run.batch,
        "classes": trainer.num_classes,
        "log_every": steps,
        "rounds": rounds,
        "step_ms": round(1000 * float(np.median(without_s)) / steps, 2),
        "line_ms": round(1000 * float(np.median(added[1:])), 2),
        "prototypes_ms": round(1000 * (now() - began), 2),
    }
    return row | {
        "ratio": round(float(np.median(with_s / without_s)), 4),
        "share": round(float(np.median(added[1:]) / np.median(without_s)), 5),
        "bytes_per_line": _bytes_per_line(trainer),
    }


def _bytes_per_line(trainer: Trainer) -> int:
    """Of metrics.jsonl and TensorBoard together."""

    def size() -> int:
        return sum(
            path.stat().st_size for path in Path(trainer.config.run.folder).rglob("*") if path.name.startswith(("metrics", "events"))
        )

    before = size()
    for _ in range(10):
        trainer.line.add(trainer._train_step())
        trainer.line.write()
    return (size() - before) // 10


def as_text(row: dict[str, Any]) -> str:
    return "\n".join(f"{name:20}{value}" for name, value in row.items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--set", nargs="+", action=Overrides, default=[], metavar="section.field=value", help="override fields")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="windows of each kind (9)")
    parser.add_argument("--csv", default=os.path.join(record.FOLDER, "monitor.csv"), metavar="FILE", help="append a row to it")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, but at least 1 is needed")
    show_warnings()
    config = resolve(options.recipe, options.set)
    record.report((measure(config, options.rounds) for _ in range(1)), as_text, False, options.csv)


if __name__ == "__main__":
    main()
