"""RecordIO files (.rec with .idx), byte for byte as MXNet writes them, in plain Python and numpy.

A record is one or more parts: magic, length with a 3-bit part flag, payload padded to 4 bytes. Image records start with an IRHeader."""

import contextlib
import logging
import mmap
import os
import struct
import warnings
import weakref
from typing import NamedTuple

import numpy as np

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_LENGTH_BITS = 29
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_IR_HEADER = struct.Struct("<IfQQ")
_FIRST_READ = 16 * 1024  # most face crops are smaller, so that one system call reads a record

log = logging.getLogger(__name__)


class IRHeader(NamedTuple):
    """MXNet's image record header: `flag` numbers of label when it is above 0, else `label` is one float."""

    flag: int
    label: "float | np.ndarray"
    id: int
    id2: int


def pack_record(header: IRHeader, payload: bytes) -> bytes:
    """Header and payload in one string of bytes; the flag is set from the label as MXNet does (0 for a number, else its length)."""
    if isinstance(header.label, (int, float, np.number)):
        return _IR_HEADER.pack(0, float(header.label), header.id, header.id2) + payload
    label = np.asarray(header.label, np.float32)
    return _IR_HEADER.pack(label.size, 0.0, header.id, header.id2) + label.tobytes() + payload


def unpack_record(record: bytes) -> tuple[IRHeader, bytes]:
    """The inverse of pack_record."""
    if len(record) < _IR_HEADER.size:
        raise ValueError(f"a record of {len(record)} bytes is too short for an image record header of {_IR_HEADER.size} bytes.")
    flag, label, id_, id2 = _IR_HEADER.unpack_from(record)
    start = _IR_HEADER.size + 4 * flag
    if flag == 0:
        return IRHeader(0, label, id_, id2), record[start:]
    if len(record) < start:
        raise ValueError(f"a record of {len(record)} bytes is too short for the {flag} label numbers that its header announces.")
    return IRHeader(flag, np.frombuffer(record, np.float32, flag, _IR_HEADER.size), id_, id2), record[start:]


def index_path(path: str) -> str:
    """x.rec -> x.idx"""
    return os.path.splitext(path)[0] + ".idx"


class RandomAccessFile:
    """A file read at absolute positions (pread): safe from many threads and after fork; reopens itself after pickling."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise ValueError(f"cannot open {path}: {error.strerror}; check the path and its permissions.") from error
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def map(self) -> mmap.mmap:
        return mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)

    def __reduce__(self) -> tuple:
        return RandomAccessFile, (self.path,)


class RecordWriter:
    """Writes PATH.rec and PATH.idx; both appear under their names only when the `with` block ends without an exception."""

    def __init__(self, path: str) -> None:
        self._paths = (path, index_path(path))
        self._temporary = tuple(f"{p}.{os.getpid()}.tmp" for p in self._paths)
        try:
            self._record = open(self._temporary[0], "wb")  # noqa: SIM115
            self._index = open(self._temporary[1], "w", encoding="ascii")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}; choose a folder that exists and may be written.") from error
        self._offset = 0

    def write(self, key: int, record: bytes) -> None:
        """Appends one record (any bytes below 512 MiB) under `key`."""
        if len(record) >= 1 << _LENGTH_BITS:
            raise ValueError(f"record {key} of {self._paths[0]} has {len(record)} bytes, but RecordIO holds less than 2**29 in one record.")
        encoded = encode_record(record)
        self._record.write(encoded)
        self._index.write(f"{key}\t{self._offset}\n")
        self._offset += len(encoded)

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: object, cause: object, _: object) -> None:
        try:
            for file in (self._record, self._index):
                file.close()  # writes what is buffered, so a full disk may show here
            if kind is None:
                for temporary, path in zip(self._temporary, self._paths, strict=True):
                    os.replace(temporary, path)
        except OSError as error:
            cause = error
        for temporary in self._temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        if isinstance(cause, OSError):
            raise ValueError(f"cannot write {self._paths[0]}: {cause.strerror}; choose a folder with room that may be written.") from cause


def encode_record(record: bytes) -> bytes:
    """One record as it stands in the file. Where the payload holds the magic number at a multiple of 4, that number is left out and the
    record continues in another part, so that a reader can find record starts from anywhere in the file."""
    cuts, at = [], record.find(_MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            cuts.append(at)
        at = record.find(_MAGIC_BYTES, at + 1)
    pieces, start = [], 0
    for cut in cuts:
        pieces.append(struct.pack("<II", MAGIC, (_MIDDLE if start else _FIRST) << _LENGTH_BITS | (cut - start)) + record[start:cut])
        start = cut + 4
    pieces.append(struct.pack("<II", MAGIC, (_LAST if cuts else _WHOLE) << _LENGTH_BITS | (len(record) - start)) + record[start:])
    return b"".join(pieces) + bytes(-len(record) % 4)


class IndexedRecordReader:
    """Reads records of PATH.rec by key. A missing .idx is rebuilt by scanning the file, and written beside it where that is allowed.

    keys, offsets: int64 [n] in the order of the .idx. Thread-safe and picklable. ValueError if .rec and .idx do not belong together."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = RandomAccessFile(path)
        if os.path.exists(index_path(path)):
            self.keys, self.offsets = _read_index(index_path(path))
        else:
            self.keys, self.offsets = _rebuild_index(self._file)
        if self.keys.size == 0:
            raise ValueError(f"{path} holds no records; pack the images again.")
        beyond = np.flatnonzero((self.offsets < 0) | (self.offsets >= self._file.size))
        if beyond.size:
            key = self.keys[beyond[0]]
            raise ValueError(
                f"{index_path(path)} does not match {path}: record {key} lies beyond the end of the file "
                f"({self._file.size} bytes); delete the .idx to have it rebuilt, or copy the .rec again if it is cut off."
            )
        self._order = np.argsort(self.keys, kind="stable")
        self.read_at(int(self.offsets.max()))  # a .rec that is cut off ends inside its last record
        self.scan_headers(self.offsets[:: 1 + len(self) // 100])

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, key: int) -> bytes:
        at = np.searchsorted(self.keys, key, sorter=self._order)
        if at == len(self) or self.keys[self._order[at]] != key:
            raise ValueError(f"{self.path} has no record {key}.")
        return self.read_at(int(self.offsets[self._order[at]]))

    def read_at(self, offset: int) -> bytes:
        """The record that starts at byte `offset` of the file."""
        pieces = []
        while True:
            head = self._file.read(_FIRST_READ, offset)
            if len(head) < 8 or not head.startswith(_MAGIC_BYTES):
                raise ValueError(
                    f"{index_path(self.path)} does not match {self.path}: no record starts at byte {offset}; "
                    "delete the .idx to have it rebuilt, or copy both files again."
                )
            word = int.from_bytes(head[4:8], "little")
            flag, length = word >> _LENGTH_BITS, word & ((1 << _LENGTH_BITS) - 1)
            payload = head[8 : 8 + length]
            if len(payload) < length:
                payload += self._file.read(length - len(payload), offset + 8 + len(payload))
            if len(payload) < length:
                raise _cut_off(self.path, offset)
            pieces.append(payload)
            if flag in (_WHOLE, _LAST):
                return _MAGIC_BYTES.join(pieces)
            offset += 8 + length + (-length % 4)

    def scan_headers(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First label float32 [n] and whether a payload follows the header, bool [n], of the image records at `offsets`.

        They are gathered from the mapped file without a Python loop, about a million records a second once the file is in memory."""
        labels, has_image = np.empty(len(offsets), np.float32), np.empty(len(offsets), bool)
        with warnings.catch_warnings(), self._file.map() as mapped:
            words = np.frombuffer(mapped, np.uint32, self._file.size // 4)
            try:
                for start in range(0, len(offsets), 1 << 20):
                    part = slice(start, start + (1 << 20))
                    self._scan_part(words, offsets[part], labels[part], has_image[part])
            finally:
                del words  # a mapped file cannot be closed while an array looks into it
        return labels, has_image

    def _scan_part(self, words: np.ndarray, offsets: np.ndarray, labels: np.ndarray, has_image: np.ndarray) -> None:
        first = offsets // 4
        at = np.minimum(first[:, None] + np.array([0, 1, 2, 3, 8]), len(words) - 1)
        magic, length_word, flag, label, array_label = words[at].T
        wrong = np.flatnonzero((magic != MAGIC) | (offsets % 4 != 0))
        if wrong.size:
            self.read_at(int(offsets[wrong[0]]))
            raise ValueError(f"{index_path(self.path)} does not match {self.path}: byte {offsets[wrong[0]]} is no multiple of 4.")
        length = length_word & ((1 << _LENGTH_BITS) - 1)
        labels[:] = np.where(flag > 0, array_label, label).astype(np.uint32).view(np.float32)
        has_image[:] = (length_word >> _LENGTH_BITS != _WHOLE) | (length > _IR_HEADER.size + 4 * flag.astype(np.int64))


def _read_index(path: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, encoding="ascii") as file, warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # numpy warns when it meets something that is not a number
            table = np.fromstring(file.read(), np.int64, sep=" ")
        keys, offsets = table.reshape(-1, 2).T
    except (OSError, ValueError, DeprecationWarning) as error:
        raise ValueError(f"{path} is not an index of lines 'key<tab>offset' ({error}); delete it to have it rebuilt.") from error
    return np.ascontiguousarray(keys), np.ascontiguousarray(offsets)


def _rebuild_index(file: RandomAccessFile) -> tuple[np.ndarray, np.ndarray]:
    offsets = _scan(file)
    path = index_path(file.path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="ascii") as out:
            out.writelines(f"{key}\t{offset}\n" for key, offset in enumerate(offsets))
        os.replace(temporary, path)
        log.warning("%s was missing and has been rebuilt from %s (%d records)", path, file.path, len(offsets))
    except OSError as error:
        log.warning("%s is missing and cannot be written (%s); scanned %s instead", path, error.strerror, file.path)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return np.arange(len(offsets), dtype=np.int64), np.array(offsets, np.int64)


def _scan(file: RandomAccessFile) -> list[int]:
    offsets: list[int] = []
    if file.size == 0:
        return offsets
    at, inside = 0, False
    with file.map() as mapped:
        while at < file.size:
            if at + 8 > file.size:
                raise _cut_off(file.path, at)
            magic, word = struct.unpack_from("<II", mapped, at)
            if magic != MAGIC:
                raise ValueError(f"{file.path} is not a RecordIO file: no record starts at byte {at}; pack the images again.")
            flag, length = word >> _LENGTH_BITS, word & ((1 << _LENGTH_BITS) - 1)
            if not inside:
                offsets.append(at)
            inside = flag in (_FIRST, _MIDDLE)
            if at + 8 + length > file.size:
                raise _cut_off(file.path, at)
            at += 8 + length + (-length % 4)
    if inside:
        raise _cut_off(file.path, offsets[-1])
    return offsets


def _cut_off(path: str, offset: int) -> ValueError:
    return ValueError(f"{path} is cut off inside the record at byte {offset}; copy it again from its source.")
