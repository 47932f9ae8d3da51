"""RecordIO files as a source."""

from __future__ import annotations

import os

import numpy as np

from dali_loaders.account import Account
from dali_loaders.identities import identities_path, read_identities
from dali_loaders.mxnet_records import MXNetReader
from dali_loaders.records import IndexedRecordReader, unpack_record


class RecordSource:
    """The image records of a .rec file in key order; records without an image (InsightFace's headers) are left out.

    Labels that are not 0..C-1 are renumbered in rising order; identity names are the original labels, or those of the sidecar that
    `pack` writes (it also spares reading a header per image)."""

    def __init__(self, path: str, reader: str = "native") -> None:
        self.path = path
        self._records = IndexedRecordReader(path)
        self._mxnet = MXNetReader(path) if reader == "mxnet" else None
        order = np.argsort(self._records.keys, kind="stable")
        packed = read_identities(path)
        if packed is not None:
            counts, self.identities = packed
            if len(self._records) != 1 + counts.sum() + len(counts):
                raise ValueError(f"{identities_path(path)} does not match {path}; delete it or pack the images again.")
            self.labels = np.repeat(np.arange(len(counts)), counts)
            images = order[1 : 1 + len(self.labels)]
        else:
            labels, has_image = self._records.scan_headers(self._records.offsets[order])
            if not has_image.any():
                raise ValueError(f"{path} holds {len(self._records)} records but no image; pack the images again.")
            images = order[has_image]
            values, self.labels = np.unique(labels[has_image], return_inverse=True)
            self.identities = [f"{value:.9g}" for value in values.tolist()]
        # Headers of identities and of the file are no images, and no loss.
        self.account = Account(seen=len(images), used=len(images))
        self._keys = self._records.keys[images]
        self._offsets = self._records.offsets[images]

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> bytes:
        if self._mxnet is not None:
            return unpack_record(self._mxnet.read(int(self._keys[index])))[1]
        return unpack_record(self._records.read_at(int(self._offsets[index])))[1]

    def name(self, index: int) -> str:
        return f"{os.path.basename(self.path)}:record {self._keys[index]}"
