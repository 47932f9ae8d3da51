"""Names of identities: the text file beside a packed set that keeps them, a line 'number of images<tab>name' each, in label order; and a
checksum."""

from __future__ import annotations

import json
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np

from dali_loaders.regular import open_regular


def identities_path(path: str) -> str:
    """x.rec -> x.identities.txt"""
    return os.path.splitext(path)[0] + ".identities.txt"


def read_identities(path: str) -> tuple[np.ndarray, list[str]] | None:
    """Images per identity, int64 [C], and names of a file that `pack` wrote beside the .rec `path`; None if there is none.

    It may have passed through an editor that adds a byte order mark or Windows line ends. ValueError if a name is there twice."""
    file_path = identities_path(path)
    if not os.path.exists(file_path):
        return None
    counts, names = array("q"), []
    try:
        with open(file_path, encoding="utf-8-sig", errors="surrogateescape", newline="\n", opener=open_regular) as file:
            for number, ended in enumerate(file, start=1):
                line = ended.removesuffix("\n")
                count, tab, name = line.partition("\t")
                if not (tab and count.isascii() and count.isdigit()):
                    raise ValueError(f"line {number} is {line[:40]!r}")
                if line == ended:
                    raise ValueError(f"line {number} has no end, so that the file may be cut off")
                counts.append(int(count))
                names.append(name)
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{file_path} does not hold lines 'images<tab>identity' ({error}); delete it or pack again.") from error
    if names and all(name.endswith("\r") for name in names):
        names = [name.removesuffix("\r") for name in names]
    names = [_unquoted(name) if name.startswith('"') else name for name in names]
    # Hashes first: a set of millions of names takes more memory than all of a .rec's headers.
    hashes = np.fromiter(map(hash, names), np.int64, len(names))
    if len(np.unique(hashes)) < len(names) and (most := Counter(names).most_common(1)[0])[1] > 1:
        name, times = most
        raise ValueError(f"{file_path} has the identity {name!r} {times} times; give each a name of its own, or delete the file.")
    return np.array(counts, np.int64), names


def write_identities(path: str, counts: np.ndarray, names: list[str]) -> None:
    """Writes to `path` itself, which is not yet the name that `read_identities` looks for while the set is being packed."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        file.writelines(f"{count}\t{_quoted(name)}\n" for count, name in zip(counts, names, strict=True))


def stamp(names: Sequence[str]) -> int:
    """A number that may stand in the header of record 0 (as id2, which other readers do not look at), so that an identities file of
    another set is noticed even where its counts are the same."""
    return 1 << 32 | int(checksum(names), 16)


def is_stamp(number: int) -> bool:
    return number >> 32 == 1


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
