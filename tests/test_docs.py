"""What the documentation tells readers to run."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch

from partial_fc import losses
from tests.partial_fc.losses.parity import check_finite, check_finite_differences, cosines, exact, largest_error, step

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def python_block(page: str) -> str:
    with open(os.path.join(ROOT, "docs", page)) as file:
        (block,) = re.findall(r"```python\n(.*?)```", file.read(), re.DOTALL)
    return block


@pytest.mark.timeout(300)
def test_the_example_of_an_own_training_loop_gives_the_same_losses_on_1_and_3_ranks(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(python_block("own_training_loop.md"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    found = []
    for ranks in (1, 3):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=140)
        assert run.returncode == 0, run.stderr
        found.append([float(loss) for loss in re.findall(r"step \d+ loss (\S+)", run.stdout)])
    assert len(found[0]) == 4 and found[0][-1] < 0.2 * found[0][0]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def focal_cosface(dense, scale, margin, focus):
    """Of docs/adding-a-loss.md, dense."""
    target, others = cosines(dense)
    right, wrong = torch.exp(scale * (target - margin)), torch.exp(scale * others).sum(dim=1)
    return ((wrong / (right + wrong)) ** focus * torch.log((right + wrong) / right)).mean()


def test_the_example_of_adding_a_loss(tmp_path, monkeypatch):
    (tmp_path / "adding_a_loss.py").write_text(python_block("adding-a-loss.md"))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        importlib.import_module("adding_a_loss")
        parameters = {"scale": 16.0, "margin": 0.2, "focus": 2.0}
        for rate in (1.0, 0.4):
            found = step("focal_cosface", parameters, torch.float64, rate, "random", {})
            assert largest_error([found], exact("focal_cosface", parameters, focal_cosface, torch.float64, rate)) < 1e-9
        check_finite("focal_cosface", {"scale": 64.0})
        check_finite_differences("focal_cosface", parameters)
        with pytest.raises(ValueError, match="focus is 11"):
            losses.build("focal_cosface", focus=11)
        with pytest.raises(ValueError, match="did you mean 'focal_cosface'"):
            losses.build("focal_cosfaze")
    finally:
        losses.REGISTRY.pop("focal_cosface", None)
