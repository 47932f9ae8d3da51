"""The row groups that the footer of a Parquet file lists. Read here because pyarrow ends the process on some damaged footers: its functions
for column chunks throw what Python cannot catch."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from dali_loaders.regular import open_regular

_END = struct.Struct("<I4s")  # length of the footer, and "PAR1"


class DamagedFooterError(ValueError):
    pass


class Chunk(NamedTuple):
    """One column of a row group."""

    values: int
    size: int  # of the decoded pages, in bytes
    nulls: int | None  # None where the file does not say


class Group(NamedTuple):
    rows: int
    chunks: dict[str, Chunk]  # by path of the column, "image.bytes"


def read_groups(path: str) -> list[Group]:
    """DamagedFooterError, which does not name the path, where the footer cannot be read."""
    with open(path, "rb", opener=open_regular) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END.size))
        end = file.read()
        length, magic = _END.unpack(end) if len(end) == _END.size else (0, b"")
        if magic == b"PARE":
            raise DamagedFooterError("encrypted")
        if magic != b"PAR1" or length > size - _END.size:
            raise DamagedFooterError("no footer")
        file.seek(size - _END.size - length)
        data = file.read(length)
    try:
        return [_group(group) for group in _Thrift(data).struct()[4]]
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, struct.error) as error:
        raise DamagedFooterError("damaged footer") from error


def _group(fields: dict[int, Any]) -> Group:
    """Fields by the numbers that parquet.thrift gives them in RowGroup, ColumnChunk, ColumnMetaData and Statistics."""
    chunks = {}
    for column in fields[1]:
        if 8 in column:
            raise DamagedFooterError("encrypted")
        meta = column[3]
        nulls = meta.get(12, {}).get(3)
        chunks[b".".join(meta[3]).decode(errors="replace")] = Chunk(meta[5], meta[6], nulls)
    if len(chunks) != len(fields[1]):
        raise DamagedFooterError("two columns with one name in a row group")
    return Group(fields[3], chunks)


class _Thrift:
    """Thrift's compact protocol: structs as dictionaries by field number, lists as lists, texts as bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._integer()
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)  # the kind of a boolean field is its value
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [self._value(head & 15) for _ in range(count)]
        if kind == 12:
            return self.struct()
        raise KeyError(kind)  # maps, which Parquet does not use, and what is no kind

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise IndexError(count)
        self._at += count
        return self._data[self._at - count : self._at]

    def _unsigned(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise OverflowError

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
