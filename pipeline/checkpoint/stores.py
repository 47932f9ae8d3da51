"""Where checkpoints lie: a local folder, where one appears by a rename, or an address. Both know folders of files by name, and nothing of
what is in them."""

from __future__ import annotations

import errno
import os
import re
import shutil
from contextlib import suppress
from typing import Any

from pipeline.checkpoint.remote_store import RemoteStore
from pipeline.checkpoint.store import LEFT_OVER, MANIFEST, PARTIAL, REMOVED, STEP, Sink, Store, UnreachableError

__all__ = ["MANIFEST", "STEP", "LocalStore", "Sink", "Store", "UnreachableError", "split", "store_of"]


def store_of(path: str) -> Store:
    """ValueError for an address that fsspec, or the package it needs, cannot open."""
    path = _local(path)
    return RemoteStore(path) if "://" in path else LocalStore(path)


def split(path: str) -> tuple[str, str]:
    """The folder that a path lies in, and its name there, "" for the root of a store."""
    path = _local(path)
    folder, _, name = path.rstrip("/").rpartition("/")
    return (path, "") if folder.endswith(":/") or path.endswith("://") else (folder or ("/" if path.startswith("/") else os.curdir), name)


def _local(path: str) -> str:
    return re.sub(r"^(file|local)://", "", path)


class LocalStore:
    def __init__(self, path: str) -> None:
        self.path = path
        self.is_rooted = False  # whether the folders around it are on the disk

    def _at(self, *parts: str) -> str:
        return os.path.join(self.path, *parts)

    def names(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.path) if not name.endswith((PARTIAL, REMOVED))]
        except FileNotFoundError:
            return []

    def unfinished(self) -> list[str]:
        try:
            return list(filter(LEFT_OVER.fullmatch, os.listdir(self.path)))
        except FileNotFoundError:
            return []

    def exists(self, name: str, file: str) -> bool:
        return os.path.lexists(self._at(name, file))

    def size(self, name: str, file: str) -> int:
        return _open_regular(self._at(name, file), lambda descriptor: os.fstat(descriptor).st_size)

    def read_into(self, name: str, file: str, offset: int, out: memoryview) -> None:
        def read(descriptor: int) -> None:
            done = 0
            while done < len(out):
                count = os.preadv(descriptor, [out[done:]], offset + done)
                if not count:
                    raise EOFError(f"{file} ends early")
                done += count

        _open_regular(self._at(name, file), read)

    def begin(self, name: str) -> None:
        self._make_room(name)
        for left in self.unfinished():
            with suppress(OSError):  # in the way only if it has the new one's name, which mkdir then says
                _delete(self._at(left))
        os.mkdir(self._at(name + PARTIAL), mode=0o755)

    def begin_beside(self, name: str) -> None:
        self._make_room(name)
        os.mkdir(self._at(name + PARTIAL), mode=0o755)

    def _make_room(self, name: str) -> None:
        os.makedirs(self.path, mode=0o755, exist_ok=True)
        if not self.is_rooted:  # of a new run's folder no trace may be on the disk yet
            _sync_parents(self.path)
            self.is_rooted = True
        if os.path.lexists(self._at(name)):
            raise FileExistsError(errno.EEXIST, f"there is a {name} already")

    def create(self, name: str, file: str) -> Sink:
        return _LocalSink(self._at(name + PARTIAL, file))

    def commit(self, name: str) -> None:
        _sync_folder(self._at(name + PARTIAL))
        os.rename(self._at(name + PARTIAL), self._at(name))  # fails if a folder of that name has come up that is not empty
        _sync_folder(self.path)

    def abandon(self, name: str) -> None:
        with suppress(OSError):
            _delete(self._at(name + PARTIAL))

    def rename(self, name: str, new: str) -> None:
        os.rename(self._at(name), self._at(new))
        _sync_folder(self.path)

    def remove(self, name: str) -> None:
        """First by its name, so that one that is half removed is never taken for a checkpoint."""
        os.rename(self._at(name), self._at(name + REMOVED))
        _delete(self._at(name + REMOVED))


class _LocalSink:
    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(self, data: memoryview) -> None:
        while data:
            data = data[os.write(self.descriptor, data) :]

    def close(self) -> None:
        try:
            os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)

    def discard(self) -> None:
        os.close(self.descriptor)


def _delete(path: str) -> None:
    """A folder with all that is in it; of a symbolic link the link alone."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.remove(path)


def _open_regular(path: str, use: Any) -> Any:
    """use(descriptor), for a regular file only: opening a named pipe, or reading a device, would never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not _is_regular(descriptor):
            raise IsADirectoryError(f"{path} is not a file")
        return use(descriptor)
    finally:
        os.close(descriptor)


def _is_regular(descriptor: int) -> bool:
    return (os.fstat(descriptor).st_mode & 0o170000) == 0o100000


def _sync_folder(path: str) -> None:
    """A rename is on the disk once the folder around it is."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems of which folders cannot be synced
            raise
    finally:
        os.close(descriptor)


def _sync_parents(path: str) -> None:
    """The folders around PATH, as far as they may be opened."""
    folder = os.path.realpath(path)
    while folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
        with suppress(OSError):
            _sync_folder(folder)
