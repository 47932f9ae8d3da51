"""Tiny .rec files in InsightFace's layout, with whatever is odd about them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dali_loaders.identities import identities_path, stamp, write_identities
from dali_loaders.recordio.records import MAGIC, IRHeader, RecordWriter, index_path, pack_record
from dali_loaders.sources import RecordSource

MAGIC_BYTES = MAGIC.to_bytes(4, "little")
LABELS = [0, 0, 1, 1, 1, 2, 2, 3]
IMAGES = [b"an image of eight " + bytes([65 + n]) * n for n in range(7)] + [b"1234" + MAGIC_BYTES + b"in parts"]
NAMES = ["anna", "ben", "clara", "dora"]


def write_plain(path: Path, labels: Sequence, payloads: Sequence[bytes], first: int = 0) -> str:
    """Image records alone, numbered from `first`."""
    with RecordWriter(str(path)) as writer:
        for key, (label, payload) in enumerate(zip(labels, payloads, strict=True), start=first):
            writer.write(key, pack_record(IRHeader(0, label, key, 0), payload))
    return str(path)


def write_set(
    path: Path,
    labels: Sequence[int],
    payloads: Sequence[bytes],
    names: list[str] | None = None,
    zero_last: bool = False,
    marked: bool = True,
) -> str:
    """Record 0, images whose labels rise from 0, headers; record 0 after the images as in InsightFace's own files if `zero_last`; with an
    identities file, and `marked` for it, if there are names."""
    counts = np.bincount(labels)
    images, last = len(labels), 1 + np.cumsum(counts)
    zero = IRHeader(2, np.array([images + 1, images + 1 + len(counts)]), 0, stamp(names) if names and marked else 0)
    with RecordWriter(str(path)) as writer:
        if not zero_last:
            writer.write(0, pack_record(zero, b""))
        for key, (label, payload) in enumerate(zip(labels, payloads, strict=True), start=1):
            writer.write(key, pack_record(IRHeader(0, float(label), key, 0), payload))
        if zero_last:
            writer.write(0, pack_record(zero, b""))
        for label, end in enumerate(last.tolist()):
            key = images + 1 + label
            writer.write(key, pack_record(IRHeader(2, np.array([end - counts[label], end]), key, 0), b""))
    if names:
        write_identities(identities_path(str(path)), counts, names)
    return str(path)


def offsets_of(path: str) -> dict[int, int]:
    """Where each record starts, by key."""
    lines = Path(path).with_suffix(".idx").read_text().splitlines()
    return {int(key): int(offset) for key, offset in (line.split("\t") for line in lines)}


def relabel(path: str, key: int, label: float) -> None:
    """In place; the label of a record that has one."""
    with open(path, "r+b") as file:
        file.seek(offsets_of(path)[key] + 12)
        file.write(np.float32(label).tobytes())


def idx(path: str) -> Path:
    return Path(index_path(path))


def everything(source: RecordSource) -> list[tuple[bytes, str]]:
    """Images with the names of their identities, read one by one and in bulk."""
    images = [source.read(index) for index in range(len(source))]
    assert [bytes(image) for image in source.read_many(np.arange(len(source)))] == images
    return [(image, source.identities[label]) for image, label in zip(images, source.labels.tolist(), strict=True)]


def expected(names) -> list[tuple[bytes, str]]:
    return [(image, names[label]) for image, label in zip(IMAGES, LABELS, strict=True)]
