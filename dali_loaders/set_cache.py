"""What opening a large set computes, kept as arrays in one file: beside the set, or in the user's cache folder where that is not writable.

The file holds for the very files it was made of (size, times, hash of the head), else it is made again. It may be deleted any time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from dali_loaders.regular import open_regular
from dali_loaders.waiting import waiting

SMALLEST = 16 << 20  # bytes of a set; what a smaller one costs is not worth a file
_MAGIC = b"PSCACHE1"
_PREAMBLE = struct.Struct("<8sQII")  # magic; place, length and CRC of the table, which is JSON
_ALIGNED = 64
_HEAD = 4096  # bytes of a source that are hashed
_CHUNK = 1 << 20
_TICK, _COARSE_TICK = 50_000_000, 2_000_000_000  # ns; times of files move in steps of 4 to 10 ms, or up to 2 s where they have no fractions

log = logging.getLogger(__name__)

Pieces = Mapping[str, Iterable[np.ndarray]]


def cached(path: str, sources: Sequence[str], kind: str, build: Callable[[], Pieces]) -> dict[str, np.ndarray]:
    """The arrays, by name, that `build` makes for the set `path`; from its cache where that holds. Ranks of a host share their memory.

    sources: the files that the arrays are made of; one that is missing counts as such. kind: what the arrays are, with a version.
    build: gives each array, one-dimensional, in pieces of one dtype, so that a large one need never be whole in memory. It reads the
    sources when it is called (again, should the cache turn out not to be writable), and one rank of a host calls it at a time."""
    wanted = {"kind": kind, "sources": [_stamp(source) for source in sources]}
    if sum(stamp[1] for stamp in wanted["sources"]) < SMALLEST:
        return _joined(build())
    places = _places(path)
    arrays = _load(places, wanted)
    if arrays is None:
        with alone_on_this_host(path):
            arrays = _load(places, wanted) or _save(places, wanted, sources, build) or _joined(build())
    return arrays


def _places(path: str) -> list[str]:
    """Where the cache of a set may be, best first."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    places = [f"{path}.cache", os.path.join(user, "protoshard", f"{_digest(path)}-{os.path.basename(path)}.cache")]
    return places if os.path.isabs(user) else places[:1]  # a user without a home has "~"


def _digest(path: str) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]


def _stamp(source: str) -> list[Any]:
    """[name, size, times of the last change of its bytes and of anything, in ns, CRC of the first bytes]. The second time cannot be set
    back: a file that replaces another one by `mv` or `cp -p` is told from it even where size, first time and first bytes are the same."""
    name = os.fsencode(os.path.basename(source)).hex()
    if not os.path.exists(source):
        return [name, 0, 0, 0, 0]
    try:
        with open(source, "rb", buffering=0, opener=open_regular) as file:
            status = os.fstat(file.fileno())
            head = file.read(_HEAD)
    except OSError as error:
        raise ValueError(
            f"cannot read {source}: {error.strerror}; check its permissions, or copy it to a disk that can be read."
        ) from error
    return [name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, zlib.crc32(head)]


def _settled(stamps: list[list[Any]]) -> bool:
    """Waits until a later change of the sources would show in their times; False if that would take long, since they are in the future."""
    newest = max(max(stamp[2:4]) for stamp in stamps)
    left = newest + (_TICK if newest % 1_000_000_000 else _COARSE_TICK) - time.time_ns()
    if 0 < left <= _COARSE_TICK:
        time.sleep(left / 1e9)
    return left <= _COARSE_TICK


def _joined(pieces: Pieces) -> dict[str, np.ndarray]:
    return {name: np.concatenate(list(parts)) for name, parts in pieces.items()}


def _load(places: list[str], wanted: dict[str, Any]) -> dict[str, np.ndarray] | None:
    for place in places:
        with contextlib.suppress(OSError), open(place, "rb", buffering=0, opener=open_regular) as file:
            table = _table(file, wanted)
            if table is not None and all(_is_whole(file, *entry) for entry in table.values()):
                return _mapped(file, table)
    return None


def _table(file: BinaryIO, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """{name: [dtype, count, place, CRC]}; None if the file is damaged or was made of other sources."""
    try:
        magic, place, length, crc = _PREAMBLE.unpack(os.pread(file.fileno(), _PREAMBLE.size, 0))
        text = os.pread(file.fileno(), length, place)
        if magic != _MAGIC or len(text) != length or zlib.crc32(text) != crc:
            return None
        table = json.loads(text)
        return table["arrays"] if {"kind": table["kind"], "sources": table["sources"]} == wanted else None
    except (struct.error, ValueError, KeyError, TypeError, OverflowError):
        return None


def _is_whole(file: BinaryIO, dtype: str, count: int, place: int, crc: int) -> bool:
    """Reads rather than maps the array: pages that are only looked at once would count as this process's memory."""
    left, found = count * np.dtype(dtype).itemsize, 0
    while left:
        chunk = os.pread(file.fileno(), min(left, _CHUNK), place)
        if not chunk:
            return False
        found, place, left = zlib.crc32(chunk, found), place + len(chunk), left - len(chunk)
    return found == crc


def _mapped(file: BinaryIO, table: dict[str, Any]) -> dict[str, np.ndarray]:
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writable, for torch's sake; shared until somebody does
    return {name: np.frombuffer(memory, dtype, count, place) for name, (dtype, count, place, _) in table.items()}


def _save(places: list[str], wanted: dict[str, Any], sources: Sequence[str], build: Callable[[], Pieces]) -> dict[str, np.ndarray] | None:
    """Builds the arrays into the first place that can be written, and maps them from there; None if there is none."""
    settled = _settled(wanted["sources"])
    for place in places:
        try:
            os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(place) or ".", prefix=f"{os.path.basename(place)}.", suffix=".tmp")
        except OSError:
            continue
        log.info("looking at all of %s, which is done once", sources[0])
        try:
            with open(descriptor, "w+b") as file:
                arrays = _mapped(file, _write(file, wanted, build()))
                os.fchmod(descriptor, os.stat(sources[0]).st_mode & 0o644)  # it holds names of the set
            if settled and [_stamp(source) for source in sources] == wanted["sources"]:
                return _put(temporary, place, wanted) or arrays
            return arrays
        except OSError as error:
            log.warning("cannot write %s (%s), so the set is looked at once more", place, error.strerror)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    return None


def _put(temporary: str, place: str, wanted: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Moves the file to its place; or gives the arrays of another host that was faster, whose mapped file must not be replaced: on a
    network file system that would take the pages from under it."""
    arrays = _load([place], wanted)
    if arrays is None:
        with contextlib.suppress(OSError):
            os.replace(temporary, place)
            log.info("kept in %s, which makes the next opening faster and may be deleted", place)
    return arrays


def _write(file: BinaryIO, wanted: dict[str, Any], pieces: Pieces) -> dict[str, Any]:
    table: dict[str, Any] = {}
    file.write(bytes(_ALIGNED))
    for name, parts in pieces.items():
        file.write(bytes(-file.tell() % _ALIGNED))
        place, count, crc, dtype = file.tell(), 0, 0, "<i8"
        for part in parts:
            data = np.ascontiguousarray(part)
            file.write(data.data)
            count, crc, dtype = count + len(data), zlib.crc32(data.data, crc), data.dtype.str
        table[name] = [dtype, count, place, crc]
    text, place = json.dumps({**wanted, "arrays": table}).encode(), file.tell()
    file.write(text)
    file.seek(0)
    file.write(_PREAMBLE.pack(_MAGIC, place, len(text), zlib.crc32(text)))
    file.flush()
    os.fsync(file.fileno())  # where a network file system says that there is no room
    return table


@contextlib.contextmanager
def alone_on_this_host(path: str) -> Iterator[None]:
    """Ranks that open the same set wait for the first one, and then find its cache. Without a place for a lock each builds its own."""
    try:
        lock = os.path.join(tempfile.gettempdir(), f"protoshard-{os.getuid()}-{_digest(path)}.lock")
        descriptor = _locked(lock)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock)
        os.close(descriptor)


def _locked(lock: str) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with waiting(f"another process that looks at the same set and holds {lock}"):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(lock), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its file was removed by the one that had it before
