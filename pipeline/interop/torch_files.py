"""What a torch.save file would cost whoever loads it. torch.load(weights_only=True) runs none of its code, but takes any size that the file
claims, and ends the process where keys are nested too deep; so its pickles are looked through before."""

from __future__ import annotations

import os
import pickletools
import zipfile
from typing import IO, Any, BinaryIO

from pipeline.plain_pickle import Refused

DEPTH = 1_000  # of values in each other; Python itself nests calls no deeper
WEIGHT = 100_000_000  # values, each counted as often as it is met on a walk through all
FREE = 1 << 20  # bytes that a file may seem to have beyond twice its own
LEGACY_PICKLES = 5  # of torch before 1.6, in front of the numbers
ZIP = b"PK\x03\x04"
MUTATING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")
SIZED = ("__builtin__ bytearray", "builtins bytearray")  # makes any size out of a number


def check(file: BinaryIO) -> None:
    """Raises Refused with a reason, or whatever a damaged file makes readers raise. The file is at its beginning afterwards."""
    if file.read(len(ZIP)) == ZIP:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            claimed, size = sum(entry.file_size for entry in entries), os.fstat(file.fileno()).st_size
            if claimed > 2 * size + FREE:
                raise Refused(f"it claims to hold {claimed:,} bytes in {size:,}")
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    with archive.open(entry) as part:
                        _look_through(part)
    else:
        file.seek(0)
        for _ in range(LEGACY_PICKLES):
            _look_through(file)
    file.seek(0)


def _look_through(file: IO[bytes]) -> None:
    """Follows a pickle with two numbers for each value: how deep it is, and how many values a walk through it meets."""
    stack: list[tuple[int, int]] = []
    marks: list[int] = []
    memo: dict[int, tuple[int, int]] = {}
    strings: list[str] = []  # the last two, for STACK_GLOBAL
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        asked = argument if name in ("GLOBAL", "INST") else " ".join(strings) if name == "STACK_GLOBAL" else None
        if asked in SIZED:
            raise Refused("it makes arrays of any size")
        if "UNICODE" in name:
            strings = [*strings, str(argument)][-2:]
        if name == "MARK":
            marks.append(len(stack))
            continue
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]  # a list as it is now; nobody walks one
            continue
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
            continue
        before = opcode.stack_before
        start = marks.pop() - before.index(pickletools.markobject) if pickletools.markobject in before else len(stack) - len(before)
        taken = stack[start:]
        del stack[start:]
        if name in MUTATING:
            (depth, weight), *taken = taken
        else:
            depth, weight = 0, 0
        depth, weight = max([depth, *(1 + part[0] for part in taken)]), weight + 1 + sum(part[1] for part in taken)
        if depth > DEPTH or weight > WEIGHT:
            raise Refused("it nests values too deep" if depth > DEPTH else "it repeats values too often")
        stack += [(depth, weight)] * len(opcode.stack_after)
