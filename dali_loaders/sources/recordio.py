"""RecordIO files as a source."""

from __future__ import annotations

import glob
import logging
import os
import zlib

import numpy as np

from dali_loaders.account import EXAMPLES, Account, ReadError, Unreadable
from dali_loaders.identities import identities_path, is_stamp, read_identities
from dali_loaders.names import printable
from dali_loaders.recordio.headers import EMPTY, HEADER_BYTES, IMAGE, WORDS, parse
from dali_loaders.recordio.index import write_missing_index
from dali_loaders.recordio.layout import KIND, MISSING, WHY, layout
from dali_loaders.recordio.mxnet_reader import MXNetReader
from dali_loaders.recordio.records import RandomAccessFile, index_path, read_record, unpack_record
from dali_loaders.regular import open_regular
from dali_loaders.set_cache import cached

log = logging.getLogger(__name__)


def find_record(folder: str) -> str | None:
    """The .rec of a folder as InsightFace ships it (train.rec, train.idx, property), or the only one there; None if there is none, or
    several."""
    train = os.path.join(folder, "train.rec")
    found = [train] if os.path.isfile(train) else glob.glob(os.path.join(glob.escape(folder), "*.rec"))
    return found[0] if len(found) == 1 else None


class RecordSource:
    """The images of a .rec in the order of their keys. Headers of the set and of its identities are left out; records that hold no image
    are passed over, with a reason in `account`.

    Labels that are not 0..C-1 are renumbered in rising order. Identity names are the original labels, or those of the .identities.txt that
    `pack` writes. Reading raises ChangedError where a record no longer has the label that it had when the set was opened."""

    def __init__(self, path: str, reader: str = "native") -> None:
        self.path = path
        self._file = RandomAccessFile(path)
        write_missing_index(self._file)
        self._mxnet = MXNetReader(path) if reader == "mxnet" else None
        arrays = cached(path, [path, index_path(path), identities_path(path)], KIND, lambda: layout(self._file))
        self.labels: np.ndarray = arrays["labels"]
        self._offsets, self._words, self._originals = arrays["offsets"], arrays["words"], arrays["originals"]
        self._key_firsts, self._key_ends = arrays["key_firsts"], np.cumsum(arrays["key_counts"])
        self.identities = self._names()
        self.account = _account(path, arrays)
        if is_stamp(int(arrays["mark"][0])) and not os.path.exists(identities_path(path)):
            log.warning("%s was packed with names of identities, but %s is missing: numbers are the names", path, identities_path(path))
        _compare_with_property(path, len(self.identities))

    def _names(self) -> list[str]:
        packed = read_identities(self.path)
        if packed is None:
            return list(map(str, self._originals.tolist()))
        if len(self._originals) == len(packed[1]):
            return packed[1]
        return [packed[1][original] for original in self._originals.tolist()]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{printable(os.path.basename(self.path))}:record {self._key(index)}"

    def _key(self, index: int) -> int:
        run = int(np.searchsorted(self._key_ends, index, side="right"))
        return int(self._key_firsts[run]) + index - (int(self._key_ends[run - 1]) if run else 0)

    def order_checksum(self) -> int:
        """Of the keys of all images in their order."""
        return zlib.crc32(np.stack([self._key_firsts, self._key_ends]).astype("<i8", copy=False).data)

    def read(self, index: int) -> bytes:
        """ReadError where the record is damaged, ChangedError where it is another one than when the set was opened."""
        if self._mxnet is not None:
            record = self._mxnet.read(self._key(index))
        else:
            record, end = read_record(self._file, int(self._offsets[index]))
            if end - int(self._offsets[index]) != 4 * int(self._words[index]):
                raise self._file.fault("another length")
        try:
            header, image = unpack_record(record)
        except ReadError as error:
            raise self._file.fault(str(error)) from error
        label, expected = np.float32(np.ravel(header.label)[0]), np.float32(self._originals[self.labels[index]])
        if label != expected:
            raise self._file.change(f"{self.name(index)} had the label {expected:.9g} and has {label:.9g}")
        if not image:
            raise self._file.fault(WHY[EMPTY])
        return image

    def read_many(self, indices: np.ndarray) -> list[np.ndarray | Unreadable]:
        """Images `indices`, int64 [b], as uint8 views of one buffer; of Python's work each costs a slice and, unless the one before it is
        its neighbour in the file, a system call. ChangedError as for `read`."""
        if self._mxnet is not None or not len(indices):
            return [self._read_one(index) for index in indices.tolist()]
        order = np.argsort(self._offsets[indices], kind="stable")
        chosen = indices[order]
        offsets, sizes = self._offsets[chosen], 4 * self._words[chosen].astype(np.int64)
        buffer, places = self._gather(offsets, sizes)
        headers, plain = parse(np.lib.stride_tricks.sliding_window_view(buffer.view(np.uint32), WORDS)[places // 4])
        as_expected = headers.labels == self._originals[self.labels[chosen]].astype(np.float32)
        good = plain & (headers.extents == sizes) & (headers.states == IMAGE) & as_expected
        starts = places + 8 + HEADER_BYTES + 4 * headers.flags.astype(np.int64)
        images: list[np.ndarray | Unreadable] = [_NONE] * len(indices)
        for at, start, end in zip(order.tolist(), starts.tolist(), (places + 8 + headers.lengths).tolist(), strict=True):
            images[at] = buffer[start:end]
        for at in order[~good].tolist():  # of several parts, or none that can be read
            images[at] = self._read_one(int(indices[at]))
        return images

    def _gather(self, offsets: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bytes at rising `offsets`, uint8, one after the other, and where each begins; zeros for what cannot be read."""
        ends = np.cumsum(sizes)
        buffer = np.empty(int(ends[-1]) + 4 * WORDS, np.uint8)
        buffer[ends[-1] :] = 0
        run_starts = np.flatnonzero(np.diff(offsets, prepend=-1) != np.concatenate([[0], sizes[:-1]]))
        run_ends = np.append(ends[run_starts[1:] - 1], ends[-1])
        begins = ends[run_starts] - sizes[run_starts]
        for begin, end, offset in zip(begins.tolist(), run_ends.tolist(), offsets[run_starts].tolist(), strict=True):
            part = buffer[begin:end]
            try:
                read = self._file.read_into(part, offset)
            except ReadError:
                read = 0
            if read < end - begin:
                part[read:] = 0
        return buffer, ends - sizes

    def _read_one(self, index: int) -> np.ndarray | Unreadable:
        try:
            return np.frombuffer(self.read(index), np.uint8)
        except ReadError as error:
            return Unreadable(str(error))


_NONE = Unreadable("not read")


def _account(path: str, arrays: dict[str, np.ndarray]) -> Account:
    name, account = os.path.basename(path), Account()
    account.use(len(arrays["labels"]))
    for state, why in WHY.items():
        keys = arrays["passed_keys"][arrays["passed_why"] == state]
        for key in keys[:EXAMPLES].tolist():
            account.pass_over(why, f"{name}:record {key}")
        if len(keys) > EXAMPLES:
            account.pass_over(why, "", len(keys) - EXAMPLES)
    if arrays["missing"][0]:
        account.pass_over(MISSING, name, int(arrays["missing"][0]))
    return account


def _compare_with_property(path: str, identities: int) -> None:
    """InsightFace's file `property` beside train.rec says: identities, height, width."""
    file_path = os.path.join(os.path.dirname(path), "property")
    if os.path.basename(path) != "train.rec" or not os.path.isfile(file_path):
        return
    try:
        with open(file_path, encoding="ascii", opener=open_regular) as file:
            announced = int(file.read(100).split(",")[0])
    except (OSError, ValueError):
        log.warning("%s cannot be read, and is not needed: expected 'identities,height,width'", file_path)
        return
    if announced != identities:
        log.warning("%s announces %d identities, but %s has images of %d", file_path, announced, path, identities)
