"""The manifest of a checkpoint: what the saver says about it, every tensor and every file with its checksums. JSON, with a checksum of its
own in the first line; nothing in it is believed before it was checked."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint import checksum
from pipeline.checkpoint.data_file import BLOCK, DTYPES, Entry, Written, covers

FORMAT = 2
FIRST_LINE = re.compile(rb'\{"checksum": "([0-9a-f]{16})",\n')
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # never a path
MOST_BYTES = 1 << 62


class DamagedError(ValueError):
    """A checkpoint, or a file of it, is not what was written."""


@dataclass(frozen=True)
class File:
    bytes: int
    checksums: list[str]  # of each block of BLOCK bytes


@dataclass(frozen=True)
class Manifest:
    info: dict[str, Any]  # what the saver said: step, consumed, config, ...
    files: dict[str, File]
    tensors: dict[str, list[Entry]]  # the parts of each, in order

    @property
    def step(self) -> int:
        return self.info["step"]


def encode(info: dict[str, Any], written: list[Written]) -> bytes:
    """The manifest's bytes. The parts of every tensor must be all of it."""
    tensors: dict[str, list[Entry]] = {}
    for file in written:
        for entry in file.entries:
            tensors.setdefault(entry.name, []).append(entry)
    for name, parts in tensors.items():
        parts.sort(key=lambda entry: entry.start)
        assert covers(parts), f"the parts of {name} are not all of it: {parts}"
    content = {
        "format": FORMAT,
        **info,
        "files": {file.name: {"bytes": file.bytes, "checksums": "".join(file.checksums)} for file in written},
        "tensors": {
            name: {
                "dtype": parts[0].dtype,
                "shape": list(parts[0].shape),
                "parts": [[entry.file, entry.offset, entry.start, entry.count] for entry in parts],
            }
            for name, parts in sorted(tensors.items())
        },
    }
    text = json.dumps(content, indent=1)
    rest = text.removeprefix("{\n").encode()
    return b'{"checksum": "' + checksum.of(rest).encode() + b'",\n' + rest


def decode(content: bytes) -> Manifest:
    """DamagedError, with a reason in a few words, where it is not what `encode` gave; ValueError for another version's."""
    line = FIRST_LINE.match(content)
    if line is None or checksum.of(memoryview(content)[line.end() :]).encode() != line[1]:
        raise DamagedError("it has changed since it was written")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise DamagedError("it is no JSON") from None
    if values.get("format") != FORMAT:
        raise ValueError(f"it is of format {values.get('format')!r}, and this version reads formats 1 and {FORMAT}: use a newer version")
    try:
        return _checked(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"it is not a manifest ({error})") from None


def _checked(values: dict[str, Any]) -> Manifest:
    """A file may come from anyone: every number is held against what it is about to be used for."""
    files, tensors = {}, {}
    for name, file in values.pop("files").items():
        size, sums = _number(file["bytes"]), file["checksums"]
        if not FILE_NAME.fullmatch(name) or len(sums) != 16 * -(-size // BLOCK) or not re.fullmatch(r"[0-9a-f]*", sums):
            raise ValueError(f"file {name!r}")
        files[name] = File(size, [sums[at : at + 16] for at in range(0, len(sums), 16)])
    for name, tensor in values.pop("tensors").items():
        shape, dtype = tuple(map(_number, tensor["shape"])), tensor["dtype"]
        parts = []
        for file, *numbers in tensor["parts"]:
            offset, start, count = map(_number, numbers)
            parts.append(Entry(name, dtype, shape, start, count, file, offset))
        width = DTYPES[dtype].itemsize
        if math.prod(shape) > MOST_BYTES or not parts or not covers(parts):
            raise ValueError(f"tensor {name!r}")
        if any(part.offset + part.count * width > files[part.file].bytes for part in parts):
            raise ValueError(f"tensor {name!r} lies outside its file")
        tensors[name] = parts
    values.pop("checksum")
    _number(values["step"])
    return Manifest(values, files, tensors)


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_BYTES:
        raise ValueError(f"number {value!r:.40}")
    return value
