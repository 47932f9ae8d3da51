"""Sharded checkpoints that know nothing of the number of ranks: written under a temporary name, verified, renamed when complete.
The prototypes and their momentum are one [C, D] matrix each, sharded by rows; everything else is replicated."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from pipeline.lease_files import is_used

log = logging.getLogger(__name__)
T = TypeVar("T")

INFO = "protoshard.json"  # describes the checkpoint, with the size and CRC-32 of every other file in it; written last
IDENTITIES = "identities.json"  # a list of the names, by row of the prototypes; a few bytes beside each row's kilobytes
NAME = "step-{:08d}"
PARTIAL = ".partial"
SUPERSEDED = ".superseded"


@dataclass(frozen=True)
class CheckpointConfig:
    every_epochs: float = 1.0  # also one at the end of the run
    every_steps: int = 0  # if positive, this instead of every_epochs
    keep: int = 3  # newest ones kept

    def __post_init__(self) -> None:
        if self.every_epochs <= 0:
            raise ValueError(f"checkpoint.every_epochs is {self.every_epochs}, but must be positive")
        for name, least in (("every_steps", 0), ("keep", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"checkpoint.{name} is {getattr(self, name)}, but must be at least {least}")


def sharded(local_SD: Tensor, rows: int) -> Tensor:
    """This rank's rows of a [rows, D] matrix, as the whole that a checkpoint holds. The split must be torch.chunk's (partial_fc.shards)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local_SD
    mesh = init_device_mesh(local_SD.device.type, (dist.get_world_size(),))
    shape = torch.Size((rows, *local_SD.shape[1:]))
    return DTensor.from_local(local_SD, mesh, [Shard(0)], run_check=False, shape=shape, stride=local_SD.contiguous().stride())


def save(folder: str, step: int, state: dict[str, Tensor], info: dict[str, Any], keep: int, identities: Sequence[str] | None = None) -> str:
    """Writes FOLDER/step-N and returns its path; every rank calls it with the same names. On return the checkpoint is complete on disk,
    and all but the `keep` newest are gone. Whatever fails before leaves the earlier ones as they were.

    identities: names of the classes, for `read_identities`
    """
    path = os.path.join(folder, NAME.format(step))
    partial = path + PARTIAL
    first = _rank() == 0
    if first:
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            if name.endswith(PARTIAL):  # left by a save that was broken off
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
        os.makedirs(partial)
        if identities is not None:
            _write_json(os.path.join(partial, IDENTITIES), identities)
    _barrier()
    try:
        dcp.save(state, storage_writer=FileSystemWriter(partial), no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:  # on every rank; a BaseException, which `except Exception` would miss
        cause = next(iter(error.failures.values()), (error,))[0]
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise ValueError(f"checkpoint {path} could not be written ({cause}): is there room? The ones before it are untouched") from None
    files = _as_first_rank_sees(lambda: sorted(os.listdir(partial)))
    written = _merge({name: _fingerprint(os.path.join(partial, name)) for name in _share(files)})
    if first:
        _write_json(os.path.join(partial, INFO), {"format": 1, "step": step, **info, "files": written}, indent=1)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(partial, path)
        for name in list(reversed(complete(folder)))[keep:]:
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    _barrier()
    return path


def complete(folder: str) -> list[str]:
    """Names of the checkpoints in FOLDER that were renamed when complete, oldest first; not verified."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted((name for name in names if re.fullmatch(r"step-\d+", name)), key=lambda name: int(name.removeprefix("step-")))


def newest(folder: str) -> str | None:
    """The newest checkpoint in FOLDER that is whole, or None. One that is damaged or was cut off is named in the log and passed over."""
    for name in reversed(_as_first_rank_sees(lambda: complete(folder))):
        path = os.path.join(folder, name)
        fault = verify(path)
        if fault is None:
            return path
        if _rank() == 0:
            log.warning("checkpoint %s cannot be used (%s): looking for the one before it", path, fault)
    return None


def supersede(folder: str, step: int) -> None:
    """Renames the checkpoints in FOLDER that are newer than `step`, from which a run goes on: they belong to a
    course that was given up, and would be taken for the newest. Every rank calls it."""
    if _rank() == 0:
        for name in complete(folder):
            if int(name.removeprefix("step-")) > step:
                log.warning("keeping %s as %s%s: the run goes on from step %d", os.path.join(folder, name), name, SUPERSEDED, step)
                shutil.rmtree(os.path.join(folder, name + SUPERSEDED), ignore_errors=True)
                os.rename(os.path.join(folder, name), os.path.join(folder, name + SUPERSEDED))
    _barrier()


def set_aside(folder: str) -> None:
    """Renames an earlier run's folder, so that a new start loses nothing, and makes an empty one. Every rank calls it. Where FOLDER is a
    symbolic link, that is done to the folder it leads to."""
    folder = os.path.realpath(folder) if os.path.islink(folder) else folder
    if _rank() == 0 and os.path.isdir(folder) and is_used(folder):
        number = next(number for number in itertools.count(1) if not os.path.exists(f"{folder}.{number}"))
        try:
            os.rename(folder, f"{folder}.{number}")
        except OSError as error:  # it is mounted, say
            raise ValueError(f"the earlier run in {folder} cannot be renamed ({error.strerror}): move it yourself") from None
        os.makedirs(folder)
        print(f"kept the earlier run as {folder}.{number}", file=sys.stderr)
    _barrier()


def verify(path: str) -> str | None:
    """What is wrong with a checkpoint, or None. Every rank reads its share of the files once and compares their checksums."""
    faults: dict[str, str] = {}
    try:
        files = read_info(path)["files"]
        for name in _share(sorted(files)):
            full = os.path.join(path, name)
            if not os.path.isfile(full):
                faults[name] = f"{name} is missing"
            elif os.path.getsize(full) != files[name][0]:
                faults[name] = f"{name} has {os.path.getsize(full)} bytes instead of {files[name][0]}"
            elif _fingerprint(full) != files[name]:
                faults[name] = f"the contents of {name} have changed since it was written"
    except ValueError as error:
        faults[INFO] = str(error)
    return next(iter(_merge(faults).values()), None)


def locate(path: str) -> str:
    """The checkpoint that a user's PATH means: a checkpoint, or the newest whole one in a folder of them or in a run's folder."""
    if _as_first_rank_sees(lambda: os.path.isfile(os.path.join(path, INFO))):
        fault = verify(path)
        if fault is not None:
            raise ValueError(f"checkpoint {path} cannot be used: {fault}")
        return path
    for folder in (path, os.path.join(path, "checkpoints")):
        found = newest(folder)
        if found is not None:
            return found
    raise ValueError(f"there is no complete checkpoint at {path}: give a step-N folder, or the folder of a run that has written one")


def read_info(path: str) -> dict[str, Any]:
    """Everything the saver said about the checkpoint: step, consumed, num_classes, width, config, files."""
    name = os.path.join(path, INFO)
    try:
        with open(name) as file:
            info = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read ({error})") from None
    if not isinstance(info, dict) or info.get("format") != 1:
        raise ValueError(f"{name} is not of format 1, the only one this version reads")
    return info


def read_identities(path: str) -> list[str] | None:
    """Names of the classes, by row of the prototypes; None if the checkpoint has none, as those of earlier versions."""
    name = os.path.join(path, IDENTITIES)
    if not os.path.isfile(name):
        return None
    try:
        with open(name) as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read ({error})") from None


def tensors(path: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in a checkpoint."""
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: (item.size, item.properties.dtype) for name, item in metadata.items() if isinstance(item, TensorStorageMetadata)}


def load(path: str, state: dict[str, Tensor]) -> None:
    """Fills the tensors of `state` (from `sharded`, or ordinary ones) in place, from a checkpoint written on any number of ranks."""
    try:
        dcp.load(state, storage_reader=FileSystemReader(path), no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:  # a BaseException, which `except Exception` would miss
        cause = next(iter(error.failures.values()), (error,))[0]
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise ValueError(f"checkpoint {path} cannot be read: {cause}") from None


def load_replicated(path: str, prefix: str) -> dict[str, Tensor]:
    """All tensors whose name begins with `prefix`, on the CPU of every caller."""
    wanted = {name: kind for name, kind in tensors(path).items() if name.startswith(prefix)}
    state = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()}
    load(path, state)
    return state


def _as_first_rank_sees(look: Callable[[], T]) -> T:
    """What rank 0 sees: with a network file system, machines may list a folder differently for a while."""
    seen = [look() if _rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(seen)
    return cast(T, seen[0])


def _write_json(path: str, value: Any, indent: int | None = None) -> None:
    with open(path, "w") as file:
        file.write(json.dumps(value, indent=indent))
        file.flush()
        os.fsync(file.fileno())


def _fingerprint(path: str) -> list[int]:
    """[size in bytes, CRC-32]."""
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _share(names: list[str]) -> list[str]:
    return names[_rank() :: dist.get_world_size()] if dist.is_initialized() else names


def _merge(mine: dict[str, Any]) -> dict[str, Any]:
    """The union of every rank's dictionary, on every rank."""
    parts = [mine]
    if dist.is_initialized():
        parts = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in sorted(part.items())}
