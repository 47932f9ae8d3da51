"""Reads a packed set back before it gets its name, and compares it with its source."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import closing

import numpy as np

from dali_loaders.account import ReadError
from dali_loaders.packing.images import Images
from dali_loaders.packing.partial import Partial
from dali_loaders.packing.reading import in_order
from dali_loaders.packing.record_file import RECORDS
from dali_loaders.progress import progress
from dali_loaders.sources import Source
from dali_loaders.sources.recordio import RecordSource

_Image = tuple[str, bytes]  # name of the identity, encoded image


def verify_records(partial: Partial, source: Source, images: Images, kept: np.ndarray, workers: int, timeout: float) -> None:
    """kept: numbers of the source's images that were packed, in that order. ValueError where one comes back otherwise."""
    packed = RecordSource(partial.path(RECORDS))
    labels = packed.labels.tolist()
    _compare(((packed.identities[label], packed.read(index)) for index, label in enumerate(labels)), source, images, kept, workers, timeout)


def verify_shards(paths: list[str], source: Source, images: Images, kept: np.ndarray, workers: int, timeout: float) -> None:
    """As `verify_records`."""
    _compare((image for path in paths for image in _read_shard(path)), source, images, kept, workers, timeout)


def _compare(packed: Iterable[_Image], source: Source, images: Images, kept: np.ndarray, workers: int, timeout: float) -> None:
    back = iter(packed)
    with progress("verifying", len(kept)) as shown, closing(in_order(images, kept, workers, timeout)) as results:
        for index, data in zip(map(int, kept), results, strict=True):
            wanted = source.identities[source.labels[index]], data
            if isinstance(data, ReadError) or next(back, None) != wanted:
                raise ValueError(
                    f"{source.name(index)} does not come back from the packed set as it was read: the source has changed meanwhile, or the "
                    "disk or memory of this machine is at fault; nothing was kept, pack it again."
                )
            shown.add()
        if next(back, None) is not None:
            raise ValueError(f"the packed set has more images than the {len(kept)} of {source.path}; nothing was kept, pack it again.")


def _read_shard(path: str) -> Iterator[_Image]:
    with tarfile.open(path, "r:") as tar:
        members = iter(tar)
        for image, _, names in zip(members, members, members, strict=True):
            data, name = (tar.extractfile(member) for member in (image, names))
            assert data is not None and name is not None
            yield json.loads(name.read())["identity"], data.read()
