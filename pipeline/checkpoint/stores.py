"""Where checkpoints lie: a local folder, where one appears by a rename, or an address that fsspec opens, where it appears with its
manifest. Both know folders of files by name, and nothing of what is in them."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from dali_loaders.extras import extra
from dali_loaders.remote import without_secrets

MANIFEST = "protoshard.json"  # written last
PARTIAL = ".partial"
REMOVED = ".removed"  # being removed
LEFT_OVER = re.compile(r"step-\d+\.(partial|removed)")  # nothing else is cleared away
STEP = re.compile(r"step-\d{1,18}")  # the names of checkpoints


class UnreachableError(OSError):
    """A store that gives no answer, or a wrong one: which says nothing about what lies in it."""


class Sink(Protocol):
    """A file being written. On return of `close` it is on the disk, or in the store; after `discard` it is of no use."""

    def write(self, data: memoryview) -> None: ...

    def close(self) -> None: ...

    def discard(self) -> None: ...


class Store(Protocol):
    """A folder of checkpoints; each is a folder of files. OSError of all kinds comes out of everything."""

    path: str  # without passwords

    def names(self) -> list[str]:
        """Of the folders in it that are complete, in no order; none where it does not exist."""
        ...

    def unfinished(self) -> list[str]:
        """Of the folders of saves that are under way or were broken off, and of removals, in no order."""
        ...

    def exists(self, name: str, file: str) -> bool: ...

    def size(self, name: str, file: str) -> int:
        """Bytes. FileNotFoundError; IsADirectoryError for what is no regular file."""
        ...

    def read_into(self, name: str, file: str, offset: int, out: memoryview) -> None:
        """Fills `out` from that offset on; EOFError where the file ends before."""
        ...

    def begin(self, name: str) -> None:
        """Makes room for a new checkpoint and removes what is left of saves that were broken off. One rank calls it, before the others.
        FileExistsError if there is anything of that name: nothing is ever written over."""
        ...

    def begin_beside(self, name: str) -> None:
        """Makes room for a new checkpoint where a run may be saving others, and removes nothing. FileExistsError if one of that name is
        there, or has begun."""
        ...

    def create(self, name: str, file: str) -> Sink:
        """A file of a checkpoint that has begun."""
        ...

    def commit(self, name: str) -> None:
        """After the manifest: from now on the checkpoint is complete, also after a power loss."""
        ...

    def abandon(self, name: str) -> None:
        """Removes what a save that failed has written."""
        ...

    def rename(self, name: str, new: str) -> None: ...

    def remove(self, name: str) -> None: ...


def store_of(path: str) -> Store:
    """ValueError for an address that fsspec, or the package it needs, cannot open."""
    path = re.sub(r"^(file|local)://", "", path)
    return RemoteStore(path) if "://" in path else LocalStore(path)


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


class RemoteStore:
    """Stores have no renames that are atomic, so a checkpoint is complete once its manifest is there. Files are sent as they are written.
    Whatever a library raises becomes an UnreachableError, but for what says that a file is not there: a store that gives no answer is
    never taken for one that has lost what was in it."""

    def __init__(self, path: str) -> None:
        with extra("train"):
            from fsspec.core import url_to_fs

        path = path if path.endswith("://") else path.rstrip("/")
        self.path = without_secrets(path)  # as it is called in messages
        try:
            self.system, self.root = url_to_fs(path, use_listings_cache=False)
        except Exception as error:  # ImportError names the package; others come from a library that connects at once
            raise ValueError(f"{self.path} cannot be opened ({without_secrets(str(error))})") from None

    def _at(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def names(self) -> list[str]:
        return [name for name in self._folders() if self.exists(name, MANIFEST)]

    def unfinished(self) -> list[str]:
        return [name for name in filter(STEP.fullmatch, self._folders()) if not self.exists(name, MANIFEST)]

    def _folders(self) -> list[str]:
        try:
            with _as_os_error(self.path):
                entries = self.system.ls(self.root, detail=True)
                return [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]
        except FileNotFoundError:
            return []

    def exists(self, name: str, file: str) -> bool:
        try:
            with _as_os_error(self.path):
                self.system.info(self._at(name, file))  # its `exists` answers no where there was no answer
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str, file: str) -> int:
        with _as_os_error(self.path):
            entry = self.system.info(self._at(name, file))
        if entry["type"] != "file":
            raise IsADirectoryError(f"{file} is not a file")
        return entry["size"]

    def read_into(self, name: str, file: str, offset: int, out: memoryview) -> None:
        with _as_os_error(self.path):
            data = self.system.cat_file(self._at(name, file), start=offset, end=offset + len(out)) if len(out) else b""
            if len(data) != len(out):
                raise EOFError(f"{file} ends early")
            out[:] = data

    def begin(self, name: str) -> None:
        with _as_os_error(self.path):
            self.system.makedirs(self.root, exist_ok=True)
        for left in filter(STEP.fullmatch, self._folders()):
            if self.exists(left, MANIFEST):
                if left == name:
                    raise FileExistsError(errno.EEXIST, f"there is a {name} already")
            else:
                try:
                    self.remove(left)
                except OSError:
                    if left == name:
                        raise

    def begin_beside(self, name: str) -> None:
        if name in self._folders():
            raise FileExistsError(errno.EEXIST, f"there is a {name} already")

    def create(self, name: str, file: str) -> Sink:
        with _as_os_error(self.path):
            self.system.makedirs(self._at(name), exist_ok=True)
            return _RemoteSink(self.system.open(self._at(name, file), "wb"), self.path)

    def commit(self, name: str) -> None:
        pass

    def abandon(self, name: str) -> None:
        with suppress(OSError):
            self.remove(name)

    def rename(self, name: str, new: str) -> None:
        with _as_os_error(self.path):
            self.system.mv(self._at(name), self._at(new), recursive=True)

    def remove(self, name: str) -> None:
        if self.exists(name, MANIFEST):  # first, so that one that is half removed is never taken for a checkpoint
            with _as_os_error(self.path):
                self.system.rm_file(self._at(name, MANIFEST))
        with _as_os_error(self.path), suppress(FileNotFoundError):
            self.system.rm(self._at(name), recursive=True)


class _RemoteSink:
    def __init__(self, file: Any, path: str) -> None:
        self.file, self.path = file, path

    def write(self, data: memoryview) -> None:
        with _as_os_error(self.path):
            self.file.write(data)

    def close(self) -> None:
        with _as_os_error(self.path):
            self.file.close()

    def discard(self) -> None:
        with suppress(Exception):
            self.file.close()


@contextmanager
def _as_os_error(path: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, EOFError):
        raise
    except Exception as error:  # of any library behind fsspec
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreachableError(f"{path}: {without_secrets(reason)}") from error
