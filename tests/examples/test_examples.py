"""The examples train, give the same losses on any number of ranks, and go on from a checkpoint as if nothing had been."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Threads of gloo that outlive their group abort some processes while the interpreter ends (docs/own_training_loop.md): so they are counted.
RUNNER = """
import atexit, glob, importlib.util, sys
def count():
    print("threads of gloo:", sum("gloo" in open(name).read() for name in glob.glob("/proc/self/task/*/comm")), flush=True)
atexit.register(count)
spec = importlib.util.spec_from_file_location("example", sys.argv[1])
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
example.EPOCHS = int(sys.argv[2])
example.main(*sys.argv[3:])
"""


def train(ranks: int, folder: Path, script: str, *arguments: str, epochs: int = 4) -> list[float]:
    """The losses that an example prints, started as torchrun does, in `folder`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(ROOT / "examples" / script), str(epochs), *arguments],
            cwd=folder,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=140) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), said
    assert all("threads of gloo: 0" in output for output, _ in said)
    return [float(loss) for loss in re.findall(r"(?:step|epoch) \d+ loss (\S+)", said[0][0])]


@pytest.mark.slow
def test_plain_ddp_gives_the_same_losses_on_1_and_3_ranks(tmp_path):
    alone, together = (train(ranks, tmp_path, "own_loop_ddp.py") for ranks in (1, 3))
    assert len(alone) == 4 and alone[-1] < 0.2 * alone[0]
    assert together == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_accelerate_gives_the_losses_of_1_process_on_2_that_were_interrupted(tmp_path):
    alone = train(1, tmp_path, "accelerate_loop.py", "alone")
    assert len(alone) == 4 and alone[-1] < 0.2 * alone[0]
    first = train(2, tmp_path, "accelerate_loop.py", "together", epochs=2)
    second = train(2, tmp_path, "accelerate_loop.py", "together")
    assert first + second == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_lightning_gives_the_losses_of_1_rank_on_2_that_were_interrupted(tmp_path):
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
    alone = train(1, tmp_path / "alone", "lightning_module.py", "1")
    assert len(alone) == 4 and alone[-1] < 0.2 * alone[0]
    first = train(2, tmp_path / "together", "lightning_module.py", "2", epochs=2)
    (checkpoint,) = (tmp_path / "together").rglob("*.ckpt")
    second = train(2, tmp_path / "together", "lightning_module.py", "2", str(checkpoint))
    assert first + second == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_an_example_can_be_read_in_one_sitting(script):
    assert len(script.read_text().splitlines()) < 80
