"""Files that the lists of a protocol name, as a source of images."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from dali_loaders.account import Account, ReadError
from dali_loaders.names import printable
from dali_loaders.regular import read_regular


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
