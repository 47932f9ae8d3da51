"""Checkpoints of format 1, which torch.distributed.checkpoint wrote: read only, and without running anything that a file names. Its plan is
a pickle (`.metadata`), of which nothing but names, shapes and places is taken."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline import plain_pickle
from pipeline.agreement import Agreement
from pipeline.checkpoint.manifest import MOST_BYTES, DamagedError, check_info, names_in
from pipeline.checkpoint.parts import Saved
from pipeline.checkpoint.stores import MANIFEST, LocalStore, Store

PLAN = ".metadata"
IDENTITIES = "identities.json"
PIECE = 1 << 22  # bytes that are read at a time
MOST_PLAN, MOST_NAMES = 1 << 30, 1 << 34  # bytes


class _Record:
    """Stands for a dataclass of torch.distributed.checkpoint: its fields."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError("fields of another form")
        self.fields = state


class _Properties:
    """Stands for TensorProperties, of which the first is the dtype."""

    def __setstate__(self, state: Any) -> None:
        self.fields = {"dtype": state[0]}


def _sizes(numbers: Any = ()) -> tuple[int, ...]:
    return tuple(numbers)


def _nothing(*_: Any) -> None:
    """Stands for what is not needed: layouts, memory formats, paths."""


_MODULE = "torch.distributed.checkpoint"
_RECORDS = ("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta")
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_TYPES: dict[tuple[str, str], Any] = {
    **{(f"{_MODULE}.metadata", name): _Record for name in (*_RECORDS, "BytesStorageMetadata")},
    (f"{_MODULE}.metadata", "TensorProperties"): _Properties,
    (f"{_MODULE}.filesystem", "_StorageInfo"): _Record,
    (f"{_MODULE}.metadata", "_MEM_FORMAT_ENCODING"): _nothing,
    ("torch.serialization", "_get_layout"): _nothing,
    ("torch", "Size"): _sizes,
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
    **{(module, name): _nothing for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
}


def is_of_it(store: Store, name: str) -> bool:
    """Whether that checkpoint, which may be damaged, is of this format."""
    return isinstance(store, LocalStore) and store.exists(name, PLAN)


class FirstCheckpoint(Saved):
    """As reading.Checkpoint. Of a rank's file whole pieces are read: all that it wrote of a tensor."""

    def __init__(self, folder: str, name: str) -> None:
        self.name, self.path, self.store = name, f"{folder}/{name}", LocalStore(folder)
        self.info = self._info()
        content = self._content(PLAN, MOST_PLAN)
        try:
            plan = plain_pickle.load(content, f"{self.path}/{PLAN}", _TYPES, "the plan of a checkpoint")
        except ValueError as error:
            raise DamagedError(str(error)) from None
        try:
            self.kinds, self.pieces = _understood(plan, {file: size for file, (size, _) in self.info["files"].items()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(f"{self.path}/{PLAN} cannot be used: it is no plan of a checkpoint ({error!s:.200})") from None

    def _info(self) -> dict[str, Any]:
        file = f"{self.path}/{MANIFEST}"
        try:
            info = json.loads(self._content(MANIFEST, 1 << 28))
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{file} cannot be read ({error})") from None
        if not isinstance(info, dict) or info.get("format") != 1:
            raise DamagedError(f"{file} is not of format 1, as the files beside it are")
        try:
            check_info(info)
            for name, (size, sum_) in info["files"].items():
                if os.path.basename(name) != name or not isinstance(size, int) or not isinstance(sum_, int):
                    raise ValueError(f"file {name!r:.60}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(f"{file} is not a manifest ({error!s:.200})") from None
        return info

    def _content(self, file: str, most: int) -> bytes:
        try:
            size = self.store.size(self.name, file)
            if size > most:
                raise OSError(f"it has {size} bytes")
            return self._bytes(file, 0, size)
        except (OSError, EOFError) as error:
            raise DamagedError(f"{self.path}/{file} cannot be read ({getattr(error, 'strerror', None) or error})") from None

    def _bytes(self, file: str, offset: int, length: int) -> bytes:
        content = bytearray(length)
        self.store.read_into(self.name, file, offset, memoryview(content))
        return bytes(content)

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __contains__(self, name: object) -> bool:
        return name in self.kinds

    def shape(self, name: str) -> tuple[int, ...]:
        return self.kinds[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self.kinds[name][1]

    def fill(self, name: str, out: Tensor, start: int = 0) -> None:
        out, stop = out.detach(), start + out.numel()
        ordered = out.contiguous()
        for begin, count, file, offset, length in self.pieces[name]:
            first, last = max(start, begin), min(stop, begin + count)
            if first < last:
                piece = self._piece(name, file, offset, length, count)
                ordered.view(-1)[first - start : last - start].copy_(piece[first - begin : last - begin])
        if ordered is not out:
            out.copy_(ordered)

    def piece(self, name: str, number: int) -> Tensor:
        """Flat: the elements that one rank wrote of that tensor, as `pieces[name][number]` says which."""
        _, count, file, offset, length = self.pieces[name][number]
        return self._piece(name, file, offset, length, count)

    def _piece(self, name: str, file: str, offset: int, length: int, count: int) -> Tensor:
        try:
            tensor = torch.load(io.BytesIO(_stored(self._bytes(file, offset, length))), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises nearly anything
            words = str(error).partition("\n")[0]
            raise DamagedError(f"{self.path}/{file} cannot be read ({words})") from None
        if not isinstance(tensor, Tensor) or tensor.numel() != count or tensor.dtype != self.dtype(name):
            raise DamagedError(f"{self.path}/{file} holds something other than {name}")
        return tensor.detach().reshape(-1)

    def identities(self) -> list[str] | None:
        if IDENTITIES not in self.info["files"]:
            return None
        return names_in(self._content(IDENTITIES, MOST_NAMES), f"{self.path}/{IDENTITIES}", self.info.get("num_classes"))

    def wrong_size(self) -> str | None:
        for file, (known, _) in self.info["files"].items():
            try:
                size = self.store.size(self.name, file)
            except OSError as error:
                return f"{file} is missing" if isinstance(error, FileNotFoundError) else f"{file} cannot be read ({error})"
            if size != known:
                return f"{file} has {size} bytes instead of {known}"
        return None

    def fault(self, agreement: Agreement) -> str | None:
        """What is wrong with it, or None. Every rank reads its share of the files once, and calls it."""
        fault = agreement.of_first(self.wrong_size())
        if fault is None:
            mine = sorted(self.info["files"])[agreement.rank :: agreement.ranks]
            fault = next(filter(None, agreement.gather(self._wrong_content(mine))), None)
        return fault

    def _wrong_content(self, files: list[str]) -> str | None:
        for file in files:
            size, known = self.info["files"][file]
            checksum = 0
            try:
                for first in range(0, size, PIECE):
                    checksum = zlib.crc32(self._bytes(file, first, min(PIECE, size - first)), checksum)
            except (OSError, EOFError) as error:
                return f"{file} cannot be read ({getattr(error, 'strerror', None) or error})"
            if checksum != known:
                return f"the contents of {file} have changed since it was written"
        return None


def _stored(content: bytes) -> bytes:
    """What `torch.save` wrote, if nothing in it is packed: torch.load would make any number of bytes of a few that are."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("packed contents")
    return content


Kinds = dict[str, tuple[tuple[int, ...], torch.dtype]]  # by name of a tensor
Pieces = dict[str, list[tuple[int, int, str, int, int]]]  # first element, elements, file, offset, length


def _understood(plan: Any, room: dict[str, int]) -> tuple[Kinds, Pieces]:
    """Names, shapes and places of tensors. ValueError and others where a number is not what it is about to be used for.

    room: bytes of the files that the manifest has"""
    left = sum(room.values())
    kinds: Kinds = {}
    pieces: Pieces = {}
    starts: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
    for name, record in plan.fields["state_dict_metadata"].items():
        if "size" not in record.fields:
            continue  # bytes of something else
        shape, dtype = record.fields["size"], record.fields["properties"].fields["dtype"]
        if not (isinstance(dtype, torch.dtype) and isinstance(name, str) and all(isinstance(n, int) and 0 <= n < 1 << 40 for n in shape)):
            raise ValueError(f"tensor {name!r:.40}")
        left -= math.prod(shape) * dtype.itemsize
        if left < 0 or math.prod(filter(None, shape)) > MOST_BYTES:
            raise ValueError(f"tensor {name!r:.40}, larger than its files")
        kinds[name], pieces[name] = (shape, dtype), []
        for chunk in record.fields["chunks"]:
            offsets, sizes = chunk.fields["offsets"], chunk.fields["sizes"]
            if sizes[1:] != shape[1:] or any(offsets[1:]):
                raise ValueError(f"{name!r:.40} is not sharded by rows")
            width = math.prod(shape[1:])
            starts[name, offsets] = (offsets[0] * width if offsets else 0, math.prod(sizes))
    for index, place in plan.fields["storage_data"].items():
        name, offsets = index.fields["fqn"], index.fields["offset"]
        if name not in kinds:
            continue
        file, offset, length = (place.fields[field] for field in ("relative_path", "offset", "length"))
        start, count = starts[name, offsets or ()]
        if min(offset, length) < 0 or offset + length > room[file] or count * kinds[name][1].itemsize > length:
            raise ValueError(f"{name!r:.40} lies outside its file")
        pieces[name].append((start, count, file, offset, length))
    for name, parts in pieces.items():
        parts.sort()
        ends = [0, *(start + count for start, count, *_ in parts)]
        if ends[:-1] != [start for start, *_ in parts] or ends[-1] != math.prod(kinds[name][0]):
            raise ValueError(f"{name!r:.40} is not whole")
    return kinds, pieces
