"""Many names in little memory, and names of any bytes as text: that which stands for them, and that which people read."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np


class Names(Sequence[bytes]):
    """N names as one string of bytes and N + 1 places in it; both may be mapped files. 1,000,000 names of 20 bytes take 28 MB."""

    def __init__(self, blob: np.ndarray, starts: np.ndarray) -> None:
        self.blob = blob  # uint8
        self.starts = starts  # int64 [N + 1]

    @classmethod
    def of(cls, names: Sequence[bytes]) -> Names:
        starts = np.zeros(len(names) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, names), np.int64, len(names)), out=starts[1:])
        return cls(np.frombuffer(b"".join(names), np.uint8), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]  # a slice of names is not needed
        return self.blob[self.starts[index] : self.starts[index + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        blob, starts = self.blob.tobytes(), self.starts.tolist()
        return (blob[start:end] for start, end in pairwise(starts))

    def checksum(self, value: int = 0) -> int:
        """CRC-32 of all names in their order, going on from that of others."""
        lengths = np.diff(self.starts).astype("<i8")
        return zlib.crc32(lengths.data, zlib.crc32(np.ascontiguousarray(self.blob).data, value))


def text(name: bytes) -> str:
    """A file's name as a string, the same whatever the locale: bytes that are no UTF-8 become lone surrogates (PEP 383)."""
    return name.decode("utf-8", "surrogateescape")


def quoted(path: str) -> str:
    """A path in a sentence, which would not end where it does if it has spaces."""
    return f"'{printable(path)}'" if any(map(str.isspace, path)) else printable(path)


def printable(name: str | bytes) -> str:
    """The same name for people, on one line and in valid UTF-8: bytes that are no UTF-8 and control characters are escaped.

    Whatever prints, logs or lists a name of a file or an identity passes it through here, for a lone surrogate cannot be written."""
    if isinstance(name, bytes):
        data = name
    else:
        try:
            data = name.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # lone surrogates that stand for no byte, as JSON may have
            data = name.encode("utf-8", "backslashreplace")
    shown = data.decode("utf-8", "backslashreplace")
    return shown if shown.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
