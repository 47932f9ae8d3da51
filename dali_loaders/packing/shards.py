"""A set as tar shards in WebDataset's naming: KEY.jpg, KEY.cls with the label, and KEY.json with the identity's name."""

from __future__ import annotations

import glob
import json
import os
import tarfile
from typing import BinaryIO

import numpy as np

from dali_loaders.account import ReadError
from dali_loaders.packing.images import extension
from dali_loaders.packing.partial import Partial

_RECORD = tarfile.RECORDSIZE  # a tar's length is a multiple of it


class Shards:
    """Writes into a folder of parts; `names` says what its files are called in the end: OUT-000.tar, OUT-001.tar, ... for OUT.tar."""

    def __init__(self, partial: Partial, out: str, packed: int, images: int, shard_size: int) -> None:
        """packed: images that are there already. images: at most so many will be there."""
        self._partial, self._packed, self._size = partial, packed, shard_size
        self._stem = os.path.splitext(out)[0]
        self._digits = max(3, len(str((images - 1) // shard_size)))
        self.names: dict[str, str] = {name: self._final(name) for name in map(self._name, range(-(-packed // shard_size)))}

    @property
    def opened_by(self) -> str:
        """What data.train is called with, once it is finished."""
        first, last = (f"{number:0{self._digits}}" for number in (0, len(self.names) - 1))
        return f"{self._stem}-{{{first}..{last}}}.tar" if len(self.names) > 1 else f"{self._stem}-{first}.tar"

    def write(self, label: int, identity: str, data: bytes) -> None:
        """ReadError, before anything is written, for what is no image: its name has to say which kind it is."""
        ending = extension(data)
        if ending is None:
            raise ReadError("no image by its content")
        shard, place = divmod(self._packed, self._size)
        name = self._name(shard)
        if place == 0 and shard:
            self._close(self._name(shard - 1))
        self.names[name] = self._final(name)
        file, key = self._partial.open(name), f"{self._packed:09d}"
        _add(file, key + ending, data)
        _add(file, key + ".cls", b"%d" % label)
        _add(file, key + ".json", json.dumps({"identity": identity}).encode())
        self._packed += 1

    def finish(self, counts: np.ndarray, identities: list[str]) -> None:
        """Closes the last shard. The names are in the shards already."""
        self._close(list(self.names)[-1])

    def _name(self, shard: int) -> str:
        return f"{shard:0{self._digits}}.tar"

    def _final(self, name: str) -> str:
        return f"{self._stem}-{name}"

    def _close(self, name: str) -> None:
        file = self._partial.open(name)
        end = 2 * tarfile.BLOCKSIZE
        file.write(bytes(end + -(file.tell() + end) % _RECORD))
        self._partial.close(name)


def check_no_others(out: str) -> None:
    """ValueError where shards of an earlier set have the same names, of which some could stay among the new ones."""
    earlier = sorted(glob.glob(glob.escape(os.path.splitext(out)[0]) + "-" + "[0-9]" * 3 + "*.tar"))
    if earlier:
        raise ValueError(f"{earlier[0]} exists already ({len(earlier)} such shards); remove them, or give the new set another name.")


def _add(file: BinaryIO, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)  # without time and owner: the same images make the same file
    entry.size = len(data)
    file.write(entry.tobuf(tarfile.USTAR_FORMAT))
    file.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
