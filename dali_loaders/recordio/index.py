"""The .idx of a .rec: read, rebuilt where it is missing, and held against the file, whose records must follow each other from its first
byte to its last. So whatever is lost, doubled or added in one of the two is noticed when they are opened."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import struct
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dali_loaders.account import ReadError
from dali_loaders.recordio.headers import SHORT, Headers, read_headers
from dali_loaders.recordio.records import FIRST, LAST, LENGTH_BITS, MAGIC, MIDDLE, WHOLE, RandomAccessFile, index_path, read_record
from dali_loaders.regular import open_regular
from dali_loaders.set_cache import alone_on_this_host

_TEXT = 1 << 20  # bytes of an .idx that are parsed at a time: about 60,000 lines
_PIECE = 1 << 16  # records
_BLOCK, _NEAR = 4 << 20, 16 * 1024

log = logging.getLogger(__name__)


class Records(NamedTuple):
    """A run of records in the order of the file: columns [n]."""

    keys: np.ndarray  # int64
    offsets: np.ndarray  # int64
    headers: Headers


class Runs:
    """Many keys, mostly rising by one, in little memory: as runs of consecutive ones."""

    def __init__(self) -> None:
        self.firsts: list[np.ndarray] = []  # int64: the first key of each run
        self.counts: list[np.ndarray] = []  # int64

    def add(self, keys: np.ndarray) -> None:
        starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 2) != 1)
        self.firsts.append(keys[starts])
        self.counts.append(np.diff(starts, append=len(keys)))

    def repeated(self) -> int | None:
        """A key that is there twice."""
        firsts = np.concatenate(self.firsts)
        order = np.argsort(firsts, kind="stable")
        firsts, counts = firsts[order], np.concatenate(self.counts)[order]
        again = np.flatnonzero(firsts[1:] < firsts[:-1] + counts[:-1])
        return int(firsts[again[0] + 1]) if again.size else None

    def first_within(self, start: int, stop: int) -> int | None:
        """One of the keys from `start` to `stop` - 1."""
        for firsts, counts in zip(self.firsts, self.counts, strict=True):
            among = np.flatnonzero((firsts < stop) & (firsts + counts > start))
            if among.size and start < stop:
                return max(start, int(firsts[among[0]]))
        return None


def scan(file: RandomAccessFile) -> Iterator[Records]:
    """All records of a .rec, in the order of the file, with their headers. A missing .idx is rebuilt, and written where that is allowed.

    ValueError, at the latest after the last piece, unless .rec and .idx belong together: so use nothing before."""
    index = index_path(file.path)
    mend = "delete the .idx (it is rebuilt), or copy both files again"
    pieces = _in_file_order(index) if os.path.exists(index) else _rebuild(file)
    runs, numbers = Runs(), _Numbers()
    position = covered = 0  # the end of the record before; bytes of all records
    fault = None
    for keys, offsets in pieces:
        beyond = np.flatnonzero((offsets < 0) | (offsets >= file.size))
        if beyond.size:
            raise ValueError(
                f"{index} does not match {file.path}: record {keys[beyond[0]]} lies beyond the end of the file ({file.size} bytes); "
                "delete the .idx (it is rebuilt), or copy the .rec again if it is cut off."
            )
        try:
            headers = read_headers(file, offsets)
        except ReadError as error:
            raise _unreadable(file.path, error, f"{index} does not match {file.path}: {error}; {mend}.") from error
        ends = offsets + headers.extents
        starts = np.concatenate([[position], ends[:-1]])
        wrong = np.flatnonzero(starts != offsets)
        if wrong.size and fault is None:
            end, start = int(starts[wrong[0]]), int(offsets[wrong[0]])
            fault = f"no record is listed at byte {end}" if end < start else f"records overlap at byte {start}"
        position, covered = int(ends[-1]), covered + int(headers.extents.sum())
        runs.add(keys)
        numbers.add(keys, headers)
        yield Records(keys, offsets, headers)
    if position > file.size and fault is None:
        raise ValueError(f"{file.path} is cut off inside its last record, number {keys[-1]}; copy it again from its source.")
    if file.size == 0:
        raise ValueError(f"{file.path} holds no records; pack the images again.")
    if covered < file.size:
        raise ValueError(f"{index} does not match {file.path}: it covers {covered} of {file.size} bytes; {mend}.")
    if fault is not None:
        raise ValueError(f"{index} does not match {file.path}: {fault}; {mend}.")
    twice = runs.repeated()
    if twice is not None:
        raise ValueError(f"{index} has two records {twice}; {mend}.")
    if numbers.contradict():
        raise ValueError(f"{index} does not match {file.path}: what it calls record {numbers.key} calls itself {numbers.id}; {mend}.")


class _Numbers:
    """Whether the records' own numbers contradict the keys. They do where they are a numbering (rising, but for one 0, which may
    stand anywhere), the keys are another one, and do not simply count the records."""

    def __init__(self) -> None:
        self.key = self.id = -1  # of the first record where they differ
        self.rising, self._zeros, self._last = True, 0, -1
        self._counts, self._next = True, -1

    def add(self, keys: np.ndarray, headers: Headers) -> None:
        ids = np.where(headers.states == SHORT, 0, headers.ids).astype(np.int64)
        differ = np.flatnonzero(ids != keys)
        if differ.size and self.key < 0:
            self.key, self.id = int(keys[differ[0]]), int(headers.ids[differ[0]])
        numbered = ids[ids != 0]
        self._zeros += len(ids) - len(numbered)
        self.rising &= bool(np.all(np.diff(numbered, prepend=self._last) > 0)) and self._zeros <= 1
        self._last = int(numbered[-1]) if len(numbered) else self._last
        first = self._next if self._next >= 0 else keys[0]
        self._counts &= bool(np.all(keys == np.arange(first, first + len(keys))))
        self._next = int(keys[-1]) + 1

    def contradict(self) -> bool:
        return self.rising and self.key >= 0 and not self._counts


def _unreadable(path: str, error: ReadError, otherwise: str) -> ValueError:
    from_system = isinstance(error.__cause__, OSError)
    return ValueError(f"cannot read {path}: {error}; copy it to a disk that can be read." if from_system else otherwise)


def _in_file_order(index: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys and offsets, int64 [n] each, in pieces. Nearly always the .idx has that order, and is not held in memory."""
    last, rising = -1, True
    for _, offsets in _parse(index):
        rising &= bool(np.all(np.diff(offsets, prepend=last) > 0))
        last = int(offsets[-1])
    if rising:
        yield from _parse(index)
        return
    keys, offsets = (np.concatenate(column) for column in zip(*_parse(index), strict=True))
    order = np.argsort(offsets, kind="stable")
    yield from _cut(keys[order], offsets[order])


def _cut(keys: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(keys), _PIECE):
        yield keys[start : start + _PIECE], offsets[start : start + _PIECE]


def _parse(index: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    try:
        with open(index, "rb", opener=open_regular) as file:
            rest = b""
            while text := file.read(_TEXT):
                lines, _, rest = (rest + text).rpartition(b"\n")
                if len(rest) > _TEXT:
                    raise ValueError("no lines")
                if lines.strip():
                    yield _pairs(lines)
            if rest.strip():
                yield _pairs(rest)
    except (OSError, ValueError) as error:
        raise ValueError(f"{index} is not an index of lines 'key<tab>offset' ({error}); delete it to have it rebuilt.") from error


def _pairs(lines: bytes) -> tuple[np.ndarray, np.ndarray]:
    strange = lines.translate(None, b"0123456789 \t\r\n")
    if strange:
        raise ValueError(f"{strange[:1]!r} among the numbers")
    values = np.fromstring(lines, np.int64, sep=" ")  # the one parser of numpy that takes 0.2 s for 10 million
    if len(values) % 2:
        raise ValueError("a line that is not whole")
    return values[::2], values[1::2]


def write_missing_index(file: RandomAccessFile) -> None:
    """Rebuilds an .idx that is not there, where it may be written. (Where it may not, `scan` does without, and a cache spares that too.)"""
    index = index_path(file.path)
    if os.path.exists(index) or not os.access(os.path.dirname(index) or ".", os.W_OK):
        return
    with alone_on_this_host(file.path):
        if not os.path.exists(index):
            _rebuild(file)


def _rebuild(file: RandomAccessFile) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys and offsets, in pieces, also written to the .idx. Keys are the records' own numbers where those are a numbering, as in
    InsightFace's sets, whose record 0 may stand anywhere; else their places."""
    log.warning("%s is missing: reading all of %s", index_path(file.path), file.path)
    offsets, numbers = _walk(file), _Numbers()
    keys = np.arange(len(offsets))
    ids = np.zeros_like(keys)
    for places, starts in _cut(keys, offsets):
        headers = read_headers(file, starts)
        numbers.add(places, headers)
        ids[places] = np.where(headers.states == SHORT, 0, headers.ids).astype(np.int64)
    if numbers.rising:
        keys = ids
    if len(keys):
        _write(index_path(file.path), file.path, keys, offsets)
    return _cut(keys, offsets)


def _write(index: str, path: str, keys: np.ndarray, offsets: np.ndarray) -> None:
    temporary = f"{index}.{secrets.token_hex(4)}.tmp"  # the same process number may be in use on another host
    try:
        with open(temporary, "w", encoding="ascii") as out:
            for piece in _cut(keys, offsets):
                out.writelines(f"{key}\t{offset}\n" for key, offset in zip(*(column.tolist() for column in piece), strict=True))
        os.replace(temporary, index)
        log.warning("%s was missing and has been rebuilt from %s (%d records)", index, path, len(keys))
    except OSError as error:
        log.warning("%s is missing and cannot be written (%s); scanned %s instead", index, error.strerror, path)
    finally:  # an interruption too leaves nothing
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _walk(file: RandomAccessFile) -> np.ndarray:
    """Where records start, int64 [n], by going from each to the next."""
    offsets, inside = array("q"), False
    block, base, at, length = b"", 0, 0, 0
    while at < file.size:
        if at + 8 > base + len(block):
            try:
                base, block = at, file.read(_BLOCK if length < _NEAR else 8, at)
            except ReadError as error:
                raise _unreadable(file.path, error, str(error)) from error
            if len(block) < 8:
                raise _cut_off(file.path, at)
        magic, word = struct.unpack_from("<II", block, at - base)
        flag, length = word >> LENGTH_BITS, word & ((1 << LENGTH_BITS) - 1)
        if magic != MAGIC or flag not in ((MIDDLE, LAST) if inside else (WHOLE, FIRST)):
            what = "is not a RecordIO file" if at == 0 else "is damaged"
            raise ValueError(f"{file.path} {what}: no record starts at byte {at}; copy it again, or pack the images again.")
        if not inside:
            offsets.append(at)
        inside = flag in (FIRST, MIDDLE)
        if at + 8 + length > file.size:
            raise _cut_off(file.path, at)
        at += 8 + length + (-length % 4)
    if inside:
        raise _cut_off(file.path, offsets[-1])
    return np.frombuffer(offsets, np.int64) if offsets else np.zeros(0, np.int64)


def _cut_off(path: str, offset: int) -> ValueError:
    return ValueError(f"{path} is cut off inside the record at byte {offset}; copy it again from its source.")


class IndexedRecordReader:
    """Reads records of any kind from PATH.rec by key.

    keys, offsets: int64 [n] in the order of the file. Thread-safe and picklable. ValueError if .rec and .idx do not belong together."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = RandomAccessFile(path)
        pieces = list(scan(self._file))
        self.keys = np.concatenate([piece.keys for piece in pieces])
        self.offsets = np.concatenate([piece.offsets for piece in pieces])
        self._order = np.argsort(self.keys, kind="stable")

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, key: int) -> bytes:
        at = np.searchsorted(self.keys, key, sorter=self._order)
        if at == len(self) or self.keys[self._order[at]] != key:
            raise ValueError(f"{self.path} has no record {key}.")
        return read_record(self._file, int(self.offsets[self._order[at]]))[0]
