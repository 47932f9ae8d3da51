"""What can break off a save: any call that changes a file system may fail, or be the last one of the process."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import ExitStack, contextmanager
from unittest import mock

CALLS = ("open", "write", "fsync", "mkdir", "rename", "remove", "unlink", "rmdir")


class KilledError(BaseException):
    """Stands for the end of the process: nothing catches it."""


@contextmanager
def watched(before):
    """before(name, arguments) is called ahead of every such call. `open` counts where it makes a file."""
    lock = threading.RLock()

    def watching(name, original):
        def call(*arguments, **options):
            if name != "open" or arguments[1] & os.O_CREAT:
                with lock:
                    before(name, arguments)
            return original(*arguments, **options)

        return call

    with ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(mock.patch.object(os, name, watching(name, getattr(os, name))))
        yield


@contextmanager
def breaking(number, error, names=CALLS, lasts=False):
    """The call of that number (from 0) raises what error() gives; with `lasts`, all later ones too. Yields a list with the names so far."""
    calls = []

    def before(name, _):
        if name in names:
            calls.append(name)
            if len(calls) - 1 == number or (lasts and len(calls) - 1 > number):
                raise error()

    with watched(before):
        yield calls


def full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken():
    return OSError(errno.EIO, os.strerror(errno.EIO))
