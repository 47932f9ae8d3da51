"""An uncompressed tar, whose images are read at their places: folders of identities, or WebDataset's samples."""

from __future__ import annotations

import os

import numpy as np

from dali_loaders.account import ReadError, Unreadable
from dali_loaders.names import printable, text
from dali_loaders.recordio.records import RandomAccessFile
from dali_loaders.sources import by_name, meant
from dali_loaders.sources.tar_index import index_of, read_sparse
from dali_loaders.sources.tar_tree import IS_SPARSE


class TarSource:
    """The images that unpacking the tar would give, in the order of their names. Its headers are read once, and kept in a cache."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = RandomAccessFile(path)
        index = index_of(path)
        self.account, self.labels = index.account, index.labels
        if not len(self.labels):
            raise by_name.no_images(path, self.account, meant.guess(path))
        self.identities = [text(identity) for identity in index.identities]
        self._names, self._offsets, self._sizes = index.names, index.offsets, index.sizes

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        return read_member(self._file, int(self._offsets[index]), int(self._sizes[index]))

    def read_many(self, indices: np.ndarray) -> list[np.ndarray | Unreadable]:
        """Images `indices`, int64 [b], as uint8 views of one buffer. ChangedError as for `read`."""
        return read_members(self._file, self._offsets[indices], self._sizes[indices])

    def name(self, index: int) -> str:
        return f"{printable(os.path.basename(self.path))}:{printable(self._names[index])}"

    def order_checksum(self) -> int:
        """Of the names of the images, without the path of the set; the same as of the folder that it unpacks to."""
        return self._names.checksum()


def read_member(file: RandomAccessFile, offset: int, size: int) -> bytes:
    """An image at its place. ReadError, or ChangedError if the tar is no longer what it was when it was opened."""
    if file.has_changed():
        raise file.change()
    data = read_sparse(file.path, offset) if size == IS_SPARSE else file.read(size, offset)
    if len(data) < size:
        raise file.fault("cut off")
    return data


def read_members(file: RandomAccessFile, offsets: np.ndarray, sizes: np.ndarray) -> list[np.ndarray | Unreadable]:
    """Images at their places, each a view of one buffer; of Python's work each costs a slice and a system call."""
    if file.has_changed():
        raise file.change()
    ends = np.cumsum(np.maximum(sizes, 0))
    buffer = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    images: list[np.ndarray | Unreadable] = []
    start = 0
    for offset, size, end in zip(offsets.tolist(), sizes.tolist(), ends.tolist(), strict=True):
        part, start = buffer[start:end], end
        try:
            if size == IS_SPARSE:
                part = np.frombuffer(read_sparse(file.path, offset), np.uint8)
            elif file.read_into(part, offset) < size:
                raise file.fault("cut off")
            images.append(part)
        except ReadError as error:
            images.append(Unreadable(str(error)))
    return images
