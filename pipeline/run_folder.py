"""Which folder may be a run's: not one that data are read from, not one with other things in it, not that of another run."""

from __future__ import annotations

import glob
import json
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dali_loaders.names import printable
from dali_loaders.remote import is_remote, without_secrets
from dali_loaders.sources.patterns import braces, is_pattern
from dali_loaders.sources.several import split_paths
from pipeline import heartbeat
from pipeline.checkpoint import MANIFEST
from pipeline.checkpoint.folder import ABOUT
from pipeline.config import TrainConfig
from pipeline.distributed import Place
from pipeline.lease_files import LOGS, NAME, is_used
from pipeline.monitor.json_lines import last_step

# Folders beside which a run may begin, as text files are. A start that failed may leave what its ranks were doing.
HARMLESS = (LOGS, "lost+found", heartbeat.FOLDER)


def check(config: TrainConfig, place: Place, resume: str) -> None:
    """ValueError on every rank, which all call it, if run.folder cannot be that of this run. Rank 0 looks."""
    told: list[Any] = [None]
    if place.is_first:
        try:
            told[0] = fault(config, resume)
        except OSError as error:
            told[0] = f"run.folder={config.run.folder} cannot be read ({error.strerror or error}): choose another folder"
    dist.broadcast_object_list(told)
    if told[0]:
        raise ValueError(told[0])


def mark(config: TrainConfig, place: Place, start: dict[str, Any] | None = None) -> None:
    """Writes down what the run in this folder is, and how this `start` of it began (`start.description`), if it trains. On a full disk that
    is left out."""
    path, given = os.path.join(config.run.folder, ABOUT), config.checkpoint.folder
    elsewhere = without_secrets(given if not given or is_remote(given) else os.path.abspath(given))
    about = {**_about(config), "checkpoint.folder": elsewhere}
    before = _read(path)
    about = {**before, **about, **(start or {})}
    if not place.is_first or before == about:
        return
    with suppress(OSError):
        with open(f"{path}.tmp", "w") as file:
            json.dump(about, file, indent=1)
        os.replace(f"{path}.tmp", path)


def data_paths(config: TrainConfig) -> list[str]:
    """Local paths, and patterns of paths, that a run reads its images from."""
    given = [path for text in (config.data.train, config.evaluation.data) if text for path in split_paths(text)]
    given += [path for field, _, path in config.evaluation.sets() if field != "data"]
    return [path for one in given if not is_remote(one) for path in (braces(one) if is_pattern(one) else [one])]


def fault(config: TrainConfig, resume: str) -> str | None:
    given, checkpoints = config.run.folder, config.checkpoint.folder or os.path.join(config.run.folder, "checkpoints")
    folder = os.path.realpath(given)
    for name, written in (("run.folder", given), ("checkpoint.folder", config.checkpoint.folder)):
        if not written or is_remote(written):
            continue
        above = list(_with_those_above(os.path.realpath(written)))
        for path in data_paths(config):
            if any(_is(one, path) for one in above):
                return f"{name}={written} lies in the data {path}, which the files of the run would change: choose a folder elsewhere"
    if not os.path.isdir(folder):
        return None
    others = [] if _is_of_a_run(folder) else sorted(_foreign(folder))
    if others:
        shown = ", ".join(map(printable, others[:3])) + (", ..." if len(others) > 3 else "")
        return (
            f"run.folder={given} holds no run, but other things ({shown}): choose a new folder. Only text files, such as logs, may be in "
            f"it before the run. If the rest belongs to the run too, say so with: touch {shlex.quote(os.path.join(given, ABOUT))}"
        )
    before, ours = _read(os.path.join(folder, ABOUT)), _about(config)
    has_begun = last_step(Path(folder, "metrics.jsonl")) > 0 and not is_remote(checkpoints) and not _in(checkpoints)
    differences = [f"{key}={printable(str(before.get(key)))}, here {value}" for key, value in ours.items() if before.get(key) != value]
    if resume == "auto" and before and differences and has_begun:
        return (
            f"run.folder={given} belongs to another run, which has no checkpoint yet ({'; '.join(differences)}): choose another folder, or "
            "keep that run aside with --resume none"
        )
    return None


def _about(config: TrainConfig) -> dict[str, Any]:
    """What two starts of one run have in common before its first checkpoint, which says it in more detail."""
    return {
        "data.train": without_secrets(config.data.train),
        "data.image_size": config.data.image_size,
        "backbone.name": config.backbone.name,
        "backbone.width": config.backbone.width,
    }


def _read(path: str) -> dict[str, Any]:
    """Nothing where there is no such file, or not one that `mark` wrote."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path) as file:
            values = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _with_those_above(folder: str) -> Iterator[str]:
    yield folder
    while (above := os.path.dirname(folder)) != folder:
        yield (folder := above)


def _is(folder: str, path: str) -> bool:
    """Whether a folder is what a path, or a pattern of paths, stands for, by whatever spelling."""
    if is_pattern(path):
        return fnmatch(folder, os.path.realpath(path))
    return os.path.exists(folder) and os.path.isdir(path) and os.path.samefile(folder, path)


def _is_of_a_run(folder: str) -> bool:
    names = os.listdir(folder)
    return bool({ABOUT, "metrics.jsonl"} & set(names)) or any(map(NAME.fullmatch, names)) or bool(_in(os.path.join(folder, "checkpoints")))


def _in(checkpoints: str) -> list[str]:
    """Checkpoints, whole or not. Other programs have folders of such names too, but not this file in them."""
    return glob.glob(os.path.join(glob.escape(checkpoints), "step-*", MANIFEST))


def _foreign(folder: str) -> Iterator[str]:
    """Names of what does not look as if somebody had put it there for a run to come."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or (entry.name in HARMLESS and entry.is_dir()):
                continue
            if is_used(entry.path) if entry.is_dir() else not _is_text(entry):
                yield entry.name


def _is_text(entry: os.DirEntry[str]) -> bool:
    if not stat.S_ISREG(entry.stat().st_mode):
        return False
    with open(entry.path, "rb") as file:
        return b"\0" not in file.read(4096)
