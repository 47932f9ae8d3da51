"""Packs any source into one RecordIO file in InsightFace's layout, with the identity names in a text file beside it.

Record 0 holds [N + 1, N + 1 + C]; records 1..N the images, identity by identity; records N + 1.. one [first, last) range per identity."""

from __future__ import annotations

import logging
import os

import numpy as np

from dali_loaders import renamed
from dali_loaders.identities import identities_path, write_identities
from dali_loaders.records import IRHeader, RecordWriter, pack_record
from dali_loaders.sources import Source

_EXACT = 1 << 24  # float32, the type of labels in RecordIO, counts exactly up to here

renamed.names(__name__, {"read_identities": "dali_loaders.identities"})
log = logging.getLogger(__name__)


def pack(source: Source, out_path: str) -> None:
    """Writes out_path (.rec), its .idx, and its .identities.txt: lines 'number of images<tab>identity name' in label order.

    MXNet and arcface_torch read the first two; the third keeps names, and spares this project a look at every record when it opens the
    file. Images are copied as they are, undecoded."""
    if not out_path.endswith(".rec"):
        raise ValueError(f"the packed file would be named {out_path}; give it a name that ends in .rec.")
    images = len(source)
    if images + 1 + len(source.identities) > _EXACT:
        log.warning("%s has more than 2**24 records, whose numbers other readers round; keep its .identities.txt beside it", out_path)
    counts = np.bincount(source.labels, minlength=len(source.identities))
    last = 1 + np.cumsum(counts)
    with RecordWriter(out_path) as writer:
        writer.write(0, pack_record(IRHeader(2, np.array([images + 1, images + 1 + len(counts)]), 0, 0), b""))
        for key, index in enumerate(np.argsort(source.labels, kind="stable").tolist(), start=1):
            writer.write(key, pack_record(IRHeader(0, float(source.labels[index]), key, 0), source.read(index)))
        for label, (first, end) in enumerate(zip(last - counts, last, strict=True)):
            key = images + 1 + label
            writer.write(key, pack_record(IRHeader(2, np.array([first, end]), key, 0), b""))
        write_identities(f"{identities_path(out_path)}.{os.getpid()}.tmp", counts, source.identities)
    os.replace(f"{identities_path(out_path)}.{os.getpid()}.tmp", identities_path(out_path))
