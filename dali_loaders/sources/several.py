"""Several sets as one: their images one after another, the same identity name in two sets one class or two."""

from __future__ import annotations

import itertools
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dali_loaders.account import Account, Unreadable
from dali_loaders.names import printable
from dali_loaders.sources.fingerprint import order_checksum
from dali_loaders.sources.source import Part, Source, read_many


class SeveralSources:
    """The images of `sources` in their order. Memory beside theirs: 8 bytes per image, and the names of identities.

    names: of the sets, for messages and to tell identities apart
    weights: each set's share of the training stream, relative to the others'; none: by the number of images
    joined: an identity name in two sets is one identity; otherwise identities are called NAME OF THE SET/NAME
    ValueError for weights that do not fit.
    """

    def __init__(
        self, path: str, sources: Sequence[Source], names: Sequence[str], weights: Sequence[float] = (), joined: bool = False
    ) -> None:
        if weights and len(weights) != len(sources):
            raise ValueError(
                f"data.weights has {len(weights)} numbers, but data.train names {len(sources)} sets ({path}); give one for each."
            )
        self.path = path
        self._sources = list(sources)
        ends = np.cumsum([len(source) for source in sources]).tolist()
        bounds = list(zip(names, [0, *ends], ends, strict=False))
        self.parts = tuple(Part(*bound, weight) for bound, weight in zip(bounds, weights or [0.0] * len(sources), strict=True))
        self._starts = np.array([part.start for part in self.parts])
        self.labels = np.empty(ends[-1], np.int64)
        self.account = Account()
        label_of: dict[str, int] = {}
        shared: set[str] = set()
        for part, source in zip(self.parts, sources, strict=True):
            own = source.identities if joined else [f"{part.name}/{name}" for name in source.identities]
            shared.update(name for name in own if name in label_of)
            new_labels = np.array([label_of.setdefault(name, len(label_of)) for name in own], np.int64)
            np.take(new_labels, source.labels, out=self.labels[part.start : part.stop], mode="clip")  # other modes copy
            self.account.add(_named(source.account, part.name))
        assert joined or not shared
        self.identities = list(label_of)
        self.remarks = list(_remarks(self.parts))
        if joined:
            numbers = ", found by their numbers: right only if the sets number the same people" if all(map(str.isdigit, shared)) else ""
            self.remarks.append(f"{len(shared)} of {len(self.identities)} identities are in more than one set" + numbers * bool(shared))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        number, own = self._place(index)
        return self._sources[number].read(own)

    def read_many(self, indices: np.ndarray) -> list[bytes | np.ndarray | Unreadable]:
        """As `source.read_many`, one call for each set."""
        sets = np.searchsorted(self._starts, indices, side="right") - 1
        found: list[bytes | np.ndarray | Unreadable] = [b""] * len(indices)
        for number in np.unique(sets).tolist():
            places = np.flatnonzero(sets == number)
            own = read_many(self._sources[number], indices[places] - self._starts[number])
            for place, data in zip(places.tolist(), own, strict=True):
                found[place] = data
        return found

    def name(self, index: int) -> str:
        """That of the set, with the path of its folder: two sets may be called train.rec."""
        number, own = self._place(index)
        source = self._sources[number]
        name, folder = source.name(own), printable(os.path.dirname(source.path))
        return os.path.join(folder, name) if folder and not name.startswith(folder + "/") else name

    def order_checksum(self) -> int:
        """Of those of the sets, in their order (fingerprint.py)."""
        return zlib.crc32(repr([order_checksum(source) for source in self._sources]).encode())

    def _place(self, index: int) -> tuple[int, int]:
        """The set that image `index` is in, and the image's number there."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - int(self._starts[number])


def _remarks(parts: Sequence[Part]) -> Iterator[str]:
    """A line for each set of several."""
    total = sum(part.weight for part in parts)
    for part in parts:
        share = f", {part.weight / total:.1%} of the stream" if total else ""
        yield f"{part.name}: {part.stop - part.start} images{share}"


def split_paths(text: str) -> list[str]:
    """The paths between commas. A comma within braces does not separate, nor one within a path that exists, unless what stands before
    it exists too.

    ValueError where there is nothing between two commas."""
    if os.path.lexists(text):
        return [text]
    pieces, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth = max(0, depth + (letter == "{") - (letter == "}"))
        if letter == "," and not depth:
            pieces.append(text[start:place])
            start = place + 1
    pieces.append(text[start:])
    paths = []
    while pieces:
        count = next((count for count in range(1, len(pieces) + 1) if os.path.lexists(",".join(pieces[:count]))), 1)
        path = ",".join(pieces[:count])
        paths.append(path if os.path.lexists(path) else path.strip())
        del pieces[:count]
    if "" in paths and len(paths) > 1:
        raise ValueError(f"{text!r} has nothing before, between or after its commas; data sets are separated by one comma each.")
    return paths


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths, equally many folders each, that tell them apart: x/lfw.bin and y/lfw.bin become x/lfw and y/lfw.
    Extensions stay only where they make the difference. ValueError if two paths lead to one place."""
    places = [os.path.realpath(path) for path in paths]
    for (first, one), (second, other) in itertools.pairwise(sorted((f"{place}/", path) for place, path in zip(places, paths, strict=True))):
        if second.startswith(first):
            raise ValueError(f"{one} and {other} are the same data, or one is within the other; name each data set once.")
    whole = [os.path.abspath(path) for path in paths]
    for candidates in ([re.sub(r"\.(rec|tar|parquet)$", "", path, flags=re.IGNORECASE) for path in whole], whole, places):
        parts = [path.split(os.sep) for path in candidates]
        for depth in range(1, max(map(len, parts)) + 1):
            names = ["/".join(part[-depth:]) for part in parts]
            if len(set(names)) == len(names):
                return names
    raise AssertionError("different real paths differ")


def _named(account: Account, name: str) -> Account:
    """The account with the set's name before the names of its examples."""
    passed_over = {
        reason: replace(passed, examples=[f"{name}: {example}" for example in passed.examples])
        for reason, passed in account.passed_over.items()
    }
    return replace(account, passed_over=passed_over)
