"""An opened checkpoint: its tensors, read by the element from the files of however many ranks wrote it, and whether it is sound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.agreement import Agreement
from pipeline.checkpoint import checksum
from pipeline.checkpoint.data_file import BLOCK, CHUNK, DTYPES, Entry, bytes_of
from pipeline.checkpoint.manifest import DamagedError, Manifest, decode, names_in
from pipeline.checkpoint.parts import Saved
from pipeline.checkpoint.stores import MANIFEST, Store, UnreachableError, split, store_of

IDENTITIES = "identities.json"  # a list of the names, by row of the prototypes; a few bytes beside each row's kilobytes
MOST_MANIFEST = 1 << 26  # bytes: enough for the checksums of 4 terabytes


class Checkpoint(Saved):
    """One of the format that this version writes. DamagedError when opened or read, if it is not what was written: each block
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
                raise DamagedError(f"it has {size} bytes")
            content = bytearray(size)
            self.store.read_into(self.name, MANIFEST, 0, memoryview(content))
            return decode(bytes(content))
        except (OSError, EOFError) as error:
            raise unreadable(file, error) from None
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
            raise unreadable(f"{self.path}/{file}", error) from None
        sums = self.manifest.files[file].checksums
        for number, first in enumerate(range(0, len(out), BLOCK), start=block):
            if checksum.of(out[first : first + BLOCK]) != sums[number]:
                raise DamagedError(f"the contents of {self.path}/{file} have changed since it was written")

    def contents(self, file: str) -> Iterator[memoryview]:
        """All bytes of a file, checked; each piece overwrites the one before it."""
        size = self.manifest.files[file].bytes
        buffer = memoryview(bytearray(min(CHUNK, size)))
        for first in range(0, size, CHUNK):
            piece = buffer[: size - first]
            self._read_blocks(file, first // BLOCK, piece)
            yield piece

    def identities(self) -> list[str] | None:
        """Names of the classes, by row of the prototypes; None if it has none."""
        if IDENTITIES not in self.manifest.files:
            return None
        self._check_size(IDENTITIES)
        content = bytearray(self.manifest.files[IDENTITIES].bytes)
        self._read(IDENTITIES, 0, memoryview(content))
        return names_in(bytes(content), f"{self.path}/{IDENTITIES}", self.info.get("num_classes"))

    def wrong_size(self) -> str | None:
        """Which of its files is not there or not as long as it should be, or None: a first look, which reads none of them."""
        fault = _raised(self._check_sizes)
        return None if fault is None else str(fault)

    def fault(self, agreement: Agreement) -> str | None:
        """What is wrong with it, or None: sizes of all files first, then each rank reads its share of the blocks. Every rank calls it.
        ValueError where its store gives no answer."""
        fault = agreement.of_first(_raised(self._check_sizes) if agreement.rank == 0 else None)
        if fault is None:
            faults = agreement.gather(_raised(lambda: self._check_blocks(agreement.rank, agreement.ranks)))
            fault = next(filter(None, faults), None)
        if fault is not None and not isinstance(fault, DamagedError):
            raise fault
        return None if fault is None else str(fault)

    def _check_sizes(self) -> None:
        for file in self.manifest.files:
            self._check_size(file)

    def _check_size(self, file: str) -> None:
        try:
            size = self.store.size(self.name, file)
        except FileNotFoundError:
            raise DamagedError(f"{file} is missing") from None
        except OSError as error:
            raise unreadable(file, error) from None
        if size != self.manifest.files[file].bytes:
            raise DamagedError(f"{file} has {size} bytes instead of {self.manifest.files[file].bytes}")

    def _check_blocks(self, rank: int, ranks: int) -> None:
        buffer = memoryview(bytearray(min(CHUNK, max((known.bytes for known in self.manifest.files.values()), default=0))))
        run = CHUNK // BLOCK
        pieces = [(file, block) for file, known in self.manifest.files.items() for block in range(0, len(known.checksums), run)]
        for file, block in pieces[rank * len(pieces) // ranks : (rank + 1) * len(pieces) // ranks]:
            self._read_blocks(file, block, buffer[: min(CHUNK, self.manifest.files[file].bytes - block * BLOCK)])


def open_checkpoint(path: str) -> Checkpoint:
    """The checkpoint that is the folder PATH. DamagedError or ValueError, with a sentence, if it cannot be used."""
    folder, name = split(path)
    return open_in(store_of(folder), name)


def open_in(store: Store, name: str) -> Checkpoint:
    from pipeline.checkpoint import first_format

    if first_format.is_of_it(store, name):
        return cast(Checkpoint, first_format.FirstCheckpoint(store.path, name))
    return Checkpoint(store, name)


def unreadable(file: str, error: OSError | EOFError) -> ValueError:
    """DamagedError, unless the store gave no answer, which is no reason to go back to an older checkpoint."""
    words = f"{file} cannot be read ({getattr(error, 'strerror', None) or str(error) or type(error).__name__})"
    return ValueError(words) if isinstance(error, UnreachableError) else DamagedError(words)


def _raised(check: Callable[[], None]) -> ValueError | None:
    try:
        check()
    except ValueError as error:
        return error
    return None
