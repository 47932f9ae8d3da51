"""What opening a large set computes, kept as arrays in one file: beside the set, or in the user's cache folder where that is not writable.

The file holds for the very files it was made of (size, time, hash of the head); for others it is made again. It may be deleted any time."""

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

SMALLEST = 16 << 20  # bytes of a set; what a smaller one costs is not worth a file
_MAGIC = b"PSCACHE1"
_PREAMBLE = struct.Struct("<8sQII")  # magic; place, length and CRC of the table, which is JSON
_ALIGNED = 64
_HEAD = 4096  # bytes of a source that are hashed
_CHUNK = 1 << 20

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
        with _alone_on_this_host(path):
            arrays = _load(places, wanted) or _save(places, wanted, sources, build) or _joined(build())
    return arrays


def _places(path: str) -> list[str]:
    """Where the cache of a set may be, best first."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [f"{path}.cache", os.path.join(user, "protoshard", f"{_digest(path)}-{os.path.basename(path)}.cache")]


def _digest(path: str) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]


def _stamp(source: str) -> list[Any]:
    """[name, size, time in ns, CRC of the first bytes]; the same for a copy that keeps the time."""
    name = os.fsencode(os.path.basename(source)).hex()
    try:
        with open(source, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            return [name, status.st_size, status.st_mtime_ns, zlib.crc32(file.read(_HEAD))]
    except FileNotFoundError:
        return [name, 0, 0, 0]
    except OSError as error:
        raise ValueError(f"cannot read {source}: {error.strerror}; check the path and its permissions.") from error


def _settled(stamp: list[Any]) -> bool:
    """Whether a later change of the source would show in its time, which moves in ticks: 4 to 10 ms, or 2 s where it has no fractions."""
    tick = 50_000_000 if stamp[2] % 1_000_000_000 else 2_000_000_000
    return stamp[2] + tick < time.time_ns()


def _joined(pieces: Pieces) -> dict[str, np.ndarray]:
    return {name: np.concatenate(list(parts)) for name, parts in pieces.items()}


def _load(places: list[str], wanted: dict[str, Any]) -> dict[str, np.ndarray] | None:
    for place in places:
        with contextlib.suppress(OSError), open(place, "rb", buffering=0) as file:
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
    for place in places:
        try:
            os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(place) or ".", prefix=f"{os.path.basename(place)}.", suffix=".tmp")
        except OSError:
            continue
        try:
            with open(descriptor, "w+b") as file:
                log.info("looking at all of %s, which is done once", sources[0])
                pieces = build()
                try:
                    table = _write(file, wanted, pieces)
                except OSError as error:
                    log.warning("cannot write %s (%s): the set is read again whenever it is opened", place, error.strerror)
                    return None
                arrays = _mapped(file, table)
                os.fchmod(descriptor, 0o644)
                if [_stamp(source) for source in sources] == wanted["sources"] and all(map(_settled, wanted["sources"])):
                    return _put(temporary, place, wanted) or arrays
                return arrays
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
    return table


@contextlib.contextmanager
def _alone_on_this_host(path: str) -> Iterator[None]:
    """Ranks that open the same set wait for the first one, and then find its cache. Without a place for a lock each builds its own."""
    lock = os.path.join(tempfile.gettempdir(), f"protoshard-{os.getuid()}-{_digest(path)}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
