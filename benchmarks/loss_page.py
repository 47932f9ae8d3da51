"""Writes what the pages on losses take from the registry and from measurements: python -m benchmarks.loss_page

docs/losses.md gets the table of all losses, docs/losses-reference.md the formulas and options, docs/experiments.md the trainings."""

from __future__ import annotations

import csv
import importlib
import inspect
import math
import os
import re
import statistics
from collections.abc import Iterator
from dataclasses import fields

import torch

from benchmarks.record import FOLDER
from partial_fc import PartialFC, losses

DOCS = os.path.join(os.path.dirname(os.path.dirname(FOLDER)), "docs")
MARK = "<!-- From here on written by python -m benchmarks.loss_page -->\n"
NOTHING = "-"

Rows = dict[str, dict[str, str]]  # by seed: the newest row of each


def families() -> Iterator[tuple[str, dict[str, type[losses.Loss]]]]:
    """(title, losses by name) of every module of partial_fc/losses/, in the order of registration: modules alphabetically, each after those
    it builds on, and losses as they stand in their file."""
    found: dict[str, dict[str, type[losses.Loss]]] = {}
    for name, cls in losses.REGISTRY.items():
        if cls.__module__.startswith(f"{losses.__name__}."):
            found.setdefault(cls.__module__, {})[name] = cls
    for module, members in found.items():
        yield importlib.import_module(module).TITLE, members


def table() -> Iterator[str]:
    costs, trainings = _costs(), _trainings()
    yield "## All losses\n"
    yield "| loss | what it is for | needs | cost | EER |"
    yield "|---|---|---|---|---|"
    for _, members in families():
        for name, cls in members.items():
            cost = " / ".join(costs[name].values()) if name in costs else NOTHING
            needed = ", ".join(needs(name)) or "nothing"
            yield f"| [{name}](losses-reference.md#{name}) | {cls.use} | {needed} | {cost} | {_eer(name, trainings)} |"


def _eer(name: str, trainings: dict[str, Rows]) -> str:
    """Of the entry called like the loss, or else of a sum of the loss with another."""
    if name in trainings:
        return _spread(trainings[name], "eer")
    entry = next((entry for entry in trainings if entry.startswith(f"{name} with ")), None)
    return f"{_spread(trainings[entry], 'eer')} ({entry.removeprefix(f'{name} ')})" if entry else NOTHING


def needs(name: str) -> list[str]:
    """What a loss with default options takes beside features, labels and prototypes: what it keeps, and whatever changes its value on a
    small batch."""
    loss, value = losses.build(name), _value(name)

    def changes(**other: float) -> bool:
        return not math.isclose(_value(name, **other), value, rel_tol=1e-4)

    found = {
        "a bank of last features": loss.uses_bank(),
        "a queue of features": bool(loss.queued()),
        "several images of an identity in a batch": not loss.uses_bank() and changes(turn=3.0),
        "class_counts": changes(images=9),
        "feature norms": changes(stretch=2.0),
    }
    return [need for need, is_there in found.items() if is_there]


def _value(name: str, turn: float = 0.0, images: float = 3, stretch: float = 1.0) -> float:
    """The loss of 3 identities with two samples each. `turn` is the angle between the samples of the first one in a plane of their own: it
    changes their cosine and no other."""
    generator = torch.Generator().manual_seed(0)
    features_BD, prototypes_CD = torch.randn(6, 10, generator=generator), torch.randn(20, 10, generator=generator)
    features_BD[:, -2:], prototypes_CD[:, -2:] = 0.0, 0.0
    angles_2 = torch.tensor([0.0, turn])
    features_BD[:2, -2], features_BD[:2, -1] = 4 * angles_2.cos(), 4 * angles_2.sin()
    features_BD *= 5 * torch.linspace(1.0, stretch, 6)[:, None]
    classifier = PartialFC(20, 10, losses.build(name), class_counts=torch.full((20,), images))
    classifier.step = 10_000  # past what begins later
    with torch.no_grad():
        classifier.prototypes.copy_(prototypes_CD)
    return classifier(features_BD.requires_grad_(), torch.tensor([0, 0, 1, 1, 2, 2])).item()


def reference() -> Iterator[str]:
    costs = _costs()
    for title, members in families():
        yield f"\n## {title}"
        for name, cls in members.items():
            yield f"\n### `{name}`\n"
            yield from _entry(cls, costs.get(name, {}))


def _entry(cls: type[losses.Loss], cost: dict[str, str]) -> Iterator[str]:
    formula = getattr(cls, "formula", "")
    for equation in formula.split(r",\qquad ") if formula else []:
        yield f"$$\n{equation}\n$$\n"
    text, *options = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
    yield text.replace("<x", "&lt;x")  # which is no HTML
    for option in options:
        yield f"\n```\n{option}\n```"
    yield ""
    if fields(cls):  # type: ignore[arg-type]
        yield f"- **Defaults** {', '.join(f'`{item.name}={item.default!r}`' for item in fields(cls))}"  # type: ignore[arg-type]
    if cost:
        yield f"- **Cost** {', '.join(f'{ratio} in {dtype}' for dtype, ratio in cost.items())}"
    yield f"- **Use** {cls.use}"


def trained() -> Iterator[str]:
    yield "## All trainings\n"
    yield "| entry | settings | seeds | EER, % | TAR @ FAR 1e-3, % | rank-1, % | learned threshold / threshold at EER |"
    yield "|---|---|---|---|---|---|---|"
    for entry, seeds in sorted(_trainings().items(), key=lambda item: _mean(item[1], "eer")):
        first = next(iter(seeds.values()))
        thresholds = f"{_mean(seeds, 'best_threshold'):.2f}"
        if first["learned_threshold"]:
            thresholds = f"{_mean(seeds, 'learned_threshold'):.2f} / {thresholds}"
        figures = " | ".join(_spread(seeds, key) for key in ("eer", "tar_at_1e-3", "rank1"))
        yield f"| {entry} | `{settings(first)}` | {len(seeds)} | {figures} | {thresholds} |"
    yield ""


def tuned() -> Iterator[str]:
    rows = [row for row in _csv("training.csv") if row["tuning"] == "True"]
    yield "## All candidates\n"
    yield "On a fifth of the training identities, held out; one seed; best first within an entry.\n"
    yield "| entry | settings | EER, % | TAR @ FAR 1e-3, % | rank-1, % |"
    yield "|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: (row["entry"], float(row["eer"]))):
        figures = " | ".join(f"{100 * float(row[key]):.1f}" for key in ("eer", "tar_at_1e-3", "rank1"))
        yield f"| {row['entry']} | `{settings(row)}` | {figures} |"


def settings(row: dict[str, str]) -> str:
    """Of a field that is named twice the last value counts."""
    parts = re.split(r" (?=[a-z_.]+=)", row["settings"])
    return " ".join(f"{name}={value}" for name, value in dict(part.split("=", 1) for part in parts).items())


def _trainings() -> dict[str, Rows]:
    """By entry."""
    found: dict[str, Rows] = {}
    for row in _csv("training.csv"):
        if row["tuning"] == "False":
            found.setdefault(row["entry"], {})[row["seed"]] = row
    return found


def _mean(seeds: Rows, key: str) -> float:
    return statistics.fmean(float(row[key]) for row in seeds.values())


def _spread(seeds: Rows, key: str) -> str:
    """Mean over seeds in %, and in brackets half the distance of the extremes."""
    values = [100 * float(row[key]) for row in seeds.values()]
    return f"{statistics.fmean(values):.1f}" + (f" ({(max(values) - min(values)) / 2:.1f})" if len(values) > 1 else "")


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


def pages() -> dict[str, str]:
    """The whole text of each page by its path: what is written by hand, the mark, and what is written here."""
    parts = {
        "losses.md": table(),
        "losses-reference.md": reference(),
        "experiments.md": (line for part in (trained(), tuned()) for line in part),
    }
    found = {}
    for name, lines in parts.items():
        path = os.path.join(DOCS, name)
        with open(path) as file:
            by_hand = file.read().partition(MARK)[0]
        found[path] = by_hand + MARK + "\n" + "\n".join(lines).strip("\n") + "\n"
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        with open(path, "w") as file:
            file.write(text)
