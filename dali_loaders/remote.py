"""Data at remote addresses (s3://, gs://, https:// and whatever else fsspec opens): what fails is tried again, and a set is copied once per
machine into a cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

TRIES = 4
_FIRST_WAIT = 0.5  # seconds, doubled from one try to the next
_PIECE = 16 << 20  # bytes asked for at once
_PIECES_AT_ONCE = 8
_PERMANENT = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    TypeError,
    ImportError,
    NotImplementedError,
)
# What tells one version of an object from the next, by the names that file systems give it.
_VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "Content-MD5",
    "generation",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "modified",
    "mtime",
    "updated",
)
_RUN = re.compile(r"\{(\d+)\.\.(\d+)\}")

T = TypeVar("T")
log = logging.getLogger(__name__)
_jitter = random.Random()  # one of its own: the module's state belongs to the user


class RemoteFile(NamedTuple):
    path: str  # as its file system calls it
    name: str  # below the address of the set
    size: int
    version: str


def is_remote(path: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.-]+)*://", path) is not None


def connect(address: str) -> tuple[AbstractFileSystem, str]:
    """The file system of an address, and the path on it. ValueError where its package (s3fs, gcsfs) is not installed."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{address} cannot be opened: {str(error).rstrip('.')}.") from error


def retried(action: Callable[[], T]) -> T:
    """action(), up to 4 times with growing pauses. What will not go away by itself, such as a file that is not there, is raised at once."""
    for attempt in range(1, TRIES):
        try:
            return action()
        except _PERMANENT:
            raise
        except Exception as error:  # packages of storages raise their own kinds
            pause = _FIRST_WAIT * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.5)
            log.info("%s; try %d of %d follows in %.1f s", words(error), attempt + 1, TRIES, pause)
            time.sleep(pause)
    return action()


def words(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


def described(folder: str, name: str, info: dict[str, Any]) -> RemoteFile:
    """From what a file system tells of an object."""
    if info.get("size") is None:
        raise ValueError(f"the size of {folder}{name} is unknown, so that a copy of it could not be checked; copy it by other means.")
    known = (info[key] for key in (*_VERSIONS, "created") if info.get(key) is not None)
    return RemoteFile(folder + name, name, int(info["size"]), str(next(known, "")))


def cache_name(address: str) -> str:
    """A folder's name for what comes from `address`: for people its last part, and a checksum of the whole."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "_", address.rstrip("/").rpartition("/")[2])
    return f"{last}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"


def fetch(address: str, cache: str) -> str:
    """Copies the files of a set into the folder `cache`, unless they are there in their present version, and returns their local path.

    address: a .rec (with its .idx and .identities.txt), a .tar or .parquet, or a pattern of them (shard-{000..127}.tar, train-*.parquet);
    a #IMAGE:LABEL stays at its end. The set appears under its local path once it is whole. One process copies, and the others of this
    machine wait for it. Older versions are removed. ValueError, in a sentence, if it cannot be copied."""
    if not cache:
        raise ValueError(f"{address} is remote: set data.cache to a local folder with room for a copy of it.")
    address, mark, columns = address.partition("#")
    system, path = connect(address)
    start = re.search(r"[^/]*([*{].*)?$", path)
    assert start
    name = start[0]  # the file's name, or the pattern from its first wildcard on

    def listing() -> list[RemoteFile]:
        return retried(lambda: _files(system, path.removesuffix(name), name))

    with _sentence(address):
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
        if not files:
            raise FileNotFoundError("no file has such a name")
        return files
    files = [described(folder, one, system.info(folder + one)) for one in _expanded(name)]
    if name.endswith(".rec"):
        beside = (name.removesuffix(".rec") + end for end in (".idx", ".identities.txt"))
        files += [described(folder, one, system.info(folder + one)) for one in beside if system.exists(folder + one)]
    return files


def _expanded(name: str) -> list[str]:
    """shard-{000..127}.tar as shells understand it."""
    run = _RUN.search(name)
    if run is None:
        return [name]
    first, last = run.groups()
    numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    return [path for number in numbers for path in _expanded(name[: run.start()] + number + name[run.end() :])]


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
                f"{address} has {progress.bytes >> 20} MB to copy, but {cache} has {free >> 20} MB left; choose another data.cache."
            )
        for file in wanted:
            with _sentence(address):
                _copy(system, file, os.path.join(part, file.name), cache, progress)
        with _sentence(address):
            changed = listing() != files
        if changed:
            raise ValueError(f"{address} has changed while it was copied; start again when it is complete.")
        with _writing(cache):
            shutil.rmtree(folder, ignore_errors=True)  # one from which files were taken
            os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _copy(system: AbstractFileSystem, file: RemoteFile, path: str, cache: str, progress: _Progress) -> None:
    def copy_piece(start: int) -> int:
        end = min(start + _PIECE, file.size)
        data = retried(lambda: _read_piece(system, file, start, end))
        with _writing(cache):
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, memoryview(data)[written:], start + written)
        return len(data)

    with _writing(cache):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(f"{path}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        with ThreadPoolExecutor(_PIECES_AT_ONCE) as pool:
            for size in pool.map(copy_piece, range(0, file.size, _PIECE)):
                progress.add(size)
        with _writing(cache):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    with _writing(cache):
        os.rename(f"{path}.tmp", path)


def _read_piece(system: AbstractFileSystem, file: RemoteFile, start: int, end: int) -> bytes:
    data = system.cat_file(file.path, start=start, end=end)
    if len(data) != end - start:
        raise OSError(f"{file.name} gave {len(data)} bytes where {end - start} were asked for")
    return data


class _Progress:
    """A line in the log every 10 seconds."""

    def __init__(self, address: str, size: int) -> None:
        self.address, self.bytes, self.done, self._said = address, size, 0, time.monotonic()
        log.info("copying %s, %d MB", address, size >> 20)

    def add(self, size: int) -> None:
        self.done += size
        if time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            log.info("copied %d of %d MB of %s", self.done >> 20, self.bytes >> 20, self.address)


def _remove_others(cache: str, address: str, folder: str) -> None:
    for entry in os.listdir(cache):
        path = os.path.join(cache, entry)
        if re.fullmatch(re.escape(cache_name(address)) + r"-[0-9a-f]{12}(\.part)?", entry) and path != folder:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(cache: str) -> Iterator[None]:
    """Holds the lock of the folder itself, which ends with its process and leaves no file."""
    with _writing(cache):
        descriptor = os.open(cache, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _writing(cache):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process that copies into %s", cache)
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
    try:
        yield
    except ValueError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"{address} does not exist or lacks files ({words(error)}).") from error
    except PermissionError as error:
        raise ValueError(f"{address} may not be read ({words(error)}); check the credentials of this machine.") from error
    except Exception as error:
        tries = "" if isinstance(error, _PERMANENT) else f", {TRIES} times"
        raise ValueError(f"{address} cannot be read ({words(error)}{tries}); check the connection.") from error
