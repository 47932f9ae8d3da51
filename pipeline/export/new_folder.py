"""A folder or file that is there whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from dali_loaders.names import printable
from dali_loaders.outputs import check_folder
from dali_loaders.remote import is_remote, without_secrets


@contextmanager
def new_folder(path: str) -> Iterator[str]:
    """An empty folder to write to, which gets the name `path` once all is written. Whatever breaks this off leaves nothing at `path`; a
    kill leaves PATH.partial-XXXX, which may be removed. ValueError if something is at `path`, or no folder can be made there."""
    refuse_remote(path)
    check_folder(path, "OUT")
    path = os.path.abspath(path)
    check_new(path)
    parent, name = os.path.split(path)
    try:
        os.makedirs(parent, exist_ok=True)
        partial = tempfile.mkdtemp(prefix=f"{name}.partial-", dir=parent)
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be written: {error.strerror or error}") from error
    try:
        yield partial
        mask = _umask()
        os.chmod(partial, 0o777 & ~mask)  # mkdtemp keeps others out, and so does safetensors
        for file in os.listdir(partial):
            os.chmod(os.path.join(partial, file), 0o666 & ~mask)
            sync(os.path.join(partial, file))
        sync(partial)
        check_new(path)
        os.rename(partial, path)
        sync(parent)
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(partial)  # renamed, it is no more


@contextmanager
def new_file(path: str) -> Iterator[TextIO]:
    """A text file to write to, which gets the name `path` once all is written. ValueError as for a folder."""
    check_new(path)
    partial = f"{path}.partial-{os.getpid()}"
    try:
        with open(partial, "x", encoding="utf-8", newline="") as file:
            yield file
        sync(partial)
        check_new(path)
        os.rename(partial, path)
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            os.remove(partial)


def check_new(path: str) -> None:
    if os.path.lexists(path):
        raise ValueError(f"{printable(path)} exists already, and nothing is overwritten: choose another name, or remove it")


def refuse_remote(path: str) -> None:
    """ValueError for an address, which would become a folder called "s3:"."""
    if is_remote(path):
        raise ValueError(
            f"{without_secrets(path)} is an address, but models and embeddings are written to this machine: name a path, then copy"
        )


def sync(path: str) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError:  # file systems of which folders cannot be synced
        if not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    before = os.umask(0o077)
    os.umask(before)
    return before
