"""A recipe file whose run does something to itself at a moment: the variable MOMENTS holds "PLACE NUMBER RANK DEED", several with commas.
Steps are counted over the run; evaluated and read batches, saves and openings from each start. `run` gives such a run to a test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dali_loaders.config import DataConfig
from dali_loaders.sources import TarSource
from partial_fc import losses
from pipeline.backbones import BackboneConfig
from pipeline.checkpoint import CheckpointConfig
from pipeline.config import RunConfig, TrainConfig
from pipeline.engine import EngineConfig
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.monitor.config import MonitorConfig
from pipeline.schedule import OptimizerConfig

BATCH, IMAGES, STEPS = 18, 54, 12


def _do(deed: str) -> None:
    Path(os.environ["RUN"] + ".deed").touch()  # when it was
    if deed == "raise":
        raise ArithmeticError("a deed of the test")
    if deed == "refuse":
        EvaluationConfig(batch_size=0)
    if deed == "hang":
        time.sleep(1e6)
    elif deed == "touch":
        Path(os.environ["RUN"], "stop").touch()
    elif deed == "twice":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(1.5)
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(1e6)
    else:
        name, _, whom = deed.partition("-")
        os.kill({"parent": os.getppid(), "group": 0}.get(whom, os.getpid()), getattr(signal, name))


def _hook(owner: object, name: str, place: str) -> None:
    real, calls = getattr(owner, name), 0

    def hooked(*arguments, **options):
        nonlocal calls
        calls += 1
        number = arguments[0].step if place == "step" else calls
        if place == "step" and "TIMEOUT" in os.environ:
            arguments[0].watch._timeout = float(os.environ["TIMEOUT"])  # run.timeout, but not for the start, which may be slower
        for moment in filter(None, os.environ.get("MOMENTS", "").split(",")):
            at, count, rank, deed = moment.split()
            if (at, int(count)) == (place, number) and rank in (os.environ.get("RANK", "0"), "all"):
                _do(deed)
        return real(*arguments, **options)

    setattr(owner, name, hooked)


def recipe() -> TrainConfig:
    from pipeline import train, trainer
    from pipeline.evaluation import embed

    if "RANK" in os.environ or os.environ.get("ALONE"):
        _hook(trainer.Trainer, "_train_step", "step")
        _hook(trainer.run_checkpoints, "save", "save")
        _hook(embed, "normalize", "evaluation")
        _hook(train, "join", "joining")
        _hook(trainer, "open_data", "opening")
        _hook(TarSource, "read_many", "batch")
    data = os.path.join(os.path.dirname(os.environ["RUN"]), "faces.tar")
    return TrainConfig(
        run=RunConfig(batch=BATCH, epochs=STEPS * BATCH / IMAGES, log_every=1, seed=5, folder=os.environ["RUN"]),
        data=DataConfig(train=data, image_size=32, threads=1),
        backbone=BackboneConfig("small", width=16),
        loss=losses.build("cosface", scale=16.0, margin=0.2),
        optimizer=OptimizerConfig(lr=0.05),
        engine=EngineConfig("ddp", precision="float32"),
        checkpoint=CheckpointConfig(every_steps=5, keep=9),
        evaluation=EvaluationConfig(data=data, every_epochs=1.0, batch_size=4),
        monitor=MonitorConfig(()),  # whose pictures would take half the time of a run
    )


PROTOSHARD = (sys.executable, "-m", "pipeline.cli")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipeline.cli")


def run(
    folder: Path, moments: str = "", *arguments: str, command: Sequence[str] = PROTOSHARD, start_new_session: bool = False, **variables: str
) -> tuple[int, str]:
    """Exit code and output of a run in `folder`, whose parent has faces.tar; on 2 ranks unless `arguments` say otherwise."""
    ranks = () if command == TORCHRUN else ("--ranks", "2")
    job = subprocess.Popen(
        [*command, "train", __file__, *(arguments or ranks)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "RUN": str(folder), "MOMENTS": moments, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=start_new_session,
        # Tests in the background of a shell, or under nohup, ignore these signals, and would pass that on.
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
    )
    try:
        output, _ = job.communicate(timeout=200)
    finally:
        job.kill()  # its ranks follow
    return job.returncode, output
