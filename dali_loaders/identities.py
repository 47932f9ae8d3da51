"""Names of identities: the text file beside a packed set that keeps them, a line 'number of images<tab>name' each, in label order; and a
checksum."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np


def identities_path(path: str) -> str:
    """x.rec -> x.identities.txt"""
    return os.path.splitext(path)[0] + ".identities.txt"


def read_identities(path: str) -> tuple[np.ndarray, list[str]] | None:
    """Images per identity, int64 [C], and names of a file that `pack` wrote beside the .rec `path`; None if there is none.

    It may have passed through an editor that adds a byte order mark or Windows line ends. ValueError if a name is there twice."""
    file_path = identities_path(path)
    if not os.path.exists(file_path):
        return None
    try:
        with open(file_path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            lines = file.read().split("\n")
        if lines[-1] == "":
            del lines[-1]
        if lines and all(line.endswith("\r") for line in lines):
            lines = [line[:-1] for line in lines]
        rows = [line.partition("\t") for line in lines]
        for number, (count, tab, _) in enumerate(rows, start=1):
            if not (tab and count.isascii() and count.isdigit()):
                raise ValueError(f"line {number} is {lines[number - 1][:40]!r}")
        names = [_unquoted(name) if name.startswith('"') else name for _, _, name in rows]
        images = np.array([int(count) for count, _, _ in rows], np.int64)
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{file_path} does not hold lines 'images<tab>identity' ({error}); delete it or pack again.") from error
    if len(set(names)) < len(names):
        name, times = Counter(names).most_common(1)[0]
        raise ValueError(f"{file_path} has the identity {name!r} {times} times; give each a name of its own, or delete the file.")
    return images, names


def write_identities(path: str, counts: np.ndarray, names: list[str]) -> None:
    """Writes to `path` itself, which is not yet the name that `read_identities` looks for while the set is being packed."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        file.writelines(f"{count}\t{_quoted(name)}\n" for count, name in zip(counts, names, strict=True))


def stamp(names: Sequence[str]) -> int:
    """A number that may stand in the header of record 0 (as id2, which other readers do not look at), so that an identities file of
    another set is noticed even where its counts are the same."""
    return 1 << 32 | int(checksum(names), 16)


def checksum(names: Sequence[str]) -> str:
    """8 digits by which two sets can be told apart that differ in a name or in their order."""
    return f"{zlib.crc32(chr(10).join(names).encode(errors='surrogateescape')):08x}"


def _quoted(name: str) -> str:
    """A name that would not come back from its line stands as a JSON string."""
    return json.dumps(name) if "\n" in name or name.endswith("\r") or name.startswith('"') else name


def _unquoted(name: str) -> str:
    try:
        return str(json.loads(name))
    except ValueError:  # a file written before names were quoted
        return name
