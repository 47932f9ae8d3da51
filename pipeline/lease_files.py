"""Where lease files lie: in a folder, where locks of the kernel may help, or in a store that fsspec opens. lease.py says what for."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

from dali_loaders.remote import connect, is_remote, retried, words
from pipeline import heartbeat

NAME = re.compile(r"lease-([1-9]\d*)\.json")
LOGS = "logs"  # a folder in that of a run: what a launcher keeps of its jobs
LARGEST = 4096  # bytes that are read of a lease, which has 512
T = TypeVar("T")

_locked: set[int] = set()  # descriptors whose locks are this process's alone


def _let_go_in_child() -> None:
    """A child that is forked and outlives this process, killed, would keep its locks."""
    for descriptor in _locked:
        with suppress(OSError):
            os.close(descriptor)
    _locked.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


class Files(Protocol):
    """Numbered lease files in one place. OSError where it cannot be reached or written."""

    where: str  # as messages name it
    kernel: str | None  # equal for two processes only if a lock of one is seen by the other, and goes when its holder is killed
    is_locked: bool  # whether the file that `claim` made is locked

    def numbers(self) -> list[int]: ...

    def read(self, number: int) -> bytes | None:
        """None if there is no such file."""
        ...

    def claim(self, number: int) -> bool:
        """Makes the file, locked where there are locks. False if there is one already."""
        ...

    def write(self, number: int, content: bytes) -> None:
        """In place, so that a full disk does no harm to it."""
        ...

    def delete(self, number: int) -> None: ...

    def try_lock(self, number: int) -> bool | None:
        """False if another process has the lock of that file. True if it is now this one's, until the next `claim` or `unlock`. None where
        there are no locks."""
        ...

    def unlock(self) -> None: ...

    def is_still_there(self) -> bool:
        """Whether the place is still the one that it was, and not what stands at its name after it was renamed or unmounted."""
        ...

    def leave(self, content: bytes | None) -> None:
        """Gives up the lock on the file that `claim` made, after a last word in it, whatever its folder is called by now."""
        ...


def files_at(address: str) -> Files:
    """Those of a folder, or of a store's address such as s3://bucket/run."""
    if not is_remote(address):
        return FolderFiles(address)
    system, path = connect(address)
    protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    return FolderFiles(path) if "file" in protocols else StoreFiles(address)


def is_used(folder: str) -> bool:
    """Whether there is anything in a folder besides its lease, what ranks are doing, logs, and an empty folder for checkpoints."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name in (heartbeat.FOLDER, LOGS):
            continue
        if not NAME.fullmatch(name) and not (name == "checkpoints" and os.path.isdir(path) and not is_used(path)):
            return True
    return False


class FolderFiles:
    """Makes the folder where it is missing. Symbolic links are followed to where they lead."""

    def __init__(self, folder: str) -> None:
        self.where = os.path.realpath(folder)
        os.makedirs(self.where, exist_ok=True)
        self._folder = os.stat(self.where)
        boot = _boot_id()
        # Of two mounts of one network file system, each may know the locks of its own users only, so the device belongs to it.
        self.kernel = f"{boot}/{self._folder.st_dev}" if boot else None
        self.is_locked = False
        self._own: int | None = None
        self._tried: int | None = None

    def numbers(self) -> list[int]:
        return [int(match[1]) for name in os.listdir(self.where) if (match := NAME.fullmatch(name))]

    def read(self, number: int) -> bytes | None:
        try:
            descriptor = os.open(self._path(number), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(0, f"{self._path(number)} is not a file")
            return os.read(descriptor, LARGEST)
        finally:
            os.close(descriptor)

    def claim(self, number: int) -> bool:
        if self._own is not None:  # of a file that was deleted
            unlock(self._own)
            self._own = None
        try:
            self._own = os.open(self._path(number), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        for _ in range(20):  # whoever else tries the lock has it for a moment
            locked = lock(self._own)
            if locked is not False:
                break
            time.sleep(0.05)
        self.is_locked = bool(locked)
        self.unlock()
        return True

    def write(self, number: int, content: bytes) -> None:
        # Closed every time: that is when a network file system shows it to others. Not synced, which may take long on a busy disk.
        descriptor = os.open(self._path(number), os.O_WRONLY | os.O_NOFOLLOW)
        try:
            _write(descriptor, content)
        finally:
            os.close(descriptor)

    def delete(self, number: int) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path(number))

    def try_lock(self, number: int) -> bool | None:
        self.unlock()
        try:
            descriptor = os.open(self._path(number), os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except PermissionError:  # another user's; on a local disk the lock needs no more than this
            descriptor = os.open(self._path(number), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        locked = lock(descriptor)
        if locked:
            self._tried = descriptor
        else:
            os.close(descriptor)
        return locked

    def unlock(self) -> None:
        if self._tried is not None:
            unlock(self._tried)
            self._tried = None

    def is_still_there(self) -> bool:
        return os.path.samestat(os.stat(self.where), self._folder)

    def leave(self, content: bytes | None) -> None:
        self.unlock()
        if self._own is not None:
            descriptor, self._own = self._own, None
            try:
                _write(descriptor, content or b"")
            finally:
                unlock(descriptor)

    def _path(self, number: int) -> str:
        return os.path.join(self.where, f"lease-{number}.json")


class StoreFiles:
    """A store has no locks, and nothing in it can be made by only one of two: who has made a file waits, and looks whether it is still
    there (`Hold.take`)."""

    kernel: str | None = None
    is_locked = False

    def __init__(self, address: str) -> None:
        self.where = address
        self._system, self._folder = connect(address)
        self._own = 0

    def numbers(self) -> list[int]:
        def names() -> list[str]:
            self._system.invalidate_cache()
            return self._system.ls(self._folder, detail=False)

        try:
            found = self._reached(names)
        except FileNotFoundError:
            return []
        return [int(match[1]) for name in found if (match := NAME.fullmatch(name.rpartition("/")[2]))]

    def read(self, number: int) -> bytes | None:
        try:
            return self._reached(lambda: self._system.cat_file(self._path(number), 0, LARGEST))
        except FileNotFoundError:
            return None

    def claim(self, number: int) -> bool:
        if number in self.numbers():
            return False
        self.write(number, b"{}")
        self._own = number
        return True

    def write(self, number: int, content: bytes) -> None:
        self._reached(lambda: self._system.pipe_file(self._path(number), content))

    def delete(self, number: int) -> None:
        with suppress(FileNotFoundError):
            self._reached(lambda: self._system.rm_file(self._path(number)))

    def try_lock(self, number: int) -> bool | None:
        return None

    def unlock(self) -> None:
        pass

    def is_still_there(self) -> bool:
        return True

    def leave(self, content: bytes | None) -> None:
        if self._own and content:
            self.write(self._own, content)
        self._own = 0

    def _path(self, number: int) -> str:
        return f"{self._folder.rstrip('/')}/lease-{number}.json"

    def _reached(self, action: Callable[[], T]) -> T:
        try:
            return retried(action)
        except OSError:
            raise
        except Exception as error:  # packages of stores raise their own kinds
            raise OSError(0, words(error)) from error


def lock(descriptor: int) -> bool | None:
    """Whether the lock is now this process's; None where the file system has no locks, or none for this descriptor."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    _locked.add(descriptor)
    return True


def unlock(descriptor: int) -> None:
    _locked.discard(descriptor)
    os.close(descriptor)


def _write(descriptor: int, content: bytes) -> None:
    if os.pwrite(descriptor, content, 0) < len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _boot_id() -> str | None:
    """Which start of which kernel this is: unlike a host's name it is the same in all containers of a machine, and nobody changes it."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() or None
    except OSError:
        return None
