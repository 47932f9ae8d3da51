"""What two views of a set are compared by: those of two ranks of a job, and those of a run before and after it was interrupted."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from dali_loaders.identities import checksum
from dali_loaders.sources.source import Part, Source

_NAMES_AT_ONCE = 1 << 16


def fingerprint(source: Source) -> dict[str, Any]:
    """Plain values that differ where two sources differ in an identity, in a label, in which image stands where, or in their lists. It does
    not depend on where the set lies, and does not see the images' contents. 1,000,000 images take about a second, those of a .rec a
    hundredth."""
    parts: tuple[Part, ...] = getattr(source, "parts", ())
    lists: str = getattr(source, "lists", "")
    return {
        "images": len(source),
        "num_classes": len(source.identities),
        "identities": checksum(source.identities),
        "labels": f"{zlib.crc32(np.ascontiguousarray(source.labels, '<i8').data):08x}",
        "image_order": f"{order_checksum(source):08x}",
        "weights": [[part.stop - part.start, part.weight] for part in parts if part.weight],
        **({"lists": lists} if lists else {}),
    }


def order_checksum(source: Source) -> int:
    """The source's own, or a CRC-32 of the names of its images, in their order, without the path of the set."""
    if hasattr(source, "order_checksum"):
        return source.order_checksum()
    value = 0
    for names in _names(source):
        value = zlib.crc32("\n".join(names).encode(errors="surrogateescape"), value)
    return value


def _names(source: Source) -> Iterator[list[str]]:
    """Names of up to _NAMES_AT_ONCE images at a time."""
    own = (source.path.rstrip("/") + "/", os.path.basename(source.path) + ":")  # of a folder, and of a file
    for start in range(0, len(source), _NAMES_AT_ONCE):
        names = (source.name(index) for index in range(start, min(start + _NAMES_AT_ONCE, len(source))))
        yield [next((name[len(path) :] for path in own if name.startswith(path)), name) for name in names]
