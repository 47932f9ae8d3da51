"""Files that grow for as long as a run lasts, on a disk that may be full for a while: whole records only, and no error ends the run."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class Appending:
    """Appends records to the file at `path`, each with one write. What a record that failed has left behind is cut off again, so that
    the file stays readable. Opened at the first record, and again after a failure; nothing is kept in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def append(self, record: bytes) -> None:
        """OSError if it is not written."""
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Not blocking: a pipe that nobody reads is an error, and does not stop the run.
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
        end = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, record) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):  # a device has no end
                os.ftruncate(self._descriptor, end)
            self.close()
            raise

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            with suppress(OSError):
                os.close(descriptor)


class Output:
    """One of the places that a run writes to besides its checkpoints. Training goes on without it: the first failure is said, those that
    follow are counted, and what failed is lost."""

    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self.name, self._say, self._lost = name, say, 0

    def try_to(self, write: Callable[[], object]) -> bool:
        """Whether `write` ended without an OSError."""
        try:
            write()
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                self._say(f"{self.name} cannot be written ({error.strerror or error}): training goes on without it")
            return False
        if self._lost:
            self._say(f"{self.name} is written again; {self._lost} records of it are lost")
            self._lost = 0
        return True
