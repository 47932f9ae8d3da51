"""A set as one RecordIO file in InsightFace's layout, with the names of its identities in a text file beside it.

Record 0 holds [N + 1, N + 1 + C], and a checksum of the names where other readers do not look; records 1..N the images, identity by
identity; records N + 1.. one [first, last) range per identity."""

from __future__ import annotations

import logging

import numpy as np

from dali_loaders.account import ReadError
from dali_loaders.identities import identities_path, stamp, write_identities
from dali_loaders.packing.partial import Partial
from dali_loaders.recordio.records import IRHeader, encode_record, index_path, pack_record

RECORDS, INDEX, NAMES = "set.rec", "set.idx", "set.identities.txt"
_EXACT = 1 << 24  # float32, the type of labels in RecordIO, counts exactly up to here
_LONGEST = (1 << 29) - 64  # of an image, so that it and its header fit into one record

log = logging.getLogger(__name__)


class RecordFile:
    """Writes into a folder of parts; `names` says what its files are called in the end.

    MXNet and arcface_torch read .rec and .idx; the identities file keeps names, and labels beyond 2^24, exact."""

    def __init__(self, partial: Partial, out: str, packed: int) -> None:
        """packed: images that are there already."""
        self._partial, self._key = partial, packed + 1
        self._records, self._index = partial.open(RECORDS), partial.open(INDEX)
        self._offset = partial.size(RECORDS)
        self.opened_by = out
        self.names = {NAMES: identities_path(out), INDEX: index_path(out), RECORDS: out}  # without the last nothing can be opened
        if not self._offset:
            self._write(0, _of_set(0, 0, 0))  # overwritten at the end, when the numbers are known

    def write(self, label: int, identity: str, data: bytes) -> None:
        """ReadError, before anything is written, where the format has no place for the image."""
        if len(data) > _LONGEST:
            raise ReadError("larger than 512 MiB, the most that one record holds")
        self._write(self._key, pack_record(IRHeader(0, float(label), self._key, 0), data))
        self._key += 1

    def finish(self, counts: np.ndarray, identities: list[str]) -> None:
        """counts: int64 [C], images of each identity, in the order in which they were written."""
        images = self._key - 1
        if images + 1 + len(counts) > _EXACT:
            log.warning(
                "%s has more than 2**24 records, whose numbers other readers round; keep its .identities.txt beside it", self.names[RECORDS]
            )
        last = 1 + np.cumsum(counts)
        for label, (first, end) in enumerate(zip((last - counts).tolist(), last.tolist(), strict=True)):
            key = images + 1 + label
            self._write(key, pack_record(IRHeader(2, np.array([first, end]), key, 0), b""))
        for name in (RECORDS, INDEX):
            self._partial.close(name)
        with open(self._partial.path(RECORDS), "r+b") as file:
            file.write(encode_record(_of_set(images + 1, images + 1 + len(counts), stamp(identities))))
        write_identities(self._partial.path(NAMES), counts, identities)

    def _write(self, key: int, record: bytes) -> None:
        encoded = encode_record(record)
        self._records.write(encoded)
        self._index.write(b"%d\t%d\n" % (key, self._offset))
        self._offset += len(encoded)


def _of_set(first: int, end: int, names: int) -> bytes:
    return pack_record(IRHeader(2, np.array([first, end]), 0, names), b"")
