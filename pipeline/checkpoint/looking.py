"""What lies at a path that a user names: a checkpoint, or a folder of them with all that is in it; and whether a checkpoint is sound,
without a training run around it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from dali_loaders.names import printable
from dali_loaders.progress import progress
from pipeline.agreement import Agreement
from pipeline.checkpoint.config import CheckpointConfig
from pipeline.checkpoint.first_format import FirstCheckpoint
from pipeline.checkpoint.folder import SUPERSEDED, best_of, complete, nothing_at, places, step_of
from pipeline.checkpoint.manifest import DamagedError
from pipeline.checkpoint.reading import Checkpoint, open_in
from pipeline.checkpoint.stores import MANIFEST, REMOVED, STEP, Store, split, store_of

SHARE = 1 << 27  # bytes that a thread verifies before the line of progress moves
THREADS = min(4, os.cpu_count() or 1)  # of verifying: xxh3 keeps up with a disk of 10 GB/s on each


@dataclass
class Row:
    """A checkpoint in a folder, as far as its manifest and the sizes of its files tell."""

    name: str
    state: str  # complete, superseded, unfinished (under way or broken off), damaged, or unknown (of another version)
    step: int | None = None
    when: str | None = None
    bytes: int | None = None
    ranks: int | None = None  # that wrote it
    format: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)  # why retention leaves it where it is
    fault: str | None = None


def folder_of(path: str) -> Store | None:
    """The folder of checkpoints that PATH is, or that of the run with the folder PATH; None if there is none."""
    for folder in places(path):
        store = store_of(folder)
        if complete(store) or store.unfinished() or any(SUPERSEDED in name for name in store.names()):
            return store
    return None


def one(path: str) -> Checkpoint:
    """The checkpoint that PATH means, not verified: itself, or the newest one in a folder of them or in a run's folder. ValueError."""
    try:
        folder, name = split(path)
        if name and _is_checkpoint(store_of(folder), name):
            return open_in(store_of(folder), name)
        found = folder_of(path)
        names = complete(found) if found else []
        if found and names:
            return open_in(found, names[-1])
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({words(error)})") from None
    raise ValueError(nothing_at(path))


def several(path: str) -> list[tuple[Store, str]]:
    """The checkpoint that PATH is, or all complete ones in a folder of them or in a run's folder. ValueError if there is none."""
    try:
        folder, name = split(path)
        if name and _is_checkpoint(store_of(folder), name):
            return [(store_of(folder), name)]
        found = folder_of(path)
        names = complete(found) if found else []
        if found and names:
            return [(found, name) for name in names]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({words(error)})") from None
    raise ValueError(nothing_at(path))


def _is_checkpoint(store: Store, name: str) -> bool:
    """Also one that has lost its manifest."""
    is_named_so = re.fullmatch(rf"step-\d{{1,18}}({re.escape(SUPERSEDED)}(\.\d+)?)?", name) is not None
    return store.exists(name, MANIFEST) or (is_named_so and name in store.names())


def size_of(saved: Checkpoint) -> int:
    """Bytes of all its files but the manifest."""
    return sum(files(saved).values())


def files(saved: Checkpoint) -> dict[str, int]:
    """Bytes of each."""
    if isinstance(saved, FirstCheckpoint):
        return {name: entry[0] for name, entry in saved.info["files"].items()}
    return {name: file.bytes for name, file in saved.manifest.files.items()}


def tensors(saved: Checkpoint) -> dict[str, dict[str, Any]]:
    """Type, shape and files of each."""
    return {
        name: {"dtype": str(saved.dtype(name)).removeprefix("torch."), "shape": list(saved.shape(name)), "files": _files_of(saved, name)}
        for name in sorted(saved)
    }


def _files_of(saved: Checkpoint, name: str) -> list[str]:
    if isinstance(saved, FirstCheckpoint):
        return sorted({file for _, _, file, *_ in saved.pieces[name]})
    return sorted({entry.file for entry in saved.manifest.tensors[name]})


def tensor_bytes(saved: Checkpoint) -> int:
    return sum(math.prod(saved.shape(name)) * saved.dtype(name).itemsize for name in saved)


def format_of(saved: Checkpoint) -> int:
    return 1 if isinstance(saved, FirstCheckpoint) else 2


def fault_of(saved: Checkpoint, done: Callable[[int], None] = lambda count: None) -> str | None:
    """What is wrong with the contents of a checkpoint, or None. All of it is read, by a few threads; `done` is told of bytes."""
    shares = 1 + size_of(saved) // SHARE

    def look(share: int) -> str | None:
        alone = Agreement()
        alone.rank, alone.ranks = share, shares
        return saved.fault(alone)

    fault = None
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for found in pool.map(look, range(shares)):
                done(size_of(saved) // shares)
                if found is not None:
                    fault = found
                    break
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C, or a fault: the rest need not be read
    return fault


def judged(store: Store, name: str) -> tuple[str, str | None]:
    """sound; damaged or unknown (of another version, or in a store that gives no answer), with the reason; or gone: a run removes old ones,
    also while another reads them."""
    try:
        saved = open_in(store, name)
        with progress(f"bytes of {printable(name)}", size_of(saved)) as done:
            fault = wrong_name(saved) or fault_of(saved, done.add)
        state = "damaged" if fault else "sound"
    except DamagedError as error:
        state, fault = "damaged", str(error)
    except ValueError as error:
        state, fault = "unknown", str(error)
    return (state, fault) if fault is None or is_there(store, name) else ("gone", None)


def is_there(store: Store, name: str) -> bool:
    """Whether a checkpoint that cannot be read is still there."""
    try:
        return name in store.names()
    except OSError:
        return True


def wrong_name(saved: Checkpoint) -> str | None:
    """What is wrong with a checkpoint that bears the name of another step, or None."""
    is_wrong = STEP.fullmatch(saved.name) and step_of(saved.name) != saved.info["step"]
    return f"it is the checkpoint of step {saved.info['step']}" if is_wrong else None


def listed(path: str) -> list[Row]:
    """All that is in a folder of checkpoints, or in that of the run's folder PATH, oldest first; if PATH is a checkpoint, that one. Only
    manifests are read, and sizes of files asked for. ValueError if nothing is there."""
    try:
        folder, name = split(path)
        if name and _is_checkpoint(store_of(folder), name):
            return [row for row in _rows(store_of(folder)) if row.name == name] or [_row(store_of(folder), name)]
        store = folder_of(path)
        if store is not None:
            return _rows(store)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({words(error)})") from None
    raise ValueError(nothing_at(path))


def _rows(store: Store) -> list[Row]:
    found = [_row(store, name) for name in sorted(store.names(), key=_place) if re.match(r"step-\d", name)]
    found = [row for row in found if row.fault is None or is_there(store, row.name)]
    whole = [row for row in found if row.state == "complete"]
    rule = _retention(store, whole)
    best = best_of({row.name: row.figures.get(rule.best) for row in whole}, rule.best) if rule else None
    for row in whole if rule else []:
        assert rule is not None and row.step is not None
        row.kept += ["newest"] if row is whole[-1] else [f"one of the newest {rule.keep}"] if row in whole[-rule.keep :] else []
        row.kept += [f"every {rule.keep_every} steps"] if rule.keep_every and row.step % rule.keep_every == 0 else []
        row.kept += [f"best {rule.best}"] if row.name == best else []
    for name in sorted(set(store.unfinished()), key=_place):
        what = "being removed, or left of that" if name.endswith(REMOVED) else "being written, or left of a save broken off"
        found.append(Row(name, "unfinished", fault=what))
    return found


def _place(name: str) -> tuple[int, str]:
    number = re.match(r"step-(\d{1,18})", name)
    return (int(number[1]) if number else 0), name


def _row(store: Store, name: str) -> Row:
    row = Row(name, "complete" if STEP.fullmatch(name) else "superseded")
    try:
        saved = open_in(store, name)
        info = saved.info
        row.step, row.format, row.bytes = info["step"], format_of(saved), size_of(saved)
        row.when = info["when"] if isinstance(info.get("when"), str) else None
        row.ranks = info["world_size"] if isinstance(info.get("world_size"), int) else None
        row.figures = info["figures"] if isinstance(info.get("figures"), dict) else {}
        row.fault = wrong_name(saved) or saved.wrong_size()
    except DamagedError as error:
        row.fault = str(error)
    except ValueError as error:
        row.state, row.fault = "unknown", str(error)
    if row.state == "complete" and row.fault:
        row.state = "damaged"
    return row


def _retention(store: Store, whole: list[Row]) -> CheckpointConfig | None:
    """As the newest checkpoint says it, which anyone may have written."""
    if not whole:
        return None
    try:
        said = open_in(store, whole[-1].name).info["config"]["checkpoint"]
        numbers = {name: int(said.get(name, 0)) for name in ("keep", "keep_every")}
        return CheckpointConfig(keep=numbers["keep"], keep_every=numbers["keep_every"], best=str(said.get("best", "")))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError):
        return None


def words(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
