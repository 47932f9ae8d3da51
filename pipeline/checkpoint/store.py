"""What a place for checkpoints can do, and the names that checkpoints and what saves leave behind have in it."""

from __future__ import annotations

import re
from typing import Protocol

MANIFEST = "protoshard.json"  # written last
PARTIAL = ".partial"
REMOVED = ".removed"  # being removed
LEFT_OVER = re.compile(r"step-\d+\.(partial|removed)")  # nothing else is cleared away
STEP = re.compile(r"step-\d{1,18}")  # the names of checkpoints


class UnreachableError(OSError):
    """A store that gives no answer, or a wrong one: which says nothing about what lies in it."""


class Sink(Protocol):
    """A file being written. On return of `close` it is on the disk, or in the store; after `discard` it is of no use."""

    def write(self, data: memoryview) -> None: ...

    def close(self) -> None: ...

    def discard(self) -> None: ...


class Store(Protocol):
    """A folder of checkpoints; each is a folder of files. OSError of all kinds comes out of everything."""

    path: str  # without passwords

    def names(self) -> list[str]:
        """Of the folders in it that are complete, in no order; none where it does not exist."""
        ...

    def unfinished(self) -> list[str]:
        """Of the folders of saves that are under way or were broken off, and of removals, in no order."""
        ...

    def exists(self, name: str, file: str) -> bool: ...

    def size(self, name: str, file: str) -> int:
        """Bytes. FileNotFoundError; IsADirectoryError for what is no regular file."""
        ...

    def read_into(self, name: str, file: str, offset: int, out: memoryview) -> None:
        """Fills `out` from that offset on; EOFError where the file ends before."""
        ...

    def begin(self, name: str) -> None:
        """Makes room for a new checkpoint and removes what is left of saves that were broken off. One rank calls it, before the others.
        FileExistsError if there is anything of that name: nothing is ever written over."""
        ...

    def begin_beside(self, name: str) -> None:
        """Makes room for a new checkpoint where a run may be saving others, and removes nothing. FileExistsError if one of that name is
        there, or has begun."""
        ...

    def create(self, name: str, file: str) -> Sink:
        """A file of a checkpoint that has begun."""
        ...

    def commit(self, name: str) -> None:
        """After the manifest: from now on the checkpoint is complete, also after a power loss."""
        ...

    def abandon(self, name: str) -> None:
        """Removes what a save that failed has written."""
        ...

    def rename(self, name: str, new: str) -> None: ...

    def remove(self, name: str) -> None: ...
