"""Every file below a folder, through symbolic links too, without running in circles: one order of files, for file systems and for tars."""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from dali_loaders.names import printable
from dali_loaders.waiting import waiting

FILE = "file"
FOLDER = "folder"
NOWHERE = "symbolic link that leads nowhere"
SPECIAL = "no regular file"


class Entry(NamedTuple):
    """What stands in a folder under `name`; `kind` is FILE or FOLDER, or the reason why it is neither.

    real: of a link to a folder the path without links of that folder, else None."""

    name: bytes
    kind: str
    real: bytes | None = None


class Tree(Protocol):
    def entries(self, folder: bytes) -> list[Entry]:
        """Of a folder without links in its path. OSError where it cannot be listed."""


class Found(NamedTuple):
    """`kind` as in Entry, or the OSError for which a folder cannot be listed."""

    name: bytes  # below the root
    kind: str | OSError
    real: bytes  # path without links of the folder that holds it, or of the folder itself


class _Visit(NamedTuple):
    name: bytes
    real: bytes
    above: tuple[bytes, ...]  # real paths of the folders that led here
    links: int  # followed on the way


def walk(tree: Tree, root: bytes) -> Iterator[Found]:
    """Everything below `root`, which is a path without links.

    A link to a folder is a second name of all that it holds, but never of a folder on the way to the link. Links within such a second
    name lead on only to folders that were not met before: n folders that link to each other would have n! names."""
    met: set[bytes] = set()
    folders, links = [_Visit(b"", root, (), 0)], deque[_Visit]()
    while folders or links:
        visit = folders.pop() if folders else links.popleft()
        if visit.links > 1 and visit.real in met:
            yield Found(visit.name, "symbolic link to a folder that has other names", visit.real)
            continue
        met.add(visit.real)
        yield Found(visit.name, FOLDER, visit.real)
        try:
            entries = sorted(tree.entries(visit.real))
        except OSError as error:
            yield Found(visit.name, error, visit.real)
            continue
        above, inner = (*visit.above, visit.real), []
        for entry in entries:
            name = visit.name + b"/" + entry.name if visit.name else entry.name
            if entry.kind != FOLDER:
                yield Found(name, entry.kind, visit.real)
            elif entry.real is None:
                inner.append(_Visit(name, os.path.join(visit.real, entry.name), above, visit.links))
            elif entry.real in above:
                yield Found(name, "symbolic link to a folder that holds it", visit.real)
            else:
                links.append(_Visit(name, entry.real, above, visit.links + 1))
        folders += reversed(inner)


class FileSystem:
    """The tree of real files and folders."""

    def entries(self, folder: bytes) -> list[Entry]:
        with waiting(lambda: f"the names in the folder {printable(folder)}"), os.scandir(folder) as listing:
            return [self._entry(entry) for entry in listing]

    def _entry(self, entry: os.DirEntry[bytes]) -> Entry:
        if entry.is_symlink():
            try:
                mode = os.stat(entry.path).st_mode
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                    return Entry(entry.name, NOWHERE)
                raise
            if stat.S_ISDIR(mode):
                return Entry(entry.name, FOLDER, os.path.realpath(entry.path))
            return Entry(entry.name, FILE if stat.S_ISREG(mode) else SPECIAL)
        if entry.is_dir(follow_symlinks=False):
            return Entry(entry.name, FOLDER)
        return Entry(entry.name, FILE if entry.is_file(follow_symlinks=False) else SPECIAL)
