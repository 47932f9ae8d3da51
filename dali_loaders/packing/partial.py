"""A set that is being written: a folder OUT.partial beside it, whose files only grow, with a journal of how far they are known to be good.
Nothing appears under the set's own names before all of it is written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from types import TracebackType
from typing import Any, BinaryIO

from dali_loaders.regular import open_regular

SECONDS = 2.0  # between two entries of the journal, which is what a pack that is killed loses at most
_JOURNAL = "journal.json"


class Partial:
    """`with Partial(...) as partial:` The folder is gone at the end, unless this process is killed, or with `keep` ends with an error. Then
    the next Partial of the same `key` takes over what is there.

    out: the name of the set. key: what the result depends on, ready for JSON. ValueError where another process writes the same set, and in
    place of every error of the system while it is written."""

    def __init__(self, out: str, key: dict[str, Any], keep: bool) -> None:
        self._out, self._key, self._keep = out, key, keep
        self.folder = out + ".partial"
        self.state: dict[str, Any] = {}  # what `mark` was given last, in this process or the one before
        self._files: dict[str, BinaryIO] = {}
        self._sizes: dict[str, int] = {}
        self._lock = -1
        self._marked = time.monotonic()

    def __enter__(self) -> Partial:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.folder)
            self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._lock_folder()
            try:
                self._take_over()
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            raise self._sentence(error) from error
        return self

    def _lock_folder(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(f"another process is writing {self._out}; wait for its end, or choose another name.") from None
        except OSError:
            pass  # a file system without locks

    def _take_over(self) -> None:
        """What an earlier process left is cut back to its last entry in the journal, or removed if it was to become something else."""
        try:
            with open(os.path.join(self.folder, _JOURNAL), encoding="ascii", opener=open_regular) as file:
                journal = json.load(file)
            usable = journal["key"] == self._key
            usable = usable and all(os.path.getsize(self.path(name)) >= size for name, size in journal["sizes"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            usable = False
        if usable:
            self.state, self._sizes = journal["state"], journal["sizes"]
        for name in os.listdir(self.folder):
            if name in self._sizes:
                os.truncate(self.path(name), self._sizes[name])
            elif not (usable and name == _JOURNAL):
                os.unlink(self.path(name))

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def size(self, name: str) -> int:
        """Bytes of a file that were taken over."""
        return self._sizes.get(name, 0)

    def open(self, name: str) -> BinaryIO:
        """A file to append to, behind what was taken over."""
        if name not in self._files:
            self._files[name] = open(self.path(name), "ab")  # noqa: SIM115
        return self._files[name]

    def close(self, name: str) -> None:
        """Of a file to which nothing will be added."""
        file = self._files.pop(name)
        file.flush()
        os.fsync(file.fileno())
        self._sizes[name] = file.tell()
        file.close()

    def mark(self, state: dict[str, Any]) -> None:
        """Everything written so far belongs to `state` (ready for JSON). Goes to the disk every two seconds at most."""
        if time.monotonic() - self._marked < SECONDS:
            return
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            self._sizes[name] = file.tell()
        new = self.path(_JOURNAL + ".new")
        with open(new, "w", encoding="ascii") as out:
            json.dump({"key": self._key, "state": state, "sizes": self._sizes}, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(new, self.path(_JOURNAL))
        self.state, self._marked = state, time.monotonic()

    def publish(self, names: dict[str, str]) -> None:
        """Gives the files, by their names in the folder, their own names, in that order."""
        for name in list(self._files):
            self.close(name)
        for name, final in names.items():
            os.replace(self.path(name), final)
        self._keep = False

    def discard(self) -> None:
        """Nothing of it is to be taken over."""
        self._keep = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        if kind is None or not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # which is about the program's own output
            raise self._sentence(error) from error

    def _sentence(self, error: OSError) -> ValueError:
        return ValueError(f"cannot write {self._out}: {error.strerror or error}; choose a folder with room that exists and may be written.")
