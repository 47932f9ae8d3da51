"""A sum over ranks per step, written to the run folder by rank 0 together with a checkpoint every fifth step."""

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config import TrainConfig
from pipeline.stopping import Asked, Stop

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def train(config: TrainConfig, resume: str = "auto", keep_stop: bool = False) -> dict[str, float]:
    stop = Stop()
    stop.watch(config.run.folder, dist.get_rank(), keep_stop)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    folder = Path(config.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"worker{rank}.json").write_text(
        json.dumps({"pid": os.getpid(), "note": config.run.note, "resume": resume} | {name: os.environ.get(name) for name in VARIABLES})
    )
    if config.fail == "bad input" and rank == ranks - 1:  # the others wait for it in the sum below
        raise ValueError("File faces.tar has no image; give a folder of images.")
    if config.fail == "bug":
        raise RuntimeError("a bug")
    saved = sorted((folder / "checkpoints").glob("step-*"))
    start = int(saved[-1].name.removeprefix("step-")) if resume == "auto" and saved else 0
    dist.barrier()
    total = torch.zeros(())
    for step in range(start, config.steps):
        total = torch.tensor(float(step * (rank + 1)))
        dist.all_reduce(total)
        time.sleep(config.pause)
        if rank == 0:
            with open(folder / "steps.txt", "a") as log:
                log.write(f"{step} {total.item():g} {time.time():.2f}\n")
            print(f"step {step} total {total.item():g}", flush=True)
            if (step + 1) % 5 == 0:
                (folder / "checkpoints" / f"step-{step + 1:08d}").mkdir(parents=True, exist_ok=True)
        asked = torch.tensor(stop.asked())
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked:
            stop.obeyed()
            if rank == 0:
                (folder / "checkpoints" / f"step-{step + 1:08d}").mkdir(parents=True, exist_ok=True)
            raise Asked(int(asked)).kind(f"stopped at step {step + 1}")
    return {"total": total.item()}
