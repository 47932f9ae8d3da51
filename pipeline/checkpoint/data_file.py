"""The file of one rank: a safetensors file (a JSON header, then the tensors' bytes) of its parts, with a checksum per block, computed while
it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.checkpoint import checksum
from pipeline.checkpoint.parts import Part
from pipeline.checkpoint.stores import Sink

BLOCK = 1 << 20  # bytes for which there is one checksum: what must be read to check a few of them
CHUNK = 1 << 24  # bytes that are copied, judged, summed and written at a time
DTYPES = {  # by the name that safetensors has for them
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class NotFiniteError(ValueError):
    """A tensor to be saved holds NaN or infinity: a run could not be continued from it."""


@dataclass(frozen=True)
class Entry:
    """Where a part of a tensor lies: elements [start, start + count) of the tensor, from `offset` in the file on."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    count: int
    file: str
    offset: int


@dataclass(frozen=True)
class Written:
    """A file that is on its disk."""

    name: str
    bytes: int
    checksums: list[str]  # of each block, 16 hexadecimal digits
    entries: list[Entry]


class Checked:
    """A file being written, and the checksums of its blocks."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.bytes = sink, 0
        self.checksums: list[str] = []
        self.sum = checksum.start()

    def write(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        self.sink.write(data)
        while data:
            part = data[: BLOCK - self.bytes % BLOCK]
            self.sum.update(part)
            self.bytes += len(part)
            data = data[len(part) :]
            if self.bytes % BLOCK == 0:
                self._next_block()

    def _next_block(self) -> None:
        self.checksums.append(self.sum.hexdigest())
        self.sum = checksum.start()

    def close(self) -> None:
        self.sink.close()
        if self.bytes % BLOCK:
            self._next_block()


@contextmanager
def _checked(sink: Sink) -> Iterator[Checked]:
    """Closed in the end; given up, without waiting for the disk, where anything fails."""
    file = Checked(sink)
    try:
        yield file
    except BaseException:
        sink.discard()
        raise
    file.close()


def write(name: str, sink: Sink, parts: dict[str, Part], tensor_of: Callable[[str], Tensor] | None = None) -> Written:
    """Writes and closes the file. NotFiniteError if a floating-point tensor holds NaN or infinity.

    tensor_of: gives the tensors one after the other; those of `parts` then need no memory, and may be on the meta device"""
    with _checked(sink) as file:
        header, entries = _layout(name, parts)
        file.write(header)
        for entry in entries:
            for chunk in chunks(tensor_of(entry.name) if tensor_of else parts[entry.name].tensor):
                if chunk.is_floating_point() and chunk.numel() and not torch.stack(chunk.aminmax()).isfinite().all():
                    raise NotFiniteError(f"{entry.name} is not finite")
                file.write(bytes_of(chunk))
    return Written(name, file.bytes, file.checksums, entries)


def write_bytes(name: str, sink: Sink, content: bytes) -> Written:
    return write_pieces(name, sink, [memoryview(content)], [])


def write_pieces(name: str, sink: Sink, pieces: Iterable[memoryview], entries: list[Entry]) -> Written:
    """Writes and closes a file of which the contents are known, such as that of another checkpoint."""
    with _checked(sink) as file:
        for piece in pieces:
            file.write(piece)
    return Written(name, file.bytes, file.checksums, entries)


def bytes_of(flat: Tensor) -> memoryview:
    """The memory of a flat tensor on the CPU."""
    # Of a single element torch does not say that its stride is 1.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data


def size_of(parts: dict[str, Part]) -> int:
    """Bytes."""
    return sum(part.tensor.numel() * part.tensor.element_size() for part in parts.values())


def _layout(file: str, parts: dict[str, Part]) -> tuple[bytes, list[Entry]]:
    """The header, and the parts in the order in which they follow: wide numbers first, so that all are aligned. A part without elements is
    one only of a tensor that has none."""
    names = (name for name, part in parts.items() if part.tensor.numel() or not math.prod(part.shape))
    order = sorted(names, key=lambda name: (-parts[name].tensor.itemsize, name))
    header: dict[str, object] = {}
    offsets: dict[str, int] = {}
    end = 0
    for name in order:
        tensor, offsets[name] = parts[name].tensor, end
        end += tensor.numel() * tensor.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    entries = [
        Entry(name, NAMES[part.tensor.dtype], part.shape, part.start, part.tensor.numel(), file, first + offsets[name])
        for name, part in ((name, parts[name]) for name in order)
    ]
    return len(text).to_bytes(8, "little") + text, entries


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Flat pieces of it on the CPU, in row-major order; never a second copy of what is large and lies in order."""
    flat = tensor.detach().contiguous().view(-1)
    step = max(1, CHUNK // flat.element_size())
    for first in range(0, flat.numel(), step):
        yield flat[first : first + step].cpu()


def covers(entries: list[Entry]) -> bool:
    """Whether these parts of one tensor are all of it, each element once."""
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.start):
        if entry.start != end:
            return False
        end += entry.count
    return end == math.prod(entries[0].shape)
