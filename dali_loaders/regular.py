"""Opening what is to be read, if it is a file: whoever opens a named pipe waits for its writer, and a device may never come to an end."""

from __future__ import annotations

import errno
import os
import stat

LARGEST = 1 << 29  # bytes of an image, as in RecordIO; a sparse file may claim any number of them
_KINDS = {
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFDIR: "folder",
}
_OF_OTHERS = (errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP)  # what sockets, and devices without a driver, answer to an open


def open_regular(path: str | bytes, flags: int = os.O_RDONLY) -> int:
    """Descriptor of a regular file; also for `open(path, mode, opener=open_regular)`. OSError for all else: "is a named pipe, not a file".

    Nothing is waited for or read before it is known what was opened, and nothing else can take its place afterwards."""
    return _opened(path, flags)[0]


def read_regular(path: str | bytes, most: int = -1) -> bytes:
    """The contents of a regular file, or its first `most` bytes. OSError as for open_regular, and for more than LARGEST bytes."""
    descriptor, size = _opened(path, os.O_RDONLY)
    try:
        if most >= 0:
            return os.read(descriptor, most)
        if size > LARGEST:
            raise OSError(errno.EFBIG, f"is larger than {LARGEST >> 20} MiB", path)
        data = os.read(descriptor, size + 1)
        while len(data) <= LARGEST and (more := os.read(descriptor, 1 << 16)):  # the file has grown, or comes in pieces
            data += more
        return data
    finally:
        os.close(descriptor)


def _opened(path: str | bytes, flags: int) -> tuple[int, int]:
    """Descriptor and size."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in _OF_OTHERS:
            _check(os.stat(path).st_mode, path)
        raise
    try:
        status = os.fstat(descriptor)
        _check(status.st_mode, path)
        os.set_blocking(descriptor, True)  # some file systems would not wait for a file that they have on tape
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def _check(mode: int, path: str | bytes) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"is a {_KINDS.get(stat.S_IFMT(mode), 'strange thing')}, not a file", path)
