"""What the records of a .rec are to a training set: images with labels, InsightFace's headers, or neither, which must be accounted for.

Its answer is a few flat arrays, so that a large set needs to be looked at once only (set_cache)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from dali_loaders.identities import identities_path, read_identities, stamp
from dali_loaders.recordio.headers import EMPTY, IMAGE, SHORT
from dali_loaders.recordio.index import Records, Runs, scan
from dali_loaders.recordio.records import RandomAccessFile

KIND = "recordio 2"  # of the arrays; another number for other ones
_EXACT = 1 << 24  # the first whole number that float32, the type of labels, may have rounded
WHY = {EMPTY: "no image in the record", SHORT: "too short for its header"}
MISSING = "announced by record 0, but not there"


def layout(file: RandomAccessFile) -> dict[str, Iterable[np.ndarray]]:
    """Images in the order of their keys:

    offsets int64 [N]; words uint32 [N], their length in the file in 4 bytes; labels int64 [N], in 0..C-1; originals int64 [C], what the
    records call these labels; key_firsts, key_counts int64, runs of consecutive keys. Of what is passed over: passed_keys int64,
    passed_why uint8 (see WHY); missing int64 [1], how many images record 0 announces beyond those that are there; and mark int64 [1], of
    the names that the set was packed with (identities.stamp), or 0.

    ValueError if .rec, .idx and identities file do not belong together, or labels are no identities."""
    packed = read_identities(file.path)
    labels: _Labels | _PackedLabels = _Labels(file.path) if packed is None else _PackedLabels(file.path, *packed)
    offsets: list[int | np.ndarray] = []
    words: list[np.ndarray] = []
    keys, others, records = Runs(), _Others(), 0
    for piece in scan(file):
        images = piece.headers.states == IMAGE
        # Records follow each other, as scan makes sure, so that where each is an image the first offset tells the others.
        offsets.append(int(piece.offsets[0]) if images.all() else piece.offsets[images])
        words.append((piece.headers.extents[images] // 4).astype(np.uint32))
        keys.add(piece.keys[images])
        labels.add(piece.keys[images], piece.headers.labels[images])
        others.add(piece, ~images)
        records += len(piece.keys)
    passed_keys, passed_why, missing = labels.without_image(others, keys, records)
    if not sum(map(len, words)):
        raise ValueError(f"{file.path} holds {records} records but no image; pack the images again.")
    originals, labels_n = _renumbered(labels.pieces)
    columns: dict[str, Iterable[np.ndarray]] = {"offsets": map(_offsets, offsets, words), "words": words, "labels": labels_n}
    key_firsts, key_counts = np.concatenate(keys.firsts), np.concatenate(keys.counts)
    if np.any(key_firsts[1:] < key_firsts[:-1] + key_counts[:-1]):
        columns, key_firsts, key_counts = _by_key(columns, key_firsts, key_counts)
    runs = {"key_firsts": [key_firsts], "key_counts": [key_counts]}
    passed = {"passed_keys": [passed_keys], "passed_why": [passed_why], "missing": [np.array([missing])], "mark": [np.array([others.mark])]}
    return {**columns, **runs, **passed, "originals": [originals]}


def _offsets(first: int | np.ndarray, words: np.ndarray) -> np.ndarray:
    """int64 [n], of the records of a piece."""
    return np.cumsum(np.concatenate([[first], 4 * words[:-1].astype(np.int64)])) if isinstance(first, int) else first


def _by_key(
    columns: dict[str, Iterable[np.ndarray]], firsts: np.ndarray, counts: np.ndarray
) -> tuple[dict[str, Iterable[np.ndarray]], np.ndarray, np.ndarray]:
    keys = np.repeat(firsts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    order = np.argsort(keys, kind="stable")
    runs = Runs()
    runs.add(keys[order])
    return {name: [np.concatenate(list(parts))[order]] for name, parts in columns.items()}, runs.firsts[0], runs.counts[0]


class _Others:
    """The records without an image, in the order of their keys once all are there."""

    def __init__(self) -> None:
        self._pieces: list[list[np.ndarray]] = []
        self.mark = 0  # id2 of record 0

    def add(self, piece: Records, chosen: np.ndarray) -> None:
        keys, headers = piece.keys, piece.headers
        pairs = (headers.states == EMPTY) & (headers.flags >= 2)
        columns = (keys, headers.states, pairs, headers.labels, headers.seconds, headers.ids == 0)
        self._pieces.append([column[chosen] for column in columns])
        zero = np.flatnonzero((keys == 0) & (headers.states == EMPTY))
        self.mark = int(headers.id2s[zero[0]]) if zero.size else self.mark

    def columns(self) -> list[np.ndarray]:
        """[n] each: keys int64, states uint8, whether there are two labels or more, the first two, float32, and whether the id is 0."""
        columns = [np.concatenate(parts) for parts in zip(*self._pieces, strict=True)]
        if np.any(np.diff(columns[0]) < 0):
            order = np.argsort(columns[0], kind="stable")
            columns = [column[order] for column in columns]
        return columns


class _Labels:
    """Labels as the records have them, and InsightFace's headers as record 0 announces them."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.pieces: list[np.ndarray] = []  # int32, image by image
        self._fault = ""

    def add(self, keys: np.ndarray, labels: np.ndarray) -> None:
        good = (labels >= 0) & (labels < _EXACT) & (labels == np.floor(labels))  # false for NaN
        if not good.all() and not self._fault:
            at = int(np.argmin(good))
            self._fault = f"record {keys[at]} has the label {labels[at]:.9g}"
        self.pieces.append(np.where(good, labels, 0).astype(np.int32))

    def without_image(self, others: _Others, images: Runs, records: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Keys and reasons of what is neither image nor header, and how many images are missing."""
        if self._fault:
            raise ValueError(
                f"{self._path}: {self._fault}, but an identity is a whole number from 0 to 2**24 - 1, which float32 keeps apart; "
                "put the .identities.txt beside it with which it was packed, or pack the images again."
            )
        keys, states, pairs, first, second, unnumbered = others.columns()
        headers, missing = np.zeros(len(keys), bool), 0
        with np.errstate(invalid="ignore", over="ignore"):
            sound = pairs & (first >= 1) & (second >= first) & (second < 1 << 40)
            begins = np.flatnonzero(sound & ((keys == 0) | (keys.astype(np.float32) == first - 1)))
        if begins.size:
            at = begins[0]
            start, end = int(first[at]), int(second[at])  # images have the keys up to `start`, headers of identities those up to `end`
            slack_start, slack_end = (int(np.spacing(number)) // 2 for number in (first[at], second[at]))  # above 2**24 they are rounded
            headers = pairs & (keys >= start - slack_start) & (keys < end + slack_end)
            headers[at] = True
            among = images.first_within(start + slack_start, end - slack_end)
            if among is not None:
                raise ValueError(
                    f"{self._path}: record {among} holds an image, but record {keys[at]} announces headers of identities from {start} to "
                    f"{end - 1}; pack the images again."
                )
            missing = max(0, start - 1 - slack_start - (records - int(headers.sum())))
            again = np.flatnonzero(pairs & ~headers & unnumbered)
            if again.size:
                raise ValueError(
                    f"{self._path}: record {keys[again[0]]} begins another set, whose labels would be taken for those of the first one; "
                    "keep the two sets in files of their own."
                )
        return keys[~headers], states[~headers].astype(np.uint8), missing


class _PackedLabels:
    """Labels by the identities file that `pack` wrote: record 0, then the images identity by identity, then a header for each."""

    def __init__(self, path: str, counts: np.ndarray, names: list[str]) -> None:
        self._path, self._names = path, names
        self._ends, self._images = np.cumsum(counts), int(counts.sum())
        self.pieces: list[np.ndarray] = []  # int32, image by image
        self._fault = ""

    def add(self, keys: np.ndarray, labels: np.ndarray) -> None:
        expected = np.searchsorted(self._ends, keys - 1, side="right").astype(np.int32)
        good = (keys >= 1) & (keys <= self._images) & (expected.astype(np.float32) == labels)
        if not good.all() and not self._fault:
            at = int(np.argmin(good))
            self._fault = f"record {keys[at]} has the label {labels[at]:.9g}, and another one there"
        self.pieces.append(expected)

    def without_image(self, others: _Others, images: Runs, records: int) -> tuple[np.ndarray, np.ndarray, int]:
        """As above. ValueError unless all records are as the identities file says, so that none is missing."""
        keys, states, pairs = others.columns()[:3]
        expected = 1 + self._images + len(self._names)
        if records != expected:
            self._fault = f"there are {records} records, and {expected} there"
        elif len(keys) and (keys[0] < 0 or keys[-1] >= expected) and not self._fault:
            self._fault = f"there is a record {keys[0] if keys[0] < 0 else keys[-1]}, and none there"
        elif not pairs[keys == 0].any() and not self._fault:
            self._fault = "record 0 is no header"
        elif others.mark not in (0, stamp(self._names)) and not self._fault:
            self._fault = "it was packed with other names"
        if self._fault:
            raise ValueError(
                f"{identities_path(self._path)} does not match {self._path}: {self._fault}; delete it (the labels in the records become "
                "the names), or pack the images again."
            )
        passed = (keys >= 1) & (keys <= self._images)
        return keys[passed], states[passed].astype(np.uint8), 0


def _renumbered(pieces: list[np.ndarray]) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """The labels there are, rising, int64 [C]; and for every image which of them it has, int64, in pieces."""
    present = np.zeros(1 + max(int(piece.max(initial=0)) for piece in pieces), bool)
    for piece in pieces:
        present[piece] = True
    place = np.cumsum(present) - 1
    return np.flatnonzero(present), (place[piece] for piece in pieces)
