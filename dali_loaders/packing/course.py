"""The course of a pack: image by image in the order of labels, with what was left out; and what a pack that is resumed must agree on."""

from __future__ import annotations

import json
import os
import zlib
from contextlib import closing
from functools import cached_property

import numpy as np

from dali_loaders.account import Account, ReadError, Unreadable
from dali_loaders.config import TIMEOUT
from dali_loaders.identities import checksum
from dali_loaders.names import printable
from dali_loaders.packing.images import Images
from dali_loaders.packing.partial import Partial
from dali_loaders.packing.reading import in_order
from dali_loaders.packing.record_file import RecordFile
from dali_loaders.packing.shards import Shards
from dali_loaders.progress import progress
from dali_loaders.readers import Readers
from dali_loaders.sources import Source
from dali_loaders.sources.patterns import expand, is_pattern
from dali_loaders.sources.several import split_paths
from dali_loaders.waiting import waiting

_LEFT_OUT = "left_out.jsonl"  # in the folder of parts: lines [number of an image, reason]


class Course:
    """The first `done` images of the order are packed, but for those in `left_out` (number of the image -> reason)."""

    def __init__(self, source: Source, partial: Partial) -> None:
        self._source, self._partial = source, partial
        self._order = np.argsort(source.labels, kind="stable")
        self.done: int = partial.state.get("done", 0)
        self.left_out: dict[int, str] = {}
        if partial.size(_LEFT_OUT):
            with open(partial.path(_LEFT_OUT), encoding="ascii") as file:
                self.left_out = dict(json.loads(line) for line in file)
        self._lines = partial.open(_LEFT_OUT)
        self._counts = np.bincount(source.labels[self.kept()], minlength=len(source.identities))
        self._label = int(np.count_nonzero(self._counts)) - 1  # of the identity that is being packed

    @property
    def packed(self) -> int:
        return self.done - len(self.left_out)

    def kept(self) -> np.ndarray:
        """Numbers of the images that are packed, in the order in which they are."""
        done = self._order[: self.done]
        return done[~np.isin(done, list(self.left_out))] if self.left_out else done

    def run(self, writer: RecordFile | Shards, images: Images, workers: int, timeout: float) -> None:
        """Packs the rest. ValueError if in the end there is no image at all."""
        remaining = self._order[self.done :]
        with progress("packing", len(self._order)) as shown, closing(in_order(images, remaining, workers, timeout)) as results:
            shown.add(self.done)
            for index, data in zip(map(int, remaining), results, strict=True):
                try:
                    self._write(writer, index, data)
                except ReadError as error:
                    self.left_out[index] = str(error)
                    self._lines.write(json.dumps([index, str(error)]).encode() + b"\n")
                self.done += 1
                self._partial.mark({"done": self.done})
                shown.add()
        if not self.packed:
            first = next(iter(self.left_out.values()))
            raise ValueError(f"{self._source.path}: none of its {self.done} images can be packed; the first: {first}.")

    def _write(self, writer: RecordFile | Shards, index: int, data: bytes | ReadError) -> None:
        if isinstance(data, ReadError):
            raise data
        label = int(self._source.labels[index])
        new = self._label + (not self._counts[label])
        writer.write(new, self._source.identities[label], data)
        self._counts[label] += 1
        self._label = new

    @cached_property
    def identities(self) -> tuple[np.ndarray, list[str]]:
        """Images of each packed identity, int64 [C], and its name, in the order of the new labels. Asked for at the end."""
        kept = np.flatnonzero(self._counts)
        return self._counts[kept], [self._source.identities[label] for label in kept.tolist()]

    def lost(self) -> list[str]:
        """Identities of which no image is packed."""
        had = np.bincount(self._source.labels, minlength=len(self._counts)) > 0
        return [self._source.identities[label] for label in np.flatnonzero(had & (self._counts == 0))]

    def account(self) -> Account:
        account = Account()
        account.use(self.packed)
        for index, reason in sorted(self.left_out.items()):
            account.pass_over(reason, self._source.name(index))
        return account

    def write_list(self, path: str) -> None:
        """Lines name<tab>reason of what was left out."""
        with open(path, "w", encoding="utf-8") as file:
            for index, reason in sorted(self.left_out.items()):
                file.write(f"{printable(self._source.name(index))}\t{printable(reason)}\n")


def key(source: Source, options: dict[str, object], *files: str) -> dict[str, object]:
    """What a pack and the one that goes on from it must agree on: the source's names, labels, sizes and times of change, and the options.
    files: others that the result depends on. Where the source's files are not known, nothing agrees with it."""
    digest = zlib.crc32(source.labels.tobytes())
    for index in range(len(source)):
        digest = zlib.crc32(source.name(index).encode(errors="surrogateescape"), digest)
    paths = paths_of(source)
    if any(map(os.path.isdir, paths)):
        paths = [source.name(index) for index in range(len(source))]
    states = _states([*paths, *files])
    digest = zlib.crc32(repr(states).encode(), digest)
    where = {"source": os.path.abspath(source.path), "images": len(source), "identities": checksum(source.identities)}
    return {"format": 1, **where, "files": os.urandom(8).hex() if None in states else digest, **options}


def paths_of(source: Source) -> list[str]:
    """The files and folders that a set's path stands for."""
    return [path for part in split_paths(source.path) for path in (expand(part) if is_pattern(part) else [part])]


def _states(paths: list[str]) -> list[tuple[int, int] | None]:
    """By several threads, since a file system over a network answers several questions at once."""
    readers: Readers[tuple[int, int] | None] = Readers(
        lambda places: (_state(paths[place]) for place in places), paths[0], lambda place: printable(paths[place]), 8, TIMEOUT
    )
    with closing(readers), waiting(lambda: f"times of change: {readers.doing()}"):
        parts = [readers.submit(range(start, min(start + 64, len(paths)))) for start in range(0, len(paths), 64)]
        states = [state for part in parts for state in readers.result(part)]
    return [None if isinstance(state, Unreadable) else state for state in states]


def _state(path: str) -> tuple[int, int] | None:
    """Size and time of change; None for what cannot be found by this name (other forms of sets, names that are no UTF-8)."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
