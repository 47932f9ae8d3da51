"""A run that is killed at random moments, and started again by the same command each time, ends with the weights of one that was not."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from tests.pipeline.runs import faces

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
from dataclasses import replace

from pipeline.evaluation.evaluator import EvaluationConfig
from tests.pipeline.runs import BATCH, IMAGES, configuration


def recipe():
    every = {every} * BATCH / IMAGES
    evaluation = EvaluationConfig(data={data!r}, every_epochs=4 * every)
    options = {{"save_every": {every}, "evaluation": evaluation, "run": {{"ema": 0.9, "log_every": 20}}}}
    made = configuration({data!r}, "", {steps}, backbone="small", **options)
    return replace(made, backbone=replace(made.backbone, dropout=0.2))
"""


def start(recipe, folder, log):
    command = [sys.executable, "-m", "pipeline.cli", "train", str(recipe), "--ranks", "2", "--set", f"run.folder={folder}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)


def kill(process):
    """All of its processes at once, as a power loss does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)


def finish(process, log, steps):
    try:
        assert process.wait(timeout=200 + steps) == 0, log.read_text()
    except subprocess.TimeoutExpired:
        kill(process)
        raise


def newest_step(folder):
    names = checkpoint.complete(str(folder / "checkpoints"))
    return int(names[-1].removeprefix("step-")) if names else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "kills"), [(40, 1), pytest.param(2000, 50, marks=[pytest.mark.long, pytest.mark.timeout(3600)])], ids=["few", "many"]
)
def test_the_weights_of_a_killed_run_are_those_of_one_that_was_not(tmp_path, steps, kills):
    data = faces(str(tmp_path))
    recipe, log = tmp_path / "recipe.py", tmp_path / "log"
    recipe.write_text(RECIPE.format(data=data, steps=steps, every=10))
    began = time.monotonic()
    finish(start(recipe, tmp_path / "whole", log), log, steps)
    seconds = time.monotonic() - began
    chance = random.Random(steps)
    for _ in range(kills):
        before = newest_step(tmp_path / "broken")
        process = start(recipe, tmp_path / "broken", log)
        # Some die while they start, most later, in a step, a save or an evaluation, and none gets much further than its share.
        moment = time.monotonic() + chance.uniform(0, seconds / max(4, kills // 2))
        where = chance.choice(["anywhere", "later"])
        while where == "later" and process.poll() is None and newest_step(tmp_path / "broken") == before:
            time.sleep(0.001)
            moment = time.monotonic() + chance.uniform(0, 0.5 * seconds * 10 / steps)
        while time.monotonic() < moment and process.poll() is None:
            time.sleep(0.001)
        kill(process)
        assert process.returncode == -signal.SIGKILL, log.read_text()
        found = re.search(r"resumed from \S+step-(\d+)", log.read_text())
        assert found is None or int(found[1]) == before
        assert "Traceback" not in log.read_text(), log.read_text()
    finish(start(recipe, tmp_path / "broken", log), log, steps)
    whole, broken = (checkpoint.locate(str(tmp_path / name)) for name in ("whole", "broken"))
    assert whole.info["step"] == broken.info["step"] == steps
    assert set(whole) == set(broken)
    for name in whole:
        assert torch.equal(whole.whole(name), broken.whole(name)), name
