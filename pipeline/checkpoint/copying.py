"""A checkpoint in another place: another folder or store, in either direction. One of format 1 becomes one of the present format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from dali_loaders.outputs import check_folder
from pipeline.checkpoint import comparing, data_file, manifest
from pipeline.checkpoint.data_file import Written
from pipeline.checkpoint.first_format import FirstCheckpoint
from pipeline.checkpoint.folder import FOLDER, NAME, step_of
from pipeline.checkpoint.looking import fault_of, size_of, words
from pipeline.checkpoint.manifest import DamagedError
from pipeline.checkpoint.parts import Part
from pipeline.checkpoint.reading import IDENTITIES, Checkpoint, open_in
from pipeline.checkpoint.saving import FILE
from pipeline.checkpoint.stores import MANIFEST, PARTIAL, STEP, LocalStore, Store, split, store_of

Done = Callable[[int], None]  # is told of bytes


def copy(source: Checkpoint, to: str, done: Done = lambda count: None) -> str:
    """Writes TO/step-N, or TO itself if its last part is such a name, and returns where the copy is: complete, and read back. The source
    stays as it is. ValueError, and no copy, if something has that name already, or if one of the two is damaged or cannot be reached.

    done: is told of `work(source)` bytes in all"""
    is_committed = False
    try:
        store, name = destination(source, to)
        path = f"{store.path}/{name}"
        _refuse_what_is_there(store, name)
        if isinstance(source, FirstCheckpoint):
            _refuse_damage(fault_of(source, done))
        _begin(store, name)
    except OSError as error:
        raise ValueError(f"{source.path} cannot be copied to {to} ({words(error)})") from None
    try:
        written = _convert(source, store, name, done) if isinstance(source, FirstCheckpoint) else _copy(source, store, name, done)
        info = {key: value for key, value in source.info.items() if key not in comparing.OF_THE_FILES}
        _refuse_what_is_there(store, name)
        data_file.write_bytes(MANIFEST, store.create(name, MANIFEST), manifest.encode(info, written))
        store.commit(name)
        is_committed = True
        _compare(source, open_in(store, name), done)
    except BaseException as error:  # Ctrl-C too
        _take_back(store, name, is_committed)
        if isinstance(error, OSError):
            raise ValueError(f"{source.path} cannot be copied to {path} ({words(error)}); nothing is left of the copy") from None
        raise
    return path


def work(source: Checkpoint) -> int:
    """Bytes that a copy reads, one after the other: of the source, and again of what was written."""
    return size_of(source) * (4 if isinstance(source, FirstCheckpoint) else 2)


def destination(source: Checkpoint, to: str) -> tuple[Store, str]:
    """Where a copy goes: a store, and the name in it."""
    if "://" not in to:
        check_folder(to, "the copy")
    folder, last = split(to)
    name, step = NAME.format(source.info["step"]), source.info["step"]
    if STEP.fullmatch(last):
        if step_of(last) != step:
            raise ValueError(f"{to} would hold the checkpoint of step {step}, and be taken for damaged: call it {name}")
        return store_of(folder), last
    if not last:
        raise ValueError(f"{to} is all of a store: give a folder in it")
    if store_of(folder).exists(last, MANIFEST):
        raise ValueError(f"{to} is a checkpoint itself: give a folder of checkpoints, or a new name step-N")
    to = to.rstrip("/")
    if "://" not in to and FOLDER in LocalStore(to).names():  # a run's folder
        to = f"{to}/{FOLDER}"
    return store_of(to), name


def _refuse_what_is_there(store: Store, name: str) -> None:
    if name in store.names():
        raise ValueError(f"{store.path}/{name} is there already, and nothing is overwritten: give another folder")


def _begin(store: Store, name: str) -> None:
    try:
        store.begin_beside(name)
    except FileExistsError:
        left = f"{store.path}/{name}{PARTIAL if isinstance(store, LocalStore) else ''}"
        raise ValueError(f"{left} is there: it is being written, or was broken off. Wait, or remove it, and copy again") from None


def _take_back(store: Store, name: str, is_committed: bool) -> None:
    with suppress(OSError):
        if is_committed:
            store.remove(name)
        elif isinstance(store, LocalStore) or not store.exists(name, MANIFEST):  # in a store it may be another's by now
            store.abandon(name)


def _refuse_damage(fault: str | None) -> None:
    if fault is not None:
        raise DamagedError(f"a damaged checkpoint is not copied: {fault}")


def _copy(source: Checkpoint, store: Store, name: str, done: Done) -> list[Written]:
    """The files as they are. Each block is checked between reading and writing."""
    written = []
    for file in source.manifest.files:
        entries = [entry for parts in source.manifest.tensors.values() for entry in parts if entry.file == file]
        written.append(data_file.write_pieces(file, store.create(name, file), _telling(source.contents(file), done), entries))
    return written


def _telling(pieces: Iterator[memoryview], done: Done) -> Iterator[memoryview]:
    for piece in pieces:
        yield piece
        done(len(piece))


def _convert(source: FirstCheckpoint, store: Store, name: str, done: Done) -> list[Written]:
    """File k gets the k-th piece of each tensor. One piece at a time is in memory."""
    written = []
    for number in range(max(map(len, source.pieces.values()), default=0)):
        parts = {}
        for tensor, pieces in source.pieces.items():
            if number < len(pieces):
                start, count, *_ = pieces[number]
                parts[tensor] = Part(torch.empty(count, dtype=source.dtype(tensor), device="meta"), source.shape(tensor), start)

        def piece(tensor: str, number: int = number) -> Tensor:
            read = source.piece(tensor, number)
            done(read.numel() * read.itemsize)
            return read

        file = FILE.format(number)
        written.append(data_file.write(file, store.create(name, file), parts, piece))
    names = source.identities()
    if names is not None:
        written.append(data_file.write_bytes(IDENTITIES, store.create(name, IDENTITIES), json.dumps(names).encode()))
    return written


def _compare(source: Checkpoint, copied: Checkpoint, done: Done) -> None:
    """The copy is read back from where it lies. DamagedError if it is not the same."""
    fault = fault_of(copied, done)
    if fault is None and isinstance(source, FirstCheckpoint):
        unequal = [*comparing.kinds(source, copied), *comparing.contents(source, copied, done)]
        fault = f"{unequal[0]} is not what it was" if unequal else None
        if comparing.identities(source, copied) is not None:
            fault = f"{IDENTITIES} is not what it was"
    elif fault is None and copied.manifest.files != source.manifest.files:
        fault = "its files are not those that were copied"
    if fault is not None:
        raise DamagedError(f"the copy at {copied.path} is not what was written ({fault}) and was removed: copy again")
