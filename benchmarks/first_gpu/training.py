"""Whole runs of the trainer: the figures of the CPU again, and what a kill and a resume change."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.first_gpu.pictures import faces
from benchmarks.first_gpu.rows import Row, Run, unmeasured

SMALL = ["run.batch=32", "run.epochs=2", "run.log_every=2"]


def train_faces(run: Run) -> Iterator[Row]:
    yield from _rows(run, "faces_small", _data(faces(run), faces(run, "test")), "0.0565 on CPU")


def train_dogs(run: Run) -> Iterator[Row]:
    from pipeline.recipes.data import find_data  # recipes need packages that other steps do without

    paths = [find_data(f"dogs/{name}.tar") for name in ("train", "test")]
    if missing := [path for path in paths if not os.path.exists(path)]:
        yield unmeasured("dogs_small: EER", f"there is no {missing[0]}; PROTOSHARD_DATA names the folder of dogs/")
        return
    overrides = _data(*paths)
    yield from _rows(run, "dogs_small", [*overrides, *(["run.batch=256", "run.epochs=1"] if run.small else [])], "0.1288 on CPU")


def resume(run: Run) -> Iterator[Row]:
    """The same run twice: once undisturbed, once killed after its first checkpoint and started again."""
    overrides = [*_data(faces(run), faces(run, "test")), "checkpoint.every_steps=4", "run.epochs=2", "run.log_every=1"]
    overrides += ["run.batch=32"] if run.small else []
    whole = _train(run, "faces_small", overrides, "undisturbed")
    killed = _train(run, "faces_small", overrides, "killed", kill=True)[-1]["step"]
    resumed = _train(run, "faces_small", overrides, "killed")
    losses = [{row["step"]: row["loss"] for row in rows if "loss" in row} for rows in (whole, resumed)]
    worst = max(abs(losses[1][step] - loss) / abs(loss) for step, loss in losses[0].items())
    note = f"killed at step {killed} of {len(losses[0])}; a GPU may add in another order each time"
    yield Row("killed and resumed, against undisturbed: largest relative deviation of the loss", float(f"{worst:.2g}"), "", "", note)


def _data(train: str, test: str) -> list[str]:
    return [f"data.train={os.path.abspath(train)}", f"evaluation.data={os.path.abspath(test)}"]


def _rows(run: Run, recipe: str, overrides: list[str], target: str) -> Iterator[Row]:
    start = time.perf_counter()
    found = _train(run, recipe, overrides + (SMALL if run.small and recipe == "faces_small" else []), recipe)
    wall = time.perf_counter() - start
    eers = [row["test/eer"] for row in found if "test/eer" in row]
    speeds = [row["images_per_second"] for row in found if "images_per_second" in row]
    waits = [row["wait_share"] for row in found if "wait_share" in row]
    note = f"{eers[0]:.4f} at the start, {found[-1]['step']} steps, {wall:.0f} s"
    yield Row(f"{recipe}: EER", round(eers[-1], 4), "", "" if run.small else target, note)
    yield Row(f"{recipe}: median speed", round(median(speeds)), "images/s", "", f"waiting for data {median(waits):.0%} of the time")


def _train(run: Run, recipe: str, overrides: list[str], name: str, kill: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics of a run in the folder `name`; with `kill` it ends by SIGKILL once a checkpoint is complete."""
    from pipeline import checkpoint

    folder = os.path.join(run.work, name)
    if importlib.util.find_spec("deepspeed") is None:
        overrides = [*overrides, "engine.name=ddp"]
    command = [sys.executable, "-m", "pipeline.cli", "train", recipe, "--set", f"run.folder={folder}", *overrides]
    with subprocess.Popen(command) as process:
        while kill and process.poll() is None and not checkpoint.complete(os.path.join(folder, "checkpoints")):
            time.sleep(0.02)
        if kill:
            process.kill()
    if process.returncode and not kill:
        raise RuntimeError(f"protoshard train {recipe} ended with exit code {process.returncode}, as its log says")
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
