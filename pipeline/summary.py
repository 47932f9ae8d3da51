"""The last words of a run: what it reached, how fast, and where to look."""

from __future__ import annotations

import json
import os
from statistics import median
from typing import Any

from pipeline import checkpoint

SHOWN = {"eer": "EER", "tar_at_far/1e-2": "TAR@FAR=1e-2", "rank1": "rank-1", "accuracy": "accuracy"}


def summary(folder: str) -> str:
    """A short text from FOLDER/metrics.jsonl and the checkpoints beside it."""
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    lines = [""]
    for name in dict.fromkeys(key.split("/")[0] for row in rows for key in row if "/" in key):
        for key, title in SHOWN.items():
            values = [(row["step"], row[f"{name}/{key}"]) for row in rows if f"{name}/{key}" in row]
            if values:
                before = f"{values[0][1]:.4f} at step {values[0][0]} -> " if len(values) > 1 else ""
                lines.append(f"{name + ' ' + title:28}{before}{values[-1][1]:.4f} at step {values[-1][0]}")
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    if speeds:
        lines.append(f"{'images/s':28}{median(speeds):.0f} (median)")
    checkpoints = os.path.join(folder, "checkpoints")
    lines += [f"{'checkpoint':28}{os.path.join(checkpoints, name)}" for name in checkpoint.complete(checkpoints)[-1:]]
    lines += [f"{'ROC figure':28}{os.path.join(folder, name)}" for name in sorted(os.listdir(folder)) if name.startswith("roc-")][-1:]
    lines.append(f"{'curves':28}tensorboard --logdir {os.path.join(folder, 'tensorboard')}")
    return "\n".join(lines)
