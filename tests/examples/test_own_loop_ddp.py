"""The example of an own training loop gives the same losses on 1 and 3 ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "own_loop_ddp.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_losses_are_those_of_one_rank():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = []
    for ranks in (1, 3):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(SCRIPT)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=140)
        assert run.returncode == 0, run.stderr
        found.append([float(loss) for loss in re.findall(r"step \d+ loss (\S+)", run.stdout)])
    assert len(found[0]) == 4 and found[0][-1] < 0.2 * found[0][0]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
