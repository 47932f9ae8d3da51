"""Names of identities: the text file beside a packed set that keeps them, a line 'number of images<tab>name' each, in label order; and a
checksum."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence

import numpy as np


def identities_path(path: str) -> str:
    """x.rec -> x.identities.txt"""
    return os.path.splitext(path)[0] + ".identities.txt"


def read_identities(path: str) -> tuple[np.ndarray, list[str]] | None:
    """Images per identity, int64 [C], and names of a file that `pack` wrote beside the .rec `path`; None if there is none."""
    if not os.path.exists(identities_path(path)):
        return None
    try:
        with open(identities_path(path), encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            lines = [line.rstrip("\n").split("\t", 1) for line in file]
        return np.array([int(count) for count, _ in lines], np.int64), [name for _, name in lines]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{identities_path(path)} does not hold lines 'images<tab>identity' ({error}); delete it or pack again."
        ) from error


def write_identities(path: str, counts: np.ndarray, names: list[str]) -> None:
    """Writes to `path` itself, which is not yet the name that `read_identities` looks for while the set is being packed."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        file.writelines(f"{count}\t{name}\n" for count, name in zip(counts, names, strict=True))


def checksum(names: Sequence[str]) -> str:
    """8 digits by which two sets can be told apart that differ in a name or in their order."""
    return f"{zlib.crc32(chr(10).join(names).encode(errors='surrogateescape')):08x}"
