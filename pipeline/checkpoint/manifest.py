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
from pipeline.checkpoint.stores import MANIFEST

FORMAT = 2
FIRST_LINE = re.compile(rb'\{"checksum": "([0-9a-f]{16})",\n')
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # never a path
MOST_BYTES = 1 << 62
MOST_AXES = 64  # of a tensor; torch goes no further
DEEPEST = 16  # of what a saver says: a configuration has 4

# What is used of a saver's words, by whoever finds it in a manifest.
_NUMBERS = ("step", "consumed", "skipped_steps", "num_classes", "width", "world_size", "image_size", "batch", "images_per_identity")
_KINDS: dict[str, type] = {
    **dict.fromkeys(("config", "figures", "code", "started_from", "course"), dict),
    **{"backbone": str, "optimizer": str, "frozen": list, "branch": str},
}
_STARTED_FROM = {"given", "path", "classifier", "ema"}


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
        values = json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise DamagedError("it is no JSON") from None
    version = values.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(f"it is of format {min(version, 10**9)}, and this version reads formats 1 and {FORMAT}: use a newer version")
    try:
        if version != FORMAT:
            raise ValueError("of another format")
        return _checked(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"it is not a manifest ({error!s:.200})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A key that comes twice would be read differently by another program."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key comes twice")
    return values


def _checked(values: dict[str, Any]) -> Manifest:
    """A file may come from anyone: every number is held against what it is about to be used for."""
    files, tensors = {}, {}
    used: dict[str, list[tuple[int, int]]] = {}  # bytes of each file, from and to
    for name, file in values.pop("files").items():
        size, sums = _number(file["bytes"]), file["checksums"]
        if not FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"file {name!r:.60}")
        if len(sums) != 16 * -(-size // BLOCK) or not re.fullmatch(r"[0-9a-f]*", sums):
            raise ValueError(f"checksums of {name}")
        files[name], used[name] = File(size, [sums[at : at + 16] for at in range(0, len(sums), 16)]), []
    for name, tensor in values.pop("tensors").items():
        shape, dtype = tuple(map(_number, tensor["shape"])), tensor["dtype"]
        width = DTYPES[dtype].itemsize
        parts = []
        for file, *numbers in tensor["parts"]:
            offset, start, count = map(_number, numbers)
            parts.append(Entry(name, dtype, shape, start, count, file, offset))
            used[file].append((offset, offset + count * width))
        if len(shape) > MOST_AXES or math.prod(filter(None, shape)) > MOST_BYTES or not parts or not covers(parts):
            raise ValueError(f"tensor {name!r:.60}")
        tensors[name] = parts
    for name, ranges in used.items():
        ends = [0, *(end for _, end in sorted(ranges))]
        # Bytes that several tensors share would be more in memory than on the disk.
        if ends[-1] > files[name].bytes or any(begin < end for (begin, _), end in zip(sorted(ranges), ends, strict=False)):
            raise ValueError(f"tensors that lie in each other in {name}, or outside it")
    values.pop("checksum")
    check_info(values)
    return Manifest(values, files, tensors)


def check_info(info: dict[str, Any]) -> None:
    """ValueError where what a saver said is of another kind than what a run says."""
    _number(info["step"])
    for name in _NUMBERS:
        if info.get(name) is not None:
            _number(info[name])
    for name, kind in _KINDS.items():
        if info.get(name) is not None and not isinstance(info[name], kind):
            raise ValueError(name)
    if not all(isinstance(section, dict) for section in (info.get("config") or {}).values()):
        raise ValueError("config")
    if info.get("started_from") is not None and not info["started_from"].keys() >= _STARTED_FROM:
        raise ValueError("started_from")
    course = info.get("course") or {}
    for name in ("skipped_in_a_row", "rollbacks"):
        _number(course.get(name, 0))
    if not all(isinstance(number, int | float) for number in (*course.get("losses", ()), *(course.get("scaler") or {}).values())):
        raise ValueError("course")
    if not _is_shallow(info, DEEPEST):
        raise ValueError("tables in tables in tables")


def _is_shallow(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    return depth > 0 and all(_is_shallow(part, depth - 1) for part in (value.values() if isinstance(value, dict) else value))


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_BYTES:
        raise ValueError(f"number {value!r:.40}")
    return value


def names_in(content: bytes, path: str, count: int | None) -> list[str]:
    """Names of `count` classes from a list in JSON, which may come from anyone."""
    try:
        names = json.loads(content)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or count not in (None, len(names)):
        raise DamagedError(f"{path} is no list of {'the' if count is None else count} names of identities")
    return names
