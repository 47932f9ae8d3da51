"""Folders as runs leave them, without the training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pipeline.evaluation.curves_so_far import CurvesSoFar
from pipeline.evaluation.kept import Kept
from pipeline.evaluation.report import HISTOGRAM_EDGES, OperatingPoints, Report

OF = {"path": "/data/test.tar", "bytes": 9, "images": 300, "labels": "abc", "flip": True}


def report(seed: int = 0, apart: float = 1.5, wide: float = 0.01, groups: dict[str, Report] | None = None) -> Report:
    """Of 500 genuine and 2,000 impostor pairs whose mean cosines are `apart` standard deviations apart."""
    rng = np.random.default_rng(seed)
    scores = np.clip(np.concatenate([rng.normal(0.2 * apart, 0.2, 500), rng.normal(0, 0.2, 2000)]), -1, 1)
    same = np.arange(2500) < 500
    points = OperatingPoints.of_scores(scores, same)
    figures, thresholds = points.figures()
    counts = [np.histogram(scores[kind], HISTOGRAM_EDGES)[0] for kind in (same, ~same)]
    figures |= {"rank1": 1 - figures["eer"], "images": 300, "identities": 30}
    intervals = {name: (value - wide, value + wide) for name, value in figures.items() if isinstance(value, float)}
    tables = {"thresholds": [{"group": "fold 1", "threshold": 0.3, "eer": 0.1, "far_at_common": 0.1, "tar_at_common": 0.9}]}
    return Report(figures, thresholds, "threshold_at_eer", points.roc(), *counts, intervals, tables, groups or {})


def metrics_line(step: int, **more: float) -> str:
    values = {"loss": 20 - step / 100, "learning_rate": 0.1, "gradient_norm": 3.0, "images_per_second": 100.0, "epoch": step / 50}
    return json.dumps({"step": step, "time": 1e9 + step, **values, **more})


def run(
    folder: Path, config: dict | None = None, reports: dict[int, Report] | None = None, name: str = "test", of: dict | None = None
) -> Path:
    """Steps 10 to 100 of 100, evaluated at the given ones."""
    folder.mkdir(parents=True, exist_ok=True)
    reports = {0: report(0, 0.5), 100: report(1)} if reports is None else reports
    config = {"run": {"folder": str(folder), "epochs": 2, "batch": 64}, "loss": {"name": "cosface"}, **(config or {})}
    start = {"total_steps": 100, "images": 3200, "identities": 100, "said_of_data": ["train.tar: 2 seen, 1 used"], "torch": "2.0"}
    (folder / "run.json").write_text(json.dumps({"data.train": "train.tar", "config": config, "start": start}))
    lines = [metrics_line(step) for step in range(10, 101, 10)]
    kept, curves = Kept(str(folder), 10**9), CurvesSoFar(folder / f"curves-{name}.npz", of or OF)
    for step, one in reports.items():
        values = {key: value for key, value in one.numbers().items() if value is not None}
        lines.append(json.dumps({"step": step, "time": 1e9 + step, **{f"{name}/{key}": value for key, value in values.items()}}))
        kept.add(step, name, of or OF, values | {"best_cosine": 0.3}, one)
        curves.with_newest(step, one)
        curves.write()
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder
