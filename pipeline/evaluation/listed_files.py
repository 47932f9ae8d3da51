"""Files that the lists of a protocol name, as a source of images."""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection, Sequence

import numpy as np

from dali_loaders.account import Account, ReadError
from dali_loaders.names import printable
from dali_loaders.progress import progress
from dali_loaders.regular import read_regular

_SHOWN = 3


class ListedFiles:
    """`files` as they are, each its own identity. `lists` is a checksum of what is done with them (`source.py`); `missing` are names that
    have no file, for the account."""

    def __init__(self, folder: str, files: Sequence[str], lists: str = "", missing: Collection[str] = ()) -> None:
        self.path, self.files, self.lists = folder, files, lists
        self.labels = np.arange(len(files), dtype=np.int64)
        self.identities = [str(number) for number in range(len(files))]
        self.account = Account(len(files), len(files))
        for name in missing:
            self.account.pass_over("named by a list, but missing", printable(name))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        try:
            return read_regular(self.files[index])
        except OSError as error:
            raise ReadError.of(error) from error

    def name(self, index: int) -> str:
        return printable(self.files[index])


def are_there(folder: str, names: Sequence[str], list_path: str, allow_missing: bool) -> np.ndarray:
    """bool [n]: which of the `names` are files of `folder`. ValueError, with their number, where some are missing, unless `allow_missing`,
    where all are, and for names that lead out of the folder."""
    outside = next((name for name in names if name.startswith("/") or ".." in name.split("/")), None)
    if outside is not None:
        raise ValueError(
            f"{list_path} names {printable(outside)[:100]}, which lies outside {folder}: a list may name files of its folder alone."
        )
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is no folder; expected the images of {list_path} there.")
    there_n = np.empty(len(names), bool)
    with progress(f"looking for the images of {os.path.basename(list_path)}", len(names)) as done:
        for number, name in enumerate(names):
            there_n[number] = os.path.isfile(os.path.join(folder, name))
            done.add()
    if not there_n.all() and not (allow_missing and there_n.any()):
        missing = np.flatnonzero(~there_n)
        first = ", ".join(printable(names[number]) for number in missing[:_SHOWN])
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(names)} images of {list_path} ({first}{', ...' * (len(missing) > _SHOWN)}); a "
            "score on fewer could not be compared." + " --allow-missing leaves them out." * bool(there_n.any())
        )
    return there_n


def of_arrays(*arrays: np.ndarray) -> str:
    """By which lists of numbers can be told apart."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return f"{value:08x}"
