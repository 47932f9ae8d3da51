"""Copies of remote sets in a local cache folder: whole or not at all, in their present version, made by one process per machine."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dali_loaders.account import Unreadable
from dali_loaders.config import TIMEOUT
from dali_loaders.readers import Numbers, Part, Readers
from dali_loaders.remote import TRIES, RemoteFile, cache_name, connect, described, lasting, retried, without_secrets, words
from dali_loaders.sources.patterns import braces
from dali_loaders.waiting import waiting

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_PIECE = 16 << 20  # bytes asked for at once
_PIECES_AT_ONCE = 8

log = logging.getLogger(__name__)


def is_copied(address: str) -> bool:
    """Whether an address is that of files, which are copied before they are opened, and not that of a folder of images."""
    return re.search(r"\.(rec|tar|parquet)(#.*)?$", address, re.IGNORECASE) is not None


def fetch(address: str, cache: str) -> str:
    """Copies the files of a set into the folder `cache`, unless they are there in their present version, and returns their local path.

    address: a .rec (with its .idx and .identities.txt), a .tar or .parquet, or a pattern of them (shard-{000..127}.tar, train-*.parquet);
    a #IMAGE:LABEL stays at its end. The set appears under its local path once it is whole. One process copies, and the others of this
    machine wait for it. Older versions are removed. ValueError, in a sentence, if it cannot be copied."""
    if not cache:
        raise ValueError(f"{without_secrets(address)} is remote: set data.cache to a local folder with room for a copy of it.")
    address, mark, columns = address.partition("#")
    system, path = connect(address)
    start = re.search(r"[^/]*([*{].*)?$", path)
    assert start
    name = start[0]  # the file's name, or the pattern from its first wildcard on

    def listing() -> list[RemoteFile]:
        return retried(lambda: _files(system, path.removesuffix(name), name))

    with _sentence(address), waiting(f"the list of files at {address}"):
        files = listing()
    versions = hashlib.sha256("\n".join(map(str, files)).encode()).hexdigest()[:12]
    folder = os.path.join(cache, f"{cache_name(address)}-{versions}")
    if not _whole(folder, files):
        with _writing(cache):
            os.makedirs(cache, exist_ok=True)
        with _locked(cache):
            if not _whole(folder, files):
                _copy_all(system, address, files, listing, cache, folder)
            _remove_others(cache, address, folder)
    return os.path.join(folder, name) + mark + columns


def _files(system: AbstractFileSystem, folder: str, name: str) -> list[RemoteFile]:
    system.invalidate_cache()
    if "*" in name:
        found = system.glob(folder + name, detail=True)
        files = [described(folder, path[len(folder) :], info) for path, info in sorted(found.items()) if info["type"] == "file"]
        if not all(_stays_inside(file.name) for file in files):
            raise ValueError(f"{folder}{name}: a file's name would lead out of the cache folder.")
        if not files:
            raise FileNotFoundError("no file has such a name")
        return files
    if not all(map(_stays_inside, braces(name))):
        raise ValueError(f"{folder}{name} leaves its folder; give the address without '..' and without '//'.")
    files = [described(folder, one, system.info(folder + one)) for one in braces(name)]
    if name.endswith(".rec"):
        beside = (name.removesuffix(".rec") + end for end in (".idx", ".identities.txt"))
        files += [described(folder, one, system.info(folder + one)) for one in beside if system.exists(folder + one)]
    return files


def _stays_inside(name: str) -> bool:
    """Whether a name, which a server may have made up, is that of a file below the folder that it is put into: "/etc/x" is none."""
    return not {"", ".", ".."} & set(name.split("/")) and "\0" not in name


def _whole(folder: str, files: list[RemoteFile]) -> bool:
    try:
        return all(os.path.getsize(os.path.join(folder, file.name)) == file.size for file in files)
    except OSError:  # another one than "not there" will show when the folder is made
        return False


def _copy_all(
    system: AbstractFileSystem,
    address: str,
    files: list[RemoteFile],
    listing: Callable[[], list[RemoteFile]],
    cache: str,
    folder: str,
) -> None:
    """Files that a killed process had copied whole are taken over; an error leaves nothing behind."""
    part = f"{folder}.part"
    try:
        with _writing(cache):
            os.makedirs(part, exist_ok=True)
            free = shutil.disk_usage(cache).free
        wanted = [file for file in files if not _whole(part, [file])]
        progress = _Progress(address, sum(file.size for file in wanted))
        if free < progress.bytes:
            raise ValueError(
                f"{progress.address} has {progress.bytes >> 20} MB to copy, but {cache} has {free >> 20} MB left; "
                "choose another data.cache."
            )
        for file in wanted:
            with _sentence(address):
                _copy(system, file, os.path.join(part, file.name), cache, progress)
        with _sentence(address):
            changed = listing() != files
        if changed:
            raise ValueError(f"{progress.address} has changed while it was copied; start again when it is complete.")
        with _writing(cache):
            shutil.rmtree(folder, ignore_errors=True)  # one from which files were taken
            os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _copy(system: AbstractFileSystem, file: RemoteFile, path: str, cache: str, progress: _Progress) -> None:
    if file.size > _PIECE:
        retried(lambda: _check_parts(system, file))
    with _writing(cache):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(f"{path}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        with closing(_pieces(system, file, progress)) as pieces:
            for data in pieces:
                with _writing(cache):
                    written = 0
                    while written < len(data):
                        written += os.write(descriptor, memoryview(data)[written:])
                progress.add(len(data))
        with _writing(cache):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    with _writing(cache):
        os.rename(f"{path}.tmp", path)


def _pieces(system: AbstractFileSystem, file: RemoteFile, progress: _Progress) -> Generator[bytes, None, None]:
    """The file, several pieces ahead. A thread whose read hangs is left behind, so that none may write."""

    def read(numbers: Numbers) -> Iterator[bytes]:
        for number in numbers:
            start = int(number) * _PIECE
            yield retried(partial(_read_piece, system, file, start, min(start + _PIECE, file.size)))

    readers: Readers[bytes] = Readers(read, file.path, lambda number: f"piece {number} of {file.path}", _PIECES_AT_ONCE, TIMEOUT)
    numbers, ahead = iter(range(-(-file.size // _PIECE))), deque[Part[bytes]]()
    with closing(readers):
        while True:
            ahead.extend(readers.submit([number]) for number in itertools.islice(numbers, _PIECES_AT_ONCE - len(ahead)))
            if not ahead:
                return
            with waiting(lambda: f"{progress}: {readers.doing()}"):
                (data,) = readers.result(ahead.popleft())
            if isinstance(data, Unreadable):
                raise ValueError(f"{progress.address} cannot be read: {data.reason}; check the connection.")
            yield data


def _read_piece(system: AbstractFileSystem, file: RemoteFile, start: int, end: int) -> bytes:
    data = system.cat_file(file.path, start=start, end=end)
    if len(data) != end - start:
        raise OSError(f"{file.name} gave {len(data)} bytes where {end - start} were asked for")
    return data


def _check_parts(system: AbstractFileSystem, file: RemoteFile) -> None:
    """Some HTTP servers answer with the whole file when a part is asked for, which fsspec refuses here before it reads it into memory."""
    with system.open(file.path, "rb", block_size=_PIECE, cache_type="none") as opened:
        opened.seek(file.size - 1)
        try:
            opened.read(1)
        except ValueError as error:
            raise ValueError(f"{file.path}: its server does not send parts of a file ({words(error)}); copy it by other means.") from error


class _Progress:
    """A line in the log every 10 seconds."""

    def __init__(self, address: str, size: int) -> None:
        self.address, self.bytes, self.done, self._said = without_secrets(address), size, 0, time.monotonic()
        log.info("copying %s, %d MB", self.address, size >> 20)

    def add(self, size: int) -> None:
        self.done += size
        if time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            log.info("%s", self)

    def __str__(self) -> str:
        return f"the copy of {self.address}, {self.done >> 20} of {self.bytes >> 20} MB"


def _remove_others(cache: str, address: str, folder: str) -> None:
    for entry in os.listdir(cache):
        path = os.path.join(cache, entry)
        if re.fullmatch(re.escape(cache_name(address)) + r"-[0-9a-f]{12}(\.part)?", entry) and path != folder:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(cache: str) -> Iterator[None]:
    """Holds the lock of the folder itself, which ends with its process and leaves no file."""
    with _writing(cache):
        descriptor = os.open(cache, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _writing(cache):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with waiting(f"another process that copies into {cache}"):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _writing(cache: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the cache folder {cache} cannot be written: {words(error)}; choose another data.cache, local and with room."
        ) from error


@contextmanager
def _sentence(address: str) -> Iterator[None]:
    address = without_secrets(address)
    try:
        yield
    except ValueError:
        raise
    except PermissionError as error:
        raise ValueError(f"{address} may not be read ({words(error)}); check the credentials of this machine.") from error
    except Exception as error:
        if not lasting(error):
            raise ValueError(f"{address} cannot be read ({words(error)}, {TRIES} times); check the connection.") from error
        raise ValueError(f"{address} does not exist, or lacks files ({words(error)}).") from error
