"""Tar shards as one set: of WebDataset's samples (KEY.jpg beside KEY.cls or KEY.json), or of identity folders, which are joined by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dali_loaders.account import Account, ChangedError, ReadError, Unreadable
from dali_loaders.names import printable, text
from dali_loaders.recordio.records import RandomAccessFile
from dali_loaders.sources import by_name, samples
from dali_loaders.sources.source import Source
from dali_loaders.sources.tar import TarSource, read_member, read_members
from dali_loaders.sources.tar_index import TarIndex, index_of

_OPEN = 256  # files of a process at once; many systems allow 1,024


def open_tars(paths: Sequence[str], shown_as: str) -> Source:
    """One tar, or several as one set that messages call `shown_as`. ValueError for whatever holds no labelled images."""
    if len(paths) == 1:
        return TarSource(paths[0])
    return ShardedTarSource(paths, shown_as)


class ShardedTarSource:
    """The images of several tars, one tar after another. Labels are those of the joined identities, in order."""

    def __init__(self, paths: Sequence[str], path: str = "") -> None:
        self.path = path or paths[0]
        _check_distinct(self.path, paths)
        self._shards = [(shard, _state(shard)) for shard in paths]
        indices = [index_of(shard) for shard in paths]
        self.account = Account()
        for shard, index in zip(paths, indices, strict=True):
            self.account.add(index.account)
            if not len(index.labels):
                self.account.pass_over("shard without an image", printable(shard))
        if not self.account.used:
            raise by_name.no_images(self.path, self.account, "")
        self.labels, identities = _joined(self.path, paths, indices)
        self.identities = [text(identity) for identity in identities]
        self._names = [index.names for index in indices]
        self._places = [(index.offsets, index.sizes) for index in indices]
        self._ends = np.cumsum([len(index.labels) for index in indices])
        self._folder = os.path.commonpath([os.path.dirname(os.path.abspath(shard)) for shard in paths])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        shard, at = self._place(index)
        offsets, sizes = self._places[shard]
        return read_member(self._file(shard), int(offsets[at]), int(sizes[at]))

    def read_many(self, indices: np.ndarray) -> list[np.ndarray | Unreadable]:
        """As TarSource has it; each tar of which there are images is read once."""
        shards = np.searchsorted(self._ends, indices, side="right")
        images: list[np.ndarray | Unreadable] = [Unreadable("not read")] * len(indices)
        for shard in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == shard)
            at = indices[chosen] - (self._ends[shard - 1] if shard else 0)
            offsets, sizes = self._places[shard]
            try:
                found = read_members(self._file(shard), offsets[at], sizes[at])
            except ReadError as error:
                found = [Unreadable(str(error))] * len(at)
            for place, image in zip(chosen.tolist(), found, strict=True):
                images[place] = image
        return images

    def name(self, index: int) -> str:
        shard, at = self._place(index)
        tar = os.path.relpath(os.path.abspath(self._shards[shard][0]), self._folder)
        return f"{printable(tar)}:{printable(self._names[shard][at])}"

    def order_checksum(self) -> int:
        """Of the names of the images, shard by shard, without those of the shards."""
        value = 0
        for names in self._names:
            value = names.checksum(value)
        return value

    def _file(self, shard: int) -> RandomAccessFile:
        """ReadError where it can no longer be opened, ChangedError where it is another one."""
        try:
            return _opened(*self._shards[shard])
        except ChangedError:
            raise
        except ValueError as error:
            raise ReadError(f"its tar cannot be opened: {error.__cause__ or error}") from error

    def _place(self, index: int) -> tuple[int, int]:
        """Shard of an image, and its place there."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)


def _joined(path: str, paths: Sequence[str], indices: Sequence[TarIndex]) -> tuple[np.ndarray, list[bytes]]:
    """Labels of all images, and the identities of all shards."""
    forms = {index.has_samples: shard for shard, index in zip(paths, indices, strict=True) if len(index.labels)}
    if len(forms) > 1:
        raise ValueError(
            f"{path} mixes two forms: {forms[True]} has labels in .cls or .json members, {forms[False]} has a folder per identity; "
            "give them as two sets."
        )
    union = {identity for index in indices for identity in index.identities}
    identities = samples.in_order(union) if True in forms else sorted(union)
    label_of = {identity: label for label, identity in enumerate(identities)}
    parts = [np.array([label_of[identity] for identity in index.identities], np.int64)[index.labels] for index in indices]
    return np.concatenate(parts), identities


def _check_distinct(path: str, paths: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for shard in paths:
        real = os.path.realpath(shard)
        if real in seen:
            raise ValueError(f"{path} names the same tar twice, as {seen[real]} and as {shard}; name it once.")
        seen[real] = shard


def _state(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"cannot open {path}: {error.strerror}; check the path and its permissions.") from error
    return status.st_size, status.st_mtime_ns


@lru_cache(_OPEN)
def _opened(path: str, state: tuple[int, int]) -> RandomAccessFile:
    return RandomAccessFile(path, state)
