"""Thresholds at false accept rates: those of the evaluation whose figures a checkpoint carries, or measured on a set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.report import Report
from pipeline.evaluation.set_names import AVERAGED, set_names
from pipeline.export.description import Thresholds

NAME = "threshold_at_far/"  # begins the names of such figures


def is_of(name: str, ema: bool) -> bool:
    """Whether a figure (SET/eer) is one of the averaged weights, or for False of the last ones."""
    return (f"{AVERAGED}/" in name) == ema


def of_figures(figures: Mapping[str, Any] | None, ema: bool, only: str | None = None) -> Thresholds | None:
    """Of the first set, in the order of a checkpoint's figures (SET/threshold_at_far/1e-3), that has any, or of the set `only`; with `ema`
    of the averaged weights. None where there is none."""
    by_set: dict[str, dict[str, float]] = {}
    for name, value in (figures or {}).items():
        set_name, found, far = name.rpartition(f"/{NAME}")
        set_name = set_name.removesuffix(AVERAGED)
        if found and value is not None and is_of(name, ema) and only in (None, set_name):
            by_set.setdefault(set_name, {})[far] = value
    return next((Thresholds(set_name, values) for set_name, values in by_set.items()), None)  # which looks at them


def of_report(report: Report, path: str) -> Thresholds:
    """Of an evaluation on the set `path`. ValueError if too few pairs allow none."""
    found = {
        name.removeprefix(NAME): float(cosine) for name, cosine in report.thresholds.items() if name.startswith(NAME) and cosine is not None
    }
    if not found:
        raise ValueError(f"--data {path} gives no threshold at any FAR: name a labelled set with at least 10 pairs of different identities")
    return Thresholds(set_names([path])[0], found)
