"""Writes the reference part of docs/losses.md from the registry and the measured cost: python -m benchmarks.loss_page"""

from __future__ import annotations

import csv
import inspect
import os
import sys
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
    path = os.path.join(FOLDER, "losses.csv")
    if os.path.exists(path):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["loss"], {})[row["dtype"]] = f"{float(row['ratio']):.2f}"
    return found


def page() -> str:
    with open(PAGE) as file:
        written, _, _ = file.read().partition(MARK)
    return written + MARK + "\n" + "\n".join(reference()) + "\n"


if __name__ == "__main__":
    text = page()
    with open(PAGE, "w") as file:
        file.write(text)
    sys.exit(0)
