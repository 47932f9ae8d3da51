"""What a run writes down at each start that trains: its configuration, the data as it found them, versions and hardware."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from typing import Any, Protocol

import torch

from dali_loaders import Source
from dali_loaders.names import printable
from pipeline.config import TrainConfig, as_dict
from pipeline.distributed import Place
from pipeline.evaluation.evaluator import Evaluator
from pipeline.run_checkpoints import code_version

MOST_LINES, LONGEST = 40, 400  # of what is said of the data


class Run(Protocol):
    """What a Trainer has for this."""

    config: TrainConfig
    place: Place
    source: Source
    evaluator: Evaluator
    total_steps: int
    num_classes: int

    @property
    def step(self) -> int: ...


def description(run: Run) -> dict[str, Any]:
    """Ready for JSON: `config`, as checkpoints have it, and `start`."""
    said = [*run.source.account.remarks(run.config.data.train), *getattr(run.source, "remarks", ()), *run.evaluator.remarks]
    more = [f"... and {len(said) - MOST_LINES} more lines"] if len(said) > MOST_LINES else []
    start = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": run.step,
        "total_steps": run.total_steps,
        "images": len(run.source),
        "identities": run.num_classes,
        "said_of_data": [printable(line)[:LONGEST] for line in said[:MOST_LINES]] + more,
        "ranks": run.place.world_size,
        "device": _name(run.place.device),
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        **code_version(),
    }
    return {"config": as_dict(run.config), "start": start}


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}, {os.cpu_count()} cores"
