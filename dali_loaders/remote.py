"""Remote addresses (s3://, gs://, https:// and whatever else fsspec opens): what stands there, and asking again after a failure."""

from __future__ import annotations

import hashlib
import logging
import random
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

TRIES = 4
_FIRST_WAIT = 0.5  # seconds, doubled from one try to the next
_LASTING = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    TypeError,
    ImportError,
)  # no other answer
# What tells one version of an object from the next, by the names that file systems give it.
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "Last-Modified", "LastModified", "last_modified", "modified", "mtime", "updated")

# Of an address: scheme (or what requests puts before a place without one), user and password, place, query. A password may hold what
# should stand after it ("/", "@"): then the address is wrong, and an error quotes it. A "?" without "=" is a pattern's.
_SCHEME, _WORD = r"[A-Za-z][A-Za-z0-9+.-]{0,30}://", r"(?:(?!,[A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s'\"])*"
_USER = r"(?:[^/?#\s'\"]*|[^/?#:\s'\"]*:(?!\d+(?:[/?#,]|$))(?:(?!://)[^\s'\"])*)@"
_SECRETS = re.compile(rf"({_SCHEME}|\burl: (?=/))({_USER})?({_WORD}?)([?#][^\s?#'\"=]*={_WORD})?(?=[\s'\"]|$|,{_SCHEME})")

T = TypeVar("T")
log = logging.getLogger(__name__)
_jitter = random.Random()  # one of its own: the module's state belongs to the user


class RemoteFile(NamedTuple):
    path: str  # as its file system calls it
    name: str  # below the address of the set
    size: int
    version: str


def is_remote(path: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.-]+)*://", path) is not None


def without_secrets(text: str) -> str:
    """The same text, in which addresses show neither user and password nor a query, which may be a signature. Whatever is printed, logged
    or saved of an address passes through here."""
    return _SECRETS.sub(lambda found: f"{found[1]}{'***@' if found[2] else ''}{found[3]}{'?***' if found[4] else ''}", text)


def connect(address: str) -> tuple[AbstractFileSystem, str]:
    """The file system of an address, and the path on it. ValueError where its package (s3fs, gcsfs) is not installed."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{without_secrets(address)} cannot be opened: {str(error).rstrip('.')}.") from error


def retried(action: Callable[[], T]) -> T:
    """action(), up to 4 times with growing pauses. What will not go away by itself, such as a file that is not there, is raised at once."""
    for attempt in range(1, TRIES):
        try:
            return action()
        except Exception as error:  # packages of storages raise their own kinds
            if lasting(error):
                raise
            pause = _FIRST_WAIT * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1.5)
            log.info("%s; try %d of %d follows in %.1f s", words(error), attempt + 1, TRIES, pause)
            time.sleep(pause)
    return action()


def lasting(error: BaseException) -> bool:
    """Whether another try would end in the same way. For HTTP, fsspec calls a server that cannot be reached a file that is not found."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None and not isinstance(cause, FileNotFoundError):
        status = getattr(cause, "status", None)
        return not (isinstance(cause, OSError) if status is None else status == 429 or status >= 500)
    return isinstance(error, _LASTING)


def words(error: BaseException) -> str:
    said = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
    more = isinstance(error, FileNotFoundError) and error.__cause__ is not None
    return without_secrets(f"{said}: {error.__cause__}" if more else said)


def described(folder: str, name: str, info: dict[str, Any]) -> RemoteFile:
    """From what a file system tells of an object."""
    if info.get("size") is None:
        raise ValueError(f"the size of {folder}{name} is unknown, so that a copy of it could not be checked; copy it by other means.")
    known = (info[key] for key in (*_VERSIONS, "created") if info.get(key) is not None)
    return RemoteFile(folder + name, name, int(info["size"]), str(next(known, "")))


def cache_name(address: str) -> str:
    """A folder's name for what comes from `address`: for people its last part, and a checksum of the whole."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "_", address.rstrip("/").rpartition("/")[2])
    return f"{last}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"
