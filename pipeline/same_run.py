"""Whether a checkpoint and the run that is to go on from it belong together: what must be equal, what may change if asked for, and a word
on everything else that did."""

from __future__ import annotations

import json
from typing import Any, Protocol

from dali_loaders import Source
from dali_loaders.names import printable
from dali_loaders.remote import without_secrets
from pipeline.checkpoint import Checkpoint
from pipeline.config import TrainConfig, as_dict
from pipeline.same_data import ORDER, differences

LABELS = {"identities": "identity names with the checksum"}  # what sentences call an entry of the checkpoint
FORCED = ("optimizer", "frozen", "images_per_identity")  # entries of `identity` that may change, if asked for
MOST_CHANGES = 12  # fields that a line names


class Run(Protocol):
    """What a Trainer has for this."""

    config: TrainConfig
    source: Source
    fingerprint: dict[str, Any]  # of the source


def identity(run: Run) -> dict[str, Any]:
    """What a checkpoint and the run that goes on from it must agree on."""
    config = run.config
    return {
        "num_classes": run.fingerprint["num_classes"],
        "identities": run.fingerprint["identities"],
        "width": config.backbone.width,
        "backbone": config.backbone.name,
        "image_size": config.data.image_size,
        "optimizer": config.optimizer.name,
        "frozen": sorted(config.optimizer.frozen),
        "batch": config.run.batch,
        "images_per_identity": config.data.images_per_identity,
    }


def order(run: Run) -> dict[str, Any]:
    """What decides which image stands at which place of the stream, beside what is in `identity`."""
    values = {**run.fingerprint, "seed": run.config.run.seed}
    return {key: values[key] for key in ORDER}


def check_identity(run: Run, saved: Checkpoint) -> list[str]:
    info = saved.info
    if "batch" in info:  # written by a run, not imported
        info = {"images_per_identity": 1, "frozen": [], **info}  # what earlier versions did
    # An imported checkpoint may lack a classifier, and so its class count, or an optimizer.
    changed = {key: ours for key, ours in identity(run).items() if info.get(key) not in (None, ours)}
    if changed.keys() & {"num_classes", "identities"}:
        changed.pop("num_classes" if "num_classes" not in changed or info["num_classes"] == changed["num_classes"] else "identities", None)
    words = [f"{LABELS.get(key, key)} {_shown(info[key])}, but this run has {_shown(ours)}" for key, ours in changed.items()]
    if changed.keys() & {"num_classes", "identities"}:
        words += _names_that_differ(run, saved)
    if not changed:
        return []
    if changed.keys() <= set(FORCED) and run.config.checkpoint.differences == "continue":
        return [f"checkpoint {saved.path} has {line}" for line in words]
    remedy = (
        "go on with the recipe and data it was trained with, or begin a new run with its backbone, with --from instead of --resume and a "
        "run.folder of its own"
    )
    if changed.keys() <= set(FORCED):
        remedy += "; to go on in spite of it, --set checkpoint.differences=continue"
    raise ValueError(f"checkpoint {saved.path} has {'; '.join(words)}: {remedy}")


def _names_that_differ(run: Run, saved: Checkpoint) -> list[str]:
    theirs, ours = saved.identities(), run.source.identities
    if theirs is None:
        return []
    lines = []
    for what, names in (("are not among this run's", set(theirs) - set(ours)), ("are new", set(ours) - set(theirs))):
        if names:
            lines.append(f"{len(names)} of the identities {what}, such as '{printable(min(names))}'")
    return lines or ["the same names of identities stand in another order"]


def changed_fields(run: Run, info: dict[str, Any]) -> list[str]:
    """Nothing about a run changes without a word: options that are others than when the checkpoint was written."""
    fields = changed(run, info)
    if not fields or "batch" not in info:
        return []
    shown = ", ".join(f"{name}={_shown(now)} (was {_shown(before)})" for name, (before, now) in list(fields.items())[:MOST_CHANGES])
    more = f" and {len(fields) - MOST_CHANGES} more" if len(fields) > MOST_CHANGES else ""
    return [f"changed since the checkpoint: {shown}{more}"]


def changed(run: Run, info: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By section.field, what an option was when the checkpoint was written, and is."""
    before, now = _flat(info.get("config", {})), _flat(json.loads(json.dumps(as_dict(run.config))))
    return {name: (before[name], now[name]) for name in now if name != "start.weights" and before.get(name, now[name]) != now[name]}


def _shown(value: Any) -> str:
    """A file may come from anyone: no characters that move a terminal's cursor, and no pages."""
    text = printable(str(value))
    return text if len(text) <= 200 else f"{text[:200]}..."


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def check_order(run: Run, path: str, info: dict[str, Any]) -> list[str]:
    """Images that stand elsewhere than before would come twice in an epoch, or not at all. Earlier versions did not write down where."""
    changed = ", ".join(differences(order(run), info))
    if not changed:
        return []
    if run.config.data.changed == "refuse":
        raise ValueError(
            f"the data has changed since checkpoint {path}: {changed}. Go on with the data as it was, or admit the change with --set "
            "data.changed=continue: from here on images come in a new order, in the epoch under way some twice or not at all"
        )
    return [f"the data has changed since the checkpoint ({changed}): a new order, in this epoch some images come twice or not at all"]


def check_start(run: Run, path: str, info: dict[str, Any]) -> None:
    """A restart of a run goes on from its own checkpoints, with the same --from or without it; with another, they belong to another run."""
    start, before = run.config.start, info.get("started_from")
    if start.weights and (before is None or not start.is_that_of(before)):
        began = "did not begin with another one's weights"
        if before:
            given, classifier, ema = (_shown(before[name]) for name in ("given", "classifier", "ema"))
            began = f"began with {given} (classifier={classifier}, ema={ema})"
        raise ValueError(
            f"--from {without_secrets(start.weights)}: the run of checkpoint {path} {began}. To begin a new run, give it a folder of its "
            "own with --set run.folder=PATH, or keep the one there aside with --resume none; to go on with that run, leave out --from"
        )
