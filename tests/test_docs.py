"""What the documentation tells readers to run."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

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
