"""What Ray costs a run: the same recipe on this machine under torchrun and under launch/multinode.sh, in turns.

    python -m benchmarks.ray_overhead                       # 3 rounds of 300 steps on 2 ranks, about 5 minutes
Example: python -m benchmarks.ray_overhead --rounds 5 --csv benchmarks/results/ray_overhead.csv
Times of steps are medians of a run's lines of metrics; the start of a run is compared with `ray.init` and an empty `fit()`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.slow_links import step_seconds

ROOT = Path(__file__).resolve().parents[1]
EMPTY = """
import ray, sys
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
ray.init(num_cpus=int(sys.argv[1]), logging_level="ERROR")
TorchTrainer(lambda: None, scaling_config=ScalingConfig(num_workers=int(sys.argv[1]))).fit()
"""


def main() -> None:
    options = parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="protoshard-bench-") as folder:
        draw = ["data", "faces", f"{folder}/faces.tar", "--identities", "40", "--images", "10", "--size", "64"]
        subprocess.run([sys.executable, "-m", "pipeline.cli", *draw], check=True, env=environment(), capture_output=True)
        record.report(rounds(options, folder), as_text, options.json, options.csv)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ray_overhead", description="What Ray costs a run.")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--steps", type=int, default=300, metavar="N")
    parser.add_argument("--ranks", type=int, default=2, metavar="N")
    parser.add_argument("--csv", default=os.path.join(record.FOLDER, "ray_overhead.csv"), metavar="FILE")
    parser.add_argument("--json", action="store_true")
    return parser


def rounds(options: argparse.Namespace, folder: str) -> Iterator[dict[str, Any]]:
    for number in range(options.rounds):
        row: dict[str, Any] = {"round": number, "ranks": options.ranks, "steps": options.steps}
        kinds = ["torchrun", "ray"] if number % 2 else ["ray", "torchrun"]
        for kind in kinds:
            row[f"{kind}_step_ms"], row[f"{kind}_start_s"] = measured(kind, options, f"{folder}/{kind}-{number}", folder)
        began = time.perf_counter()
        command = [sys.executable, "-c", EMPTY, str(options.ranks)]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, env=environment())
        row["empty_fit_s"] = time.perf_counter() - began
        row = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
        order = ("round", "ranks", "steps", "torchrun_step_ms", "ray_step_ms", "torchrun_start_s", "ray_start_s", "empty_fit_s")
        row["step_overhead"] = float(f"{row['ray_step_ms'] / row['torchrun_step_ms'] - 1:.3g}")
        yield {name: row[name] for name in (*order, "step_overhead")}


def measured(kind: str, options: argparse.Namespace, run: str, folder: str) -> tuple[float, float]:
    """(milliseconds of a step, seconds from the command to the first step's end)"""
    epochs = options.steps * 128 / 400
    settings = [f"data.train={folder}/faces.tar", "evaluation.data=", "run.log_every=10", f"run.epochs={epochs}", f"run.folder={run}"]
    settings += ["data.threads=1", "engine.precision=float32", "checkpoint.every_epochs=1000"]
    words = [word for setting in settings for word in ("--set", setting)]
    if kind == "ray":
        command = ["bash", str(ROOT / "launch" / "multinode.sh"), "faces_small", "--ranks-per-node", str(options.ranks), *words]
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        command = [*torchrun, "-m", "pipeline.cli", "train", "faces_small", *words]
    began, first = time.perf_counter(), 0.0
    process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = Path(run, "metrics.jsonl")
    while process.poll() is None:
        if not first and metrics.exists() and metrics.stat().st_size:
            first = time.perf_counter() - began
        time.sleep(0.05)
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: {process.stderr.read()[-500:]}")
    return 1e3 * step_seconds(run, 128), first


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def as_text(row: dict[str, Any]) -> str:
    return (
        f"round {row['round']}: a step under torchrun {row['torchrun_step_ms']:.1f} ms, under Ray {row['ray_step_ms']:.1f} ms "
        f"({row['step_overhead']:+.1%}); first line of metrics after {row['torchrun_start_s']:.1f} s and {row['ray_start_s']:.1f} s, "
        f"an empty fit takes {row['empty_fit_s']:.1f} s"
    )


if __name__ == "__main__":
    main()
