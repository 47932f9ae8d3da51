"""RecordIO files (.rec with .idx), byte for byte as MXNet writes them, in plain Python and numpy.

A record is one or more parts: magic, length with a 3-bit part flag, payload padded to 4 bytes. Image records start with an IRHeader."""

import contextlib
import os
import struct
import weakref
from typing import NamedTuple

import numpy as np

from dali_loaders import renamed
from dali_loaders.account import ChangedError, ReadError
from dali_loaders.regular import open_regular

MAGIC = 0xCED7230A
LENGTH_BITS = 29
WHOLE, FIRST, MIDDLE, LAST = range(4)  # flags of parts
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_IR_HEADER = struct.Struct("<IfQQ")
_FIRST_READ = 16 * 1024  # most face crops are smaller, so that one system call reads a record

renamed.names(__name__, {"IndexedRecordReader": "dali_loaders.recordio.index"})


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
    """The inverse of pack_record. ReadError for what is no image record."""
    if len(record) < _IR_HEADER.size:
        raise ReadError(f"a record of {len(record)} bytes is too short for an image record header of {_IR_HEADER.size} bytes")
    flag, label, id_, id2 = _IR_HEADER.unpack_from(record)
    start = _IR_HEADER.size + 4 * flag
    if flag == 0:
        return IRHeader(0, label, id_, id2), record[start:]
    if len(record) < start:
        raise ReadError(f"a record of {len(record)} bytes is too short for the {flag} label numbers that its header announces")
    return IRHeader(flag, np.frombuffer(record, np.float32, flag, _IR_HEADER.size), id_, id2), record[start:]


def index_path(path: str) -> str:
    """x.rec -> x.idx"""
    return os.path.splitext(path)[0] + ".idx"


class RandomAccessFile:
    """A file read at absolute positions (pread): safe from many threads and after fork; reopens itself after pickling.

    size: bytes when it was first opened. ValueError if it cannot be opened, ReadError if it cannot be read."""

    def __init__(self, path: str, seen: tuple[int, int] | None = None) -> None:
        self.path = path
        try:
            self._descriptor = open_regular(path)
        except OSError as error:
            raise ValueError(f"cannot open {path}: {error.strerror}; check the path and its permissions.") from error
        weakref.finalize(self, os.close, self._descriptor)
        self._seen = seen or self._state()
        self.size = self._seen[0]
        if self.has_changed():
            raise self.change()

    def read(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise ReadError.of(error) from error

    def read_into(self, buffer: np.ndarray, offset: int) -> int:
        """Fills `buffer`, uint8, as far as the file goes; the number of bytes."""
        try:
            return os.preadv(self._descriptor, [buffer.data], offset)
        except OSError as error:
            raise ReadError.of(error) from error

    def has_changed(self) -> bool:
        """Whether size or time of the file are no longer those of its first opening. (A file that is replaced stays open as it was.)"""
        return self._state() != self._seen

    def change(self, what: str = "") -> ChangedError:
        """The error to raise for bytes that contradict what was there when the file was opened."""
        return ChangedError(
            f"{self.path} changed since this run opened it{what and f' ({what})'}: images and labels may no longer belong together; "
            "leave sets alone while they are read, and start again."
        )

    def fault(self, reason: str) -> ValueError:
        """The error to raise for bytes that are not what they should be: ReadError, or ChangedError where that is the cause."""
        return self.change(reason) if self.has_changed() else ReadError(reason)

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def __reduce__(self) -> tuple:
        return RandomAccessFile, (self.path, self._seen)


def read_record(file: RandomAccessFile, offset: int) -> tuple[bytes, int]:
    """The record that starts at byte `offset`, and where it ends. ReadError (or ChangedError) if there is none."""
    pieces: list[bytes] = []
    while True:
        head = file.read(_FIRST_READ, offset)
        if len(head) < 8:
            raise file.fault(f"cut off at byte {offset}")
        if not head.startswith(_MAGIC_BYTES):
            raise file.fault(f"no record starts at byte {offset}")
        word = int.from_bytes(head[4:8], "little")
        flag, length = word >> LENGTH_BITS, word & ((1 << LENGTH_BITS) - 1)
        if flag not in ((MIDDLE, LAST) if pieces else (WHOLE, FIRST)):
            raise file.fault(f"the parts of the record at byte {offset} are out of order")
        payload = head[8 : 8 + length]
        if len(payload) < length:
            payload += file.read(length - len(payload), offset + 8 + len(payload))
        if len(payload) < length:
            raise file.fault(f"cut off inside the record at byte {offset}")
        pieces.append(payload)
        offset += 8 + length + (-length % 4)
        if flag in (WHOLE, LAST):
            return _MAGIC_BYTES.join(pieces), offset


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
        if len(record) >= 1 << LENGTH_BITS:
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
        pieces.append(struct.pack("<II", MAGIC, (MIDDLE if start else FIRST) << LENGTH_BITS | (cut - start)) + record[start:cut])
        start = cut + 4
    pieces.append(struct.pack("<II", MAGIC, (LAST if cuts else WHOLE) << LENGTH_BITS | (len(record) - start)) + record[start:])
    return b"".join(pieces) + bytes(-len(record) % 4)
