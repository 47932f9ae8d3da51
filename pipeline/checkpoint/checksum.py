"""The checksum of files: xxh3 with 64 bits, ten times as fast as a disk."""

from __future__ import annotations

from typing import Any

from dali_loaders.extras import extra


def start() -> Any:
    """A running sum, with `update(bytes)` and `hexdigest()` (16 digits)."""
    with extra("train"):
        from xxhash import xxh3_64
    return xxh3_64()


def of(content: bytes | memoryview) -> str:
    total = start()
    total.update(content)
    return total.hexdigest()
