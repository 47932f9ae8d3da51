"""Reads of a source, tried again where the machine is at fault: a hiccup of the network neither ends a run nor passes for a bad image."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from dali_loaders.account import StorageError as StorageError
from dali_loaders.sources import Source

T = TypeVar("T")

# A file that is gone, may not be opened or is no image is that file's own fault. These say nothing about it: what storage, network and
# limits of the process answer when they fail.
_NAMES = (
    *("EIO", "EREMOTEIO", "ESTALE", "ENODEV", "ENXIO", "EBUSY", "EAGAIN", "EINTR", "ENOMEM", "ENOBUFS", "EMFILE", "ENFILE"),
    *("ETIMEDOUT", "ETIME", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN", "ESHUTDOWN", "EPIPE"),
    *("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ECOMM", "EPROTO", "ENOLINK"),
)
_OF_THE_MACHINE = frozenset(getattr(errno, name) for name in _NAMES if hasattr(errno, name))
WAITS = (0.5, 2.0, 8.0)  # seconds before each further try

log = logging.getLogger(__name__)


def patiently(read: Callable[[], T], source: Source) -> T:
    """read() of `source`, tried again after faults of the machine. StorageError where they stay; any other error is raised as it is."""
    for wait in (*WAITS, None):
        try:
            return read()
        except (OSError, ValueError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError) or not is_of_the_machine(cause):
                raise
            if wait is None:
                raise StorageError(
                    f"{source.path} cannot be read: {cause.strerror or cause} ({cause.filename or 'in an open file'}), also after "
                    f"{len(WAITS)} further tries; that is no fault of an image, so none was left out: mend the storage, network or "
                    "limits of this machine and resume."
                ) from error
            log.warning("reading %s failed (%s); trying again in %g s", source.path, cause.strerror or cause, wait)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def is_of_the_machine(error: OSError) -> bool:
    return isinstance(error, (TimeoutError, ConnectionError)) or error.errno in _OF_THE_MACHINE
