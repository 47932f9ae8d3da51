"""Writes the reference part of docs/losses.md from the registry and the measured cost: python -m benchmarks.loss_page"""

from __future__ import annotations

import csv
import inspect
import os
import statistics
from collections.abc import Iterator
from dataclasses import fields

from benchmarks.record import FOLDER
from partial_fc import losses

PAGE = os.path.join(os.path.dirname(os.path.dirname(FOLDER)), "docs", "losses.md")
MARK = "<!-- From here on written by python -m benchmarks.loss_page -->\n"
FAMILIES = {
    "margins": "Margins on the target",
    "spherefaces": "Softmax and SphereFace",
    "norms": "Margins by norm or frequency",
    "reweighted": "Hard non-targets, or all of the probability, weighed anew",
    "thresholds": "Learned thresholds",
    "nearest": "Nearest prototypes",
    "global_thresholds": "Thresholds from the whole batch",
    "samples": "Samples in place of prototypes",
    "pair_losses": "Pairs of samples",
    "compactness": "Compact identities",
    "banks": "Features and prototypes of earlier steps",
    "sums": "Sums",
}


def trained() -> Iterator[str]:
    """The table of trainings: mean over seeds, and in brackets half the distance of the extremes."""
    rows = [row for row in _csv("training.csv") if row["tuning"] == "False"]
    by_entry: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        by_entry.setdefault(row["entry"], {})[row["seed"]] = row  # the newest of a seed
    yield "## What training gives\n"
    yield "| entry | settings | seeds | EER, % | TAR @ FAR 1e-3, % | rank-1, % | learned threshold / threshold at EER |"
    yield "|---|---|---|---|---|---|---|"
    for entry, seeds in sorted(by_entry.items(), key=lambda item: _mean(item[1], "eer")):
        settings = next(iter(seeds.values()))["settings"]
        thresholds = f"{_mean(seeds, 'best_threshold'):.2f}"
        if next(iter(seeds.values()))["learned_threshold"]:
            thresholds = f"{_mean(seeds, 'learned_threshold'):.2f} / {thresholds}"
        figures = " | ".join(_spread(seeds, key) for key in ("eer", "tar_at_1e-3", "rank1"))
        yield f"| {entry} | `{settings}` | {len(seeds)} | {figures} | {thresholds} |"
    yield ""


def tuned() -> Iterator[str]:
    """The candidates, on identities carved out of the training set, best first within an entry."""
    rows = [row for row in _csv("training.csv") if row["tuning"] == "True"]
    yield "### Candidates\n"
    yield "On a fifth of the training identities, held out; one seed. Of a setting named twice the last one counts.\n"
    yield "| entry | settings | EER, % | TAR @ FAR 1e-3, % | rank-1, % |"
    yield "|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: (row["entry"], float(row["eer"]))):
        figures = " | ".join(f"{100 * float(row[key]):.1f}" for key in ("eer", "tar_at_1e-3", "rank1"))
        yield f"| {row['entry']} | `{row['settings']}` | {figures} |"
    yield ""


def _mean(seeds: dict[str, dict[str, str]], key: str) -> float:
    return statistics.fmean(float(row[key]) for row in seeds.values())


def _spread(seeds: dict[str, dict[str, str]], key: str) -> str:
    values = [100 * float(row[key]) for row in seeds.values()]
    return f"{statistics.fmean(values):.1f}" + (f" ({(max(values) - min(values)) / 2:.1f})" if len(values) > 1 else "")


def reference() -> Iterator[str]:
    costs = _costs()
    yield "## All losses\n"
    yield (
        "Fields with their defaults, the formula and its source, what the loss is for, and the time of a step as a multiple of CosFace's "
        "(median of pairs; where `protoshard bench losses` ran)."
    )
    for module, title in FAMILIES.items():
        yield f"\n### {title}"
        for name, cls in losses.REGISTRY.items():
            if cls.__module__ == f"partial_fc.losses.{module}":
                yield f"\n#### `{name}`"
                yield from _entry(cls, costs.get(name, {}))


def _entry(cls: type[losses.Loss], cost: dict[str, str]) -> Iterator[str]:
    formula, *options = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    yield formula
    for text in options:
        yield f"\n```\n{text}\n```"
    defaults = ", ".join(f"{item.name} = {item.default!r}" for item in fields(cls))  # type: ignore[arg-type]
    yield f"\n- **Defaults** `{defaults}`"
    if cost:
        yield f"- **Cost** {', '.join(f'{ratio} in {dtype}' for dtype, ratio in cost.items())}"
    yield f"- **Use** {cls.use}"


def _costs() -> dict[str, dict[str, str]]:
    """Newest ratio by loss and dtype."""
    found: dict[str, dict[str, str]] = {}
    for row in _csv("losses.csv"):
        found.setdefault(row["loss"], {})[row["dtype"]] = f"{float(row['ratio']):.2f}"
    return found


def _csv(name: str) -> list[dict[str, str]]:
    path = os.path.join(FOLDER, name)
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def page() -> str:
    with open(PAGE) as file:
        written, _, _ = file.read().partition(MARK)
    return written + MARK + "\n" + "\n".join([*trained(), *tuned(), *reference()]) + "\n"


if __name__ == "__main__":
    text = page()
    with open(PAGE, "w") as file:
        file.write(text)
