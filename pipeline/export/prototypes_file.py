"""The prototypes of a checkpoint as one .safetensors file, merged from the parts of all ranks: read and written piece by piece."""

from __future__ import annotations

import json
import math
import os
from typing import Protocol

import torch
from torch import Tensor

from dali_loaders.progress import progress
from pipeline.checkpoint.data_file import bytes_of

FILE, IDENTITIES = "prototypes.safetensors", "identities.json"
PIECE = 1 << 25  # bytes held at a time, whatever the size of the matrix
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Matrix(Protocol):
    """What of a checkpoint this needs (`pipeline.checkpoint.Saved`)."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def fill(self, name: str, out: Tensor, start: int = 0) -> None: ...


def write(saved: Matrix, path: str, name: str = "prototypes") -> tuple[int, ...]:
    """Writes that tensor, row by row as it is in the checkpoint (not normalised), and returns its shape.

    Layout: 8 bytes with the length of a JSON header, the header, the values (github.com/huggingface/safetensors, "Format")."""
    shape, dtype = saved.shape(name), saved.dtype(name)
    count = math.prod(shape)
    entry = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [0, count * dtype.itemsize]}
    header = json.dumps({"__metadata__": {"format": "pt"}, name: entry}).encode()
    header += b" " * (-len(header) % 8)
    piece = torch.empty(min(count, PIECE // dtype.itemsize), dtype=dtype)
    with open(path, "xb", buffering=0) as file, progress("writing prototypes: MB", count * dtype.itemsize >> 20) as done:
        _write_all(file.fileno(), memoryview(len(header).to_bytes(8, "little") + header))
        for start in range(0, count, max(1, len(piece))):
            part = piece[: count - start]
            saved.fill(name, part, start)
            _write_all(file.fileno(), bytes_of(part))
            done.add(part.numel() * dtype.itemsize >> 20)
    return shape


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
