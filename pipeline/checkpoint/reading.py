"""An opened checkpoint: its tensors, read by the element from the files of however many ranks wrote it, and whether it is sound."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.agreement import Agreement
from pipeline.checkpoint import checksum
from pipeline.checkpoint.data_file import BLOCK, CHUNK, DTYPES, Entry, bytes_of
from pipeline.checkpoint.manifest import DamagedError, Manifest, decode
from pipeline.checkpoint.stores import MANIFEST, Store, store_of

IDENTITIES = "identities.json"  # a list of the names, by row of the prototypes; a few bytes beside each row's kilobytes
MOST_MANIFEST = 1 << 32  # bytes


class Checkpoint:
    """A `parts.Saved` of the format that this version writes. DamagedError when opened or read, if it is not what was written: each block
    that is read is held against its checksum."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.path = f"{store.path}/{name}"
        self.manifest = self._open()
        self.edges: dict[str, tuple[int, bytes]] = {}  # by file, the block that was read last: small tensors lie side by side in one

    def _open(self) -> Manifest:
        file = f"{self.path}/{MANIFEST}"
        try:
            size = self.store.size(self.name, MANIFEST)
            if size > MOST_MANIFEST:
                raise DamagedError(f"{file} cannot be read: it has {size} bytes")
            content = bytearray(size)
            self.store.read_into(self.name, MANIFEST, 0, memoryview(content))
            return decode(bytes(content))
        except (OSError, EOFError) as error:
            raise DamagedError(f"{file} cannot be read ({_reason(error)})") from None
        except DamagedError as error:
            raise DamagedError(f"{file} cannot be used: {error}") from None
        except ValueError as error:
            raise ValueError(f"{file} cannot be used: {error}") from None

    @property
    def info(self) -> dict[str, Any]:
        """What the saver said about it: step, consumed, num_classes, width, config."""
        return self.manifest.info

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.manifest.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.manifest.tensors[name][0].shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.manifest.tensors[name][0].dtype]

    def whole(self, name: str) -> Tensor:
        out = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.fill(name, out)
        return out

    def fill(self, name: str, out: Tensor, start: int = 0) -> None:
        out, stop = out.detach(), start + out.numel()
        assert stop <= math.prod(self.shape(name)), (name, start, out.shape)
        for entry in self.manifest.tensors[name]:
            first, last = max(start, entry.start), min(stop, entry.start + entry.count)
            if first < last:
                self._fill_from(entry, first, last, out, first - start)

    def _fill_from(self, entry: Entry, first: int, last: int, out: Tensor, at: int) -> None:
        """Elements [first, last) of the whole, which lie in this part, to `out` from its element `at` on."""
        width, dtype = DTYPES[entry.dtype].itemsize, DTYPES[entry.dtype]
        offset = entry.offset + (first - entry.start) * width
        if not out.is_contiguous():  # channels last: weights of convolutions, which are small
            ordered = out.contiguous()
            self._fill_from(entry, first, last, ordered, at)
            out.copy_(ordered)
            return
        flat = out.view(-1)[at : at + last - first]
        if out.device.type == "cpu" and out.dtype == dtype:
            self._read(entry.file, offset, bytes_of(flat))
            return
        step = CHUNK // width
        for begin in range(0, len(flat), step):
            piece = torch.empty(min(step, len(flat) - begin), dtype=dtype)
            self._read(entry.file, offset + begin * width, bytes_of(piece))
            flat[begin : begin + step].copy_(piece)

    def _read(self, file: str, offset: int, out: memoryview) -> None:
        """Bytes of a file, each block of them checked. Whole blocks are read in place, in runs."""
        while out:
            block, within = divmod(offset, BLOCK)
            count = min(len(out), CHUNK) // BLOCK * BLOCK if within == 0 else 0
            if count:
                self._read_blocks(file, block, out[:count])
            else:
                count = min(len(out), BLOCK - within)
                out[:count] = self._edge(file, block)[within : within + count]
            offset, out = offset + count, out[count:]

    def _edge(self, file: str, block: int) -> memoryview:
        known = self.edges.get(file)
        if known is None or known[0] != block:
            content = bytearray(min(BLOCK, self.manifest.files[file].bytes - block * BLOCK))
            self._read_blocks(file, block, memoryview(content))
            known = self.edges[file] = (block, bytes(content))
        return memoryview(known[1])

    def _read_blocks(self, file: str, block: int, out: memoryview) -> None:
        try:
            self.store.read_into(self.name, file, block * BLOCK, out)
        except (OSError, EOFError) as error:
            raise DamagedError(f"{self.path}/{file} cannot be read ({_reason(error)})") from None
        sums = self.manifest.files[file].checksums
        for number, first in enumerate(range(0, len(out), BLOCK), start=block):
            if checksum.of(out[first : first + BLOCK]) != sums[number]:
                raise DamagedError(f"the contents of {self.path}/{file} have changed since it was written")

    def identities(self) -> list[str] | None:
        """Names of the classes, by row of the prototypes; None if it has none."""
        if IDENTITIES not in self.manifest.files:
            return None
        content = bytearray(self.manifest.files[IDENTITIES].bytes)
        self._read(IDENTITIES, 0, memoryview(content))
        return json.loads(bytes(content))

    def has_its_sizes(self) -> bool:
        """Whether all its files are there and as long as they should be: a first look, which reads none of them."""
        return self._wrong_size() is None

    def fault(self, agreement: Agreement) -> str | None:
        """What is wrong with it, or None: sizes of all files first, then each rank reads its share of the blocks. Every rank calls it."""
        fault = agreement.of_first(self._wrong_size())
        if fault is None:
            rank, ranks = agreement.rank, agreement.ranks
            fault = next(filter(None, agreement.gather(self._wrong_block(rank, ranks))), None)
        return fault

    def _wrong_size(self) -> str | None:
        for file, known in self.manifest.files.items():
            try:
                size = self.store.size(self.name, file)
            except OSError as error:
                return f"{file} is missing" if isinstance(error, FileNotFoundError) else f"{file} cannot be read ({_reason(error)})"
            if size != known.bytes:
                return f"{file} has {size} bytes instead of {known.bytes}"
        return None

    def _wrong_block(self, rank: int, ranks: int) -> str | None:
        buffer = memoryview(bytearray(CHUNK))
        run = CHUNK // BLOCK
        pieces = [(file, block) for file, known in self.manifest.files.items() for block in range(0, len(known.checksums), run)]
        for file, block in pieces[rank * len(pieces) // ranks : (rank + 1) * len(pieces) // ranks]:
            count = min(CHUNK, self.manifest.files[file].bytes - block * BLOCK)
            try:
                self._read_blocks(file, block, buffer[:count])
            except DamagedError as error:
                return str(error)
        return None


def open_checkpoint(path: str) -> Checkpoint:
    """The checkpoint that is the folder PATH. DamagedError or ValueError, with a sentence, if it cannot be used."""
    folder, _, name = path.rstrip("/").rpartition("/")
    return open_in(store_of(folder or os.curdir), name)


def open_in(store: Store, name: str) -> Checkpoint:
    from pipeline.checkpoint import first_format

    if first_format.is_of_it(store, name):
        return cast(Checkpoint, first_format.FirstCheckpoint(store.path, name))
    return Checkpoint(store, name)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
