"""A folder of checkpoints: which are complete, which is the newest sound one, which have had their time."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

from dali_loaders.remote import without_secrets
from pipeline.agreement import Agreement
from pipeline.checkpoint.config import CheckpointConfig
from pipeline.checkpoint.manifest import DamagedError
from pipeline.checkpoint.reading import Checkpoint, open_in
from pipeline.checkpoint.stores import MANIFEST, STEP, LocalStore, Store, store_of

log = logging.getLogger(__name__)

NAME = "step-{:08d}"
SUPERSEDED = ".superseded"
LOWER_IS_BETTER = ("eer", "loss")  # last parts of the names of such figures


def complete(folder: str | Store) -> list[str]:
    """Names of the checkpoints in it that were finished, oldest first; not verified."""
    store = store_of(folder) if isinstance(folder, str) else folder
    names = filter(STEP.fullmatch, store.names())
    return sorted(names, key=lambda name: (step_of(name), name))


def step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def newest(folder: str, agreement: Agreement | None = None) -> Checkpoint | None:
    """The newest checkpoint in FOLDER that is sound, or None where there is none at all. One that is damaged is named in the log and
    passed over; ValueError if all are, or if one is of a version that this one does not know. Every rank calls it."""
    agreement = agreement or Agreement()
    store = store_of(folder)
    names = agreement.of_first(_listed(store))
    if isinstance(names, str):
        raise ValueError(names)
    for name in reversed(names):
        found = sound(store, name, agreement)
        if not isinstance(found, str):
            return found
        if agreement.rank == 0:
            log.warning("checkpoint %s/%s cannot be used (%s): looking for the one before it", store.path, name, found)
    if names:
        raise ValueError(
            f"none of the {len(names)} checkpoints in {store.path} can be used: bring back a copy of one, or begin anew with "
            "--resume none, which keeps them"
        )
    return None


def _listed(store: Store) -> list[str] | str:
    try:
        return complete(store)
    except OSError as error:
        return f"the checkpoints in {store.path} cannot be listed ({error.strerror or error})"


def sound(store: Store, name: str, agreement: Agreement) -> Checkpoint | str:
    """The checkpoint, opened and verified by all ranks together, or what is wrong with it. ValueError for another version's, and where the
    store gives no answer."""
    fault = None
    try:
        opened = _opened(store, name)
    except ValueError as error:
        fault = error
    faults = sorted(filter(None, agreement.gather(fault)), key=lambda fault: isinstance(fault, DamagedError))
    if faults and not isinstance(faults[0], DamagedError):
        raise faults[0]
    words = str(faults[0]) if faults else opened.fault(agreement)
    return opened if words is None else words.removeprefix(f"{store.path}/{name}/")


def _opened(store: Store, name: str) -> Checkpoint:
    opened = open_in(store, name)
    if STEP.fullmatch(name) and step_of(name) != opened.info["step"]:
        raise DamagedError(f"it is the checkpoint of step {opened.info['step']}")
    return opened


def locate(path: str, agreement: Agreement | None = None) -> Checkpoint:
    """The checkpoint that a user's PATH means: a checkpoint, or the newest sound one in a folder of them or in a run's folder. Every rank
    calls it."""
    agreement = agreement or Agreement()
    parent, _, name = path.rstrip("/").rpartition("/")
    store, shown = store_of(parent or os.curdir), without_secrets(path)
    is_one = agreement.of_first(_has_manifest(store, name))
    if isinstance(is_one, str):
        raise ValueError(is_one)
    if is_one:
        found = sound(store, name, agreement)
        if isinstance(found, str):
            raise ValueError(f"checkpoint {shown} cannot be used: {found}")
        return found
    for folder in (path, f"{path.rstrip('/')}/checkpoints"):
        newest_there = newest(folder, agreement)
        if newest_there is not None:
            return newest_there
    raise ValueError(f"there is no complete checkpoint at {shown}: give a step-N folder, or the folder of a run that has written one")


def _has_manifest(store: Store, name: str) -> bool | str:
    try:
        return bool(name) and store.exists(name, MANIFEST)
    except OSError as error:
        return f"{store.path}/{name} cannot be read ({error.strerror or error})"


def supersede(folder: str, step: int, agreement: Agreement | None = None, path: str = "") -> None:
    """Renames the checkpoints in FOLDER that are newer than `step`, from which a run goes on: they are damaged, or belong to a course that
    was given up, and would be taken for the newest. So does one of that step that is not
    the one at PATH. Every rank calls it."""
    agreement = agreement or Agreement()
    fault = None
    if agreement.rank == 0:
        store = store_of(folder)
        try:
            for name in complete(store):
                if step_of(name) > step or (step_of(name) == step and path and not is_in(folder, path)):
                    log.warning("keeping %s/%s as %s%s: the run goes on from step %d", store.path, name, name, SUPERSEDED, step)
                    store.rename(name, _free_name(store, name + SUPERSEDED))
        except OSError as error:
            fault = f"checkpoints in {store.path} that are newer than step {step} cannot be renamed ({error.strerror or error})"
    fault = agreement.of_first(fault)
    if fault:
        raise ValueError(fault)


def is_in(folder: str, path: str) -> bool:
    """Whether the checkpoint PATH is one of FOLDER, under the name that its step gives it."""
    parent, _, name = path.rpartition("/")
    if not STEP.fullmatch(name):
        return False
    return os.path.realpath(parent) == os.path.realpath(folder) if is_local(folder) else parent == store_of(folder).path


def _free_name(store: Store, name: str) -> str:
    names = set(store.names())
    return next(new for new in (name, *(f"{name}.{number}" for number in range(2, 10**6))) if new not in names)


def outdated(store: Store, config: CheckpointConfig, written: str) -> list[str]:
    """Names of the checkpoints that the configuration does not keep, now that `written` is there. Only those count as kept that look sound
    (their manifest is, and their files have their sizes), and only such are named: what is damaged is left for a person to look at."""
    figures: dict[str, Any] = {}
    for name in complete(store):
        try:
            opened = _opened(store, name)
            if opened.has_its_sizes():
                figures[name] = (opened.info.get("figures") or {}).get(config.best)
        except ValueError:
            continue
    if written not in figures:
        return []  # somebody has been at it, and the others are needed
    names = list(figures)
    kept = {written, *names[-config.keep :], best_of(figures, config.best)}
    kept |= {name for name in names if config.keep_every and step_of(name) % config.keep_every == 0}
    return [name for name in names if name not in kept]


def best_of(figures: dict[str, Any], figure: str) -> str | None:
    """The checkpoint that has the best of these values of a figure; of equal ones the oldest, which no later one then pushes out."""
    judged = {name: value for name, value in figures.items() if isinstance(value, int | float) and -math.inf < value < math.inf}
    sign = 1 if figure.rpartition("/")[2] in LOWER_IS_BETTER else -1
    return min(judged, key=lambda name: (sign * judged[name], step_of(name)), default=None)


def is_local(folder: str) -> bool:
    return isinstance(store_of(folder), LocalStore)
