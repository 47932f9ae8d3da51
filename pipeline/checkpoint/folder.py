"""A folder of checkpoints: which are complete, which is the newest sound one, which have had their time."""

from __future__ import annotations

import json
import logging
import math
import os
import zlib
from contextlib import suppress
from typing import Any

from dali_loaders.names import printable, quoted
from dali_loaders.remote import without_secrets
from pipeline.agreement import Agreement
from pipeline.checkpoint.config import CheckpointConfig
from pipeline.checkpoint.manifest import DamagedError
from pipeline.checkpoint.reading import Checkpoint, open_in
from pipeline.checkpoint.stores import MANIFEST, STEP, LocalStore, Store, split, store_of

log = logging.getLogger(__name__)

NAME = "step-{:08d}"
SUPERSEDED = ".superseded"
FOLDER, ABOUT = "checkpoints", "run.json"  # in a run's folder: its checkpoints, and what it is
MOST_ABOUT = 1 << 20  # bytes that are read of a run.json, which has 500
LOWER_IS_BETTER = ("eer", "loss", "spread", "spread_std")  # last parts of the names of such figures


def complete(folder: str | Store) -> list[str]:
    """Names of the checkpoints in it that were finished, oldest first; not verified."""
    store = store_of(folder) if isinstance(folder, str) else folder
    names = filter(STEP.fullmatch, store.names())
    return sorted(names, key=lambda name: (step_of(name), name))


def marks(folder: str) -> set[tuple[str, int]]:
    """Of each finished checkpoint its name, and a number that another one of that name would not have. OSError where the store gives no
    answer."""
    store = store_of(folder)
    if isinstance(store, LocalStore):
        return {(name, os.stat(os.path.join(store.path, name)).st_mtime_ns) for name in complete(store)}
    found = set()
    for name in complete(store):
        manifest = memoryview(bytearray(store.size(name, MANIFEST)))
        store.read_into(name, MANIFEST, 0, manifest)
        found.add((name, zlib.crc32(manifest)))  # it says when and by which run it was written
    return found


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
    parent, name = split(path)
    store, shown = store_of(parent), without_secrets(path)
    is_one = agreement.of_first(_has_manifest(store, name))
    if isinstance(is_one, str):
        raise ValueError(is_one)
    if is_one:
        found = sound(store, name, agreement)
        if isinstance(found, str):
            raise ValueError(f"checkpoint {shown} cannot be used: {found}")
        return found
    for folder in places(path):
        newest_there = newest(folder, agreement)
        if newest_there is not None:
            return newest_there
    raise ValueError(nothing_at(path))


def places(path: str) -> list[str]:
    """Where the checkpoints may lie that a user means by a folder: there, where the run of that folder has said, or in FOLDER."""
    elsewhere = _elsewhere(path)
    # What a run's folder says may come from anyone: an address is not asked because of it.
    return [path, *([elsewhere] if elsewhere and "://" not in elsewhere else []), f"{path.rstrip('/')}/{FOLDER}"]


def _elsewhere(path: str) -> str:
    about = os.path.join(path, ABOUT)
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        if os.path.isfile(about) and os.path.getsize(about) < MOST_ABOUT:
            with open(about) as file:
                said = json.load(file).get("checkpoint.folder")
            return said if isinstance(said, str) else ""
    return ""


def nothing_at(path: str) -> str:
    if "://" not in path and not os.path.lexists(path):
        return f"{quoted(path)} does not exist"
    elsewhere = without_secrets(printable(_elsewhere(path)))
    rest = f"its run saves to {elsewhere}: give that" if elsewhere else "give a step-N folder, a folder of them, or a run's folder"
    return f"there is no complete checkpoint at {without_secrets(path)}: {rest}"


def _has_manifest(store: Store, name: str) -> bool | str:
    try:
        return bool(name) and store.exists(name, MANIFEST)
    except OSError as error:
        return f"{store.path}/{name} cannot be read ({error.strerror or error})"


def supersede(folder: str, step: int, agreement: Agreement | None = None, saved: Checkpoint | None = None) -> bool:
    """Renames the checkpoints in FOLDER that are newer than `step`, from which a run goes on: they are damaged, or belong to a course that
    was given up, and would be taken for the newest. So does one of that step, if the run goes on from `saved`, which is another. Returns
    whether `saved` is one of FOLDER itself. Every rank calls it."""
    agreement = agreement or Agreement()
    is_in, fault = agreement.of_first(_superseded(store_of(folder), step, saved) if agreement.rank == 0 else (False, ""))
    if fault:
        raise ValueError(fault)
    return is_in


def _superseded(store: Store, step: int, saved: Checkpoint | None) -> tuple[bool, str]:
    is_in = False
    try:
        for name in complete(store):
            is_it = saved is not None and step_of(name) == step and _is_it(store, name, saved)
            is_in = is_in or is_it
            if step_of(name) > step or (step_of(name) == step and saved is not None and not is_it):
                log.warning("keeping %s/%s as %s%s: the run goes on from step %d", store.path, name, name, SUPERSEDED, step)
                store.rename(name, _free_name(store, name + SUPERSEDED))
    except OSError as error:
        return is_in, f"checkpoints in {store.path} that are newer than step {step} cannot be renamed ({error.strerror or error})"
    return is_in, ""


def _is_it(store: Store, name: str, saved: Checkpoint) -> bool:
    """Whether a checkpoint is `saved`, by whatever spelling of its folder: a symbolic link, another mount."""
    if isinstance(store, LocalStore) and isinstance(saved.store, LocalStore):
        path = f"{store.path}/{name}"
        return os.path.exists(path) and os.path.samefile(path, saved.path)
    return (store.path, name) == (saved.store.path, saved.name)


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
            if opened.wrong_size() is None:
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
