"""An uncompressed tar of one folder per identity, whose images are read at their places."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable

import numpy as np

from dali_loaders.account import Account
from dali_loaders.records import RandomAccessFile
from dali_loaders.sources.by_name import is_image, labels_of


class TarSource:
    """An uncompressed tar of IDENTITY/IMAGE files. Its headers are read once; its images are read at their offsets, without unpacking."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = RandomAccessFile(path)
        self.account = Account()
        members = sorted(_tar_members(path, self.account))
        self._names = [name for name, _, _ in members]
        self.labels, self.identities = labels_of(path, self._names)
        self._offsets = np.array([offset for _, offset, _ in members], np.int64)
        self._sizes = np.array([size for _, _, size in members], np.int64)
        if int((self._offsets + self._sizes).max()) > self._file.size:
            raise ValueError(f"{path} is cut off; copy it again from its source.")

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        return self._file.read(int(self._sizes[index]), int(self._offsets[index]))

    def name(self, index: int) -> str:
        return f"{os.path.basename(self.path)}:{self._names[index]}"


def _tar_members(path: str, account: Account) -> Iterable[tuple[str, int, int]]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = os.path.normpath(member.name)
                if member.isdir():
                    continue
                if account.admits(name, None if member.isreg() and is_image(name) else "no image by its name"):
                    yield name, member.offset_data, member.size
        # tarfile takes a cut at a header for the end, but a whole archive ends with blocks of zeros.
        with open(path, "rb") as file:
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"{path} is cut off; copy it again from its source.")
    except (tarfile.TarError, OSError, EOFError) as error:
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise ValueError(
                    f"{path} is compressed with gzip; unpack it with gunzip, so that images can be read at their places."
                ) from error
        raise ValueError(f"{path} is not a readable uncompressed .tar ({error}); expected a folder, a .tar or a .rec file.") from error
