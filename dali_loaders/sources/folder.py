"""A folder of one folder per identity."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing

from dali_loaders.account import Account, ReadError, Unreadable
from dali_loaders.config import TIMEOUT
from dali_loaders.names import Names, printable, text
from dali_loaders.readers import Readers
from dali_loaders.regular import read_regular
from dali_loaders.sources import by_name, meant
from dali_loaders.sources.walk import FILE, FOLDER, NOWHERE, FileSystem, walk

_LOOKING = 16  # threads that look at files whose names tell nothing; each waits for the disk or the network
_AT_ONCE = 64  # such files


class FolderSource:
    """PATH/IDENTITY/IMAGE; identities and images in sorted order. ValueError if a folder cannot be listed, for it may hold identities."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.account = Account()
        self._root = os.fsencode(path)
        names, folders = self._walk()
        images = by_name.admitted(names, self.account, lambda places: self._heads([names[place] for place in places]))
        if not images:
            raise by_name.no_images(path, self.account, meant.guess(path))
        names = [names[place] for place in images]
        self.labels, identities = by_name.labels_of(path, names)
        self.account.use(len(names))
        by_name.without_images(folders, identities, self.account)
        self.identities = [text(identity) for identity in identities]
        self._names = Names.of(names)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        try:
            return read_regular(os.path.join(self._root, self._names[index]))
        except FileNotFoundError as error:
            raise ReadError("vanished") from error
        except OSError as error:
            raise ReadError.of(error) from error

    def name(self, index: int) -> str:
        return printable(os.path.join(self._root, self._names[index]))

    def order_checksum(self) -> int:
        """Of the names of the images, without the path of the set; the same as of a tar of them."""
        return self._names.checksum()

    def _walk(self) -> tuple[list[bytes], list[bytes]]:
        """Names of the files and of the folders."""
        files, folders, unlisted, nowhere = [], [], [], []
        for found in walk(FileSystem(), os.path.realpath(self._root)):
            if found.kind == FILE:
                files.append(found.name)
            elif found.kind == FOLDER:
                folders.append(found.name)
            elif found.kind == NOWHERE:
                nowhere.append(found.name)
            elif isinstance(found.kind, str):
                self.account.pass_over(found.kind, printable(found.name))
            elif reason := by_name.aside(found.name + b"/"):
                self.account.pass_over(f"{reason} that cannot be listed", printable(found.name))
            else:
                unlisted.append((found.name, str(ReadError.of(found.kind))))
        if unlisted:
            name, reason = min(unlisted)
            first = os.path.join(self._root, name) if name else self._root
            raise ValueError(
                f"{len(unlisted)} folder(s) of {printable(self.path)} cannot be listed, the first is {printable(first)} "
                f"({reason}): what they hold would be missing. Make them readable, or move them out of the set."
            )
        by_name.pass_over_links(self.path, nowhere, self.account)
        return files, folders

    def _heads(self, names: list[bytes]) -> Iterable[bytes | str]:
        if not names:
            return []
        looks = Readers(
            lambda places: (self._head(names[place]) for place in places),
            self.path,
            lambda place: printable(os.path.join(self._root, names[place])),
            _LOOKING,
            TIMEOUT,
        )
        with closing(looks):
            parts = [looks.submit(range(start, min(start + _AT_ONCE, len(names)))) for start in range(0, len(names), _AT_ONCE)]
            heads = [head for part in parts for head in looks.result(part)]
        return [head.reason if isinstance(head, Unreadable) else head for head in heads]

    def _head(self, name: bytes) -> bytes | str:
        try:
            return read_regular(os.path.join(self._root, name), by_name.HEAD)
        except OSError as error:
            return str(ReadError.of(error))
