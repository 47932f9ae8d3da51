"""Checkpoints behind an address that fsspec opens, where one appears with its manifest."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from dali_loaders.extras import extra
from dali_loaders.remote import lasting, retried, without_secrets, words
from pipeline.checkpoint.store import MANIFEST, STEP, Sink, UnreachableError

T = TypeVar("T")


class RemoteStore:
    """Stores have no renames that are atomic, so a checkpoint is complete once its manifest is there. Files are sent as they are written.
    A read that fails is tried again (`retried`). Whatever a library raises in the end becomes an UnreachableError, but for what says that a
    file is not there: a store that gives no answer is never taken for one that has lost what was in it."""

    def __init__(self, path: str) -> None:
        with extra("train"):
            from fsspec.core import url_to_fs

        path = path if path.endswith("://") else path.rstrip("/")
        self.path = without_secrets(path)  # as it is called in messages
        try:
            self.system, self.root = url_to_fs(path, use_listings_cache=False)
        except Exception as error:  # ImportError names the package; others come from a library that connects at once
            raise ValueError(f"{self.path} cannot be opened ({without_secrets(str(error))})") from None

    def _asked(self, action: Callable[[], T]) -> T:
        with _as_os_error(self.path):
            return retried(action)

    def _at(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def names(self) -> list[str]:
        return [name for name in self._folders() if self.exists(name, MANIFEST)]

    def unfinished(self) -> list[str]:
        return [name for name in filter(STEP.fullmatch, self._folders()) if not self.exists(name, MANIFEST)]

    def _folders(self) -> list[str]:
        try:
            entries = self._asked(lambda: self.system.ls(self.root, detail=True))
        except FileNotFoundError:
            return []
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory"]

    def exists(self, name: str, file: str) -> bool:
        try:
            self._asked(lambda: self.system.info(self._at(name, file)))  # its `exists` answers no where there was no answer
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str, file: str) -> int:
        entry = self._asked(lambda: self.system.info(self._at(name, file)))
        if entry["type"] != "file":
            raise IsADirectoryError(f"{file} is not a file")
        return entry["size"]

    def read_into(self, name: str, file: str, offset: int, out: memoryview) -> None:
        if not len(out):
            return
        data = self._asked(lambda: self.system.cat_file(self._at(name, file), start=offset, end=offset + len(out)))
        if len(data) != len(out):
            raise EOFError(f"{file} ends early")
        out[:] = data

    def begin(self, name: str) -> None:
        with _as_os_error(self.path):
            self.system.makedirs(self.root, exist_ok=True)
        for left in filter(STEP.fullmatch, self._folders()):
            if self.exists(left, MANIFEST):
                if left == name:
                    raise FileExistsError(errno.EEXIST, f"there is a {name} already")
            else:
                try:
                    self.remove(left)
                except OSError:
                    if left == name:
                        raise

    def begin_beside(self, name: str) -> None:
        if name in self._folders():
            raise FileExistsError(errno.EEXIST, f"there is a {name} already")

    def create(self, name: str, file: str) -> Sink:
        with _as_os_error(self.path):
            self.system.makedirs(self._at(name), exist_ok=True)
            return _RemoteSink(self.system.open(self._at(name, file), "wb"), self.path)

    def commit(self, name: str) -> None:
        pass

    def abandon(self, name: str) -> None:
        with suppress(OSError):
            self.remove(name)

    def rename(self, name: str, new: str) -> None:
        with _as_os_error(self.path):
            self.system.mv(self._at(name), self._at(new), recursive=True)

    def remove(self, name: str) -> None:
        if self.exists(name, MANIFEST):  # first, so that one that is half removed is never taken for a checkpoint
            with _as_os_error(self.path):
                self.system.rm_file(self._at(name, MANIFEST))
        with _as_os_error(self.path), suppress(FileNotFoundError):
            self.system.rm(self._at(name), recursive=True)


class _RemoteSink:
    def __init__(self, file: Any, path: str) -> None:
        self.file, self.path = file, path

    def write(self, data: memoryview) -> None:
        with _as_os_error(self.path):
            self.file.write(data)

    def close(self) -> None:
        with _as_os_error(self.path):
            self.file.close()

    def discard(self) -> None:
        with suppress(Exception):
            self.file.close()


@contextmanager
def _as_os_error(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any library behind fsspec
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError) and lasting(error):
            raise
        raise UnreachableError(f"{path}: {words(error)}") from error
