"""A folder of one folder per identity."""

from __future__ import annotations

import os
from collections.abc import Iterator

from dali_loaders.account import Account, ReadError
from dali_loaders.sources.by_name import is_image, labels_of


class FolderSource:
    """PATH/IDENTITY/IMAGE; identities and images in sorted order."""

    def __init__(self, path: str) -> None:
        self.path = path
        root = path.rstrip("/") + "/"
        files = (f"{folder}/{name}"[len(root) :] for folder, names in _walk(root.rstrip("/") or "/") for name in names)
        self.account = Account()
        self._names = sorted(name for name in files if self.account.admits(name, None if is_image(name) else "no image by its name"))
        self.labels, self.identities = labels_of(path, self._names)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        try:
            with open(self.name(index), "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise ReadError.of(error) from error

    def name(self, index: int) -> str:
        return os.path.join(self.path, self._names[index])


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of all folders below `root`, through symbolic links too, but never into a folder that leads there."""
    above: dict[str, frozenset[str]] = {root: frozenset()}
    for folder, folders, names in os.walk(root, followlinks=True):
        inside = above.pop(folder) | {os.path.realpath(folder)}
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(folder, name)) not in inside]
        above.update((os.path.join(folder, name), inside) for name in folders)
        yield folder, names
