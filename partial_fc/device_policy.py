"""How the classifier works on a kind of device. A CPU reads its own memory at once and has caches to fill; a GPU runs behind the host,
which should launch few large operations and never wait. What differs for these reasons is a field here, and tests force it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DevicePolicy:
    tile_bytes: int  # of one logits tile of the chunked kernel
    units_bytes: int  # of a chunk's unit columns, which a small batch would make large
    passes_of_map: int  # tiles among which a map divides these bytes
    moved_elements: int  # of a matrix that a row optimizer moves at a time
    host_looks: bool  # the host reads values on the way and skips work; otherwise all is done, and spare rows take what is of no use
    keeps_weights: bool  # forward leaves weights to backward, in the memory of the gradient, instead of recomputing them
    pools_memory: bool  # memory is reused by BufferPool; torch's own allocator for GPUs does the same
    has_wide_products: bool  # products of bfloat16 matrices come out in float32


# A tile and its operands stay in the last-level cache of a socket, 1 MB per matrix in that of a core. Products are slow and memory is
# plentiful, so that keeping weights beats computing them again.
CPU = DevicePolicy(
    tile_bytes=8 << 20,
    units_bytes=8 << 20,  # of a batch below the width; without this bound its steps took 1.1 to 1.5 times as long
    passes_of_map=4,
    moved_elements=1 << 18,
    host_looks=True,
    keeps_weights=True,
    pools_memory=True,
    has_wide_products=False,
)
# A chunk takes some 100 operations forward and backward, about 0.5 ms of the host. With 128 MB its products take as long (B = 4096,
# D = 512, 16,384 columns in bfloat16, at 60 % of an H100's rate); with 8 MB they would wait for the host most of the time. L2 holds only
# a part of such a tile, but reading it from memory costs no more than 0.04 ms.
GPU = DevicePolicy(
    tile_bytes=128 << 20,
    units_bytes=128 << 20,
    passes_of_map=1,
    moved_elements=1 << 23,
    host_looks=False,
    keeps_weights=False,
    pools_memory=False,
    has_wide_products=True,
)

_forced: DevicePolicy | None = None


def policy_of(device: torch.device) -> DevicePolicy:
    return _forced or (CPU if device.type == "cpu" else GPU)


@contextmanager
def forced(policy: DevicePolicy) -> Iterator[None]:
    """Inside, every device is treated like this, so that a CPU runs what a GPU would."""
    global _forced
    before, _forced = _forced, policy
    try:
        yield
    finally:
        _forced = before
