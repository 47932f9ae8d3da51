"""Encoded images before they are decoded: their sizes by their headers, and why some have none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from dali_loaders import jpeg, reasons
from dali_loaders.account import ChangedError, ReadError, StorageError, Unreadable
from dali_loaders.graphs import Graph, byte_arrays, size_pipeline
from dali_loaders.reading import patiently
from dali_loaders.sources import Source
from dali_loaders.uncommon import NotDecodedError, to_png

MAX_PIXELS = 1 << 26  # a damaged header may claim gigabytes
_NOT_READ = Unreadable("not read")
GROUP_PIXELS = 1 << 26  # decoded at a time: 3 bytes each, or 200 MB; a batch of 256 images may be of 512 x 512 and still is one group


def read_image(source: Source, index: int) -> bytes | Unreadable:
    """Encoded image `index` as JPEG, PNG or WebP; why not, where it cannot be read. Other formats become PNG, in the calling thread.

    StorageError where the machine keeps it from being read, ChangedError where the set has changed: those are no fault of the image."""
    try:
        data = patiently(lambda: source.read(index), source)
    except (StorageError, ChangedError):
        raise
    except ValueError as error:
        return Unreadable(str(error))
    except OSError as error:
        return Unreadable(str(ReadError.of(error)))
    return data if _is_common(data) else _to_png(data)


def _to_png(data: bytes) -> bytes | Unreadable:
    try:
        return to_png(data, MAX_PIXELS)
    except NotDecodedError as error:
        return Unreadable(str(error))


def groups(sizes_b2: np.ndarray, most_pixels: int = GROUP_PIXELS) -> list[slice]:
    """Cuts a batch into parts of consecutive images with at most `most_pixels` pixels together, or one image with more.

    sizes_b2: int64 [b, 2], as of HeaderReader.sizes. Memory for decoding is then bounded, whatever the images and the batch."""
    cuts, held = [0], 0
    for at, pixels in enumerate(sizes_b2.prod(axis=1).tolist()):
        if held and held + pixels > most_pixels:
            cuts.append(at)
            held = 0
        held += pixels
    return [slice(start, stop) for start, stop in itertools.pairwise([*cuts, len(sizes_b2)]) if stop > start]


class HeaderReader:
    """Reads the sizes of encoded images from their headers."""

    def __init__(self, batch_size: int) -> None:
        self._graph = Graph(partial(size_pipeline, batch_size))

    def sizes(self, encoded: Sequence[bytes | Unreadable]) -> tuple[np.ndarray, dict[int, str]]:
        """Height and width, int64 [b, 2]; zeros where there is no valid header or the data visibly ends too early, and there why, by place.

        It reads JPEG, PNG and WebP only: a BMP with a header that no decoder accepts crashes DALI 2.4 (see read_image)."""
        sizes_b2 = np.zeros((len(encoded), 2), np.int64)
        why: dict[int, str] = {}
        good: dict[int, bytes] = {}
        for at, data in enumerate(encoded):
            if isinstance(data, Unreadable):
                why[at] = data.reason
            elif not is_complete(data):
                why[at] = reasons.undecodable(data)
            else:
                good[at] = data
        try:
            self._parse(good, sizes_b2)
        except RuntimeError as error:
            places = list(good)
            for place in self._graph.unreadable(list(good.values()), error):
                why[places[place]] = _without_header(good[places[place]])
                del good[places[place]]
            self._parse(good, sizes_b2)
        too_large = np.flatnonzero(sizes_b2.prod(axis=1) > MAX_PIXELS)
        why.update((at, reasons.too_large(*sizes_b2[at].tolist())) for at in too_large.tolist())
        sizes_b2[too_large] = 0
        return sizes_b2, why

    def _parse(self, encoded: dict[int, bytes], sizes_b2: np.ndarray) -> None:
        if encoded:
            shapes = self._graph.run({"encoded": byte_arrays(list(encoded.values()))})
            sizes_b2[list(encoded)] = np.asarray(shapes.as_tensor())[:, :2]


def is_complete(data: bytes) -> bool:
    """False for what is no JPEG, PNG or WebP, and for a JPEG without its end marker, whose missing lines a decoder may fill with grey.
    Cut PNG and WebP need no look: they cannot be decoded."""
    if not data.startswith(jpeg.START):
        return _is_common(data)
    # Most face crops begin their first scan soon, with no preview before it, and end with the file: seen in 0.5 us, where a walk over the
    # markers takes 4.
    scan = data.find(b"\xff\xda", 2, 1024)
    if scan > 0 and data.endswith(b"\xff\xd9") and data.find(jpeg.START, 2, scan) < 0:
        return True
    return jpeg.end(data) is not None


def _is_common(data: bytes) -> bool:
    return data.startswith((jpeg.START, reasons.PNG)) or reasons.is_webp(data)


def _without_header(data: bytes) -> str:
    reason = reasons.undecodable(data)
    return reasons.NO_HEADER if reason == reasons.DAMAGED else reason


def read_images(source: Source, indices: np.ndarray) -> Iterator[bytes | Unreadable]:
    """read_image for each of `indices`, int64 [b]: by one call of source.read_many for all, where the source has it."""
    numbers = indices.tolist()
    if len(numbers) == 1 or not hasattr(source, "read_many"):
        yield from (read_image(source, index) for index in numbers)
        return
    try:
        found = source.read_many(indices)
    except ChangedError:
        raise
    except (OSError, ValueError):  # of one of them; which?
        found = [_NOT_READ] * len(numbers)
    for index, data in zip(numbers, found, strict=True):
        if isinstance(data, Unreadable):  # read again by itself, which tells faults of the machine from those of the image
            yield read_image(source, index)
        else:
            image = bytes(data)
            yield image if _is_common(image) else _to_png(image)
