"""Encoded images before they are decoded: their sizes by their headers, and why some have none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import numpy as np

from dali_loaders import jpeg, reasons
from dali_loaders.account import ChangedError, ReadError, Unreadable
from dali_loaders.extras import extra
from dali_loaders.graphs import Graph, byte_arrays, size_pipeline
from dali_loaders.sources import Source

with extra("train"):
    import cv2

_MAX_PIXELS = 1 << 26  # a damaged header may claim gigabytes
GROUP_PIXELS = 1 << 26  # decoded at a time: 3 bytes each, or 200 MB; a batch of 256 images may be of 512 x 512 and still is one group


def read_image(source: Source, index: int) -> bytes | Unreadable:
    """Encoded image `index` as JPEG, PNG or WebP; why not, where it cannot be read. Other formats become PNG, in the calling thread."""
    try:
        data = source.read(index)
    except ChangedError:  # no fault of one image
        raise
    except ValueError as error:
        return Unreadable(str(error))
    except OSError as error:
        return Unreadable(str(ReadError.of(error)))
    return data if _is_common(data) else _to_png(data)


def _to_png(data: bytes) -> bytes | Unreadable:
    if not data:
        return Unreadable(reasons.EMPTY)
    try:
        image, as_stored = (cv2.imdecode(np.frombuffer(data, np.uint8), flag) for flag in (cv2.IMREAD_COLOR, cv2.IMREAD_UNCHANGED))
    except cv2.error as error:
        return Unreadable("too large" if "MAX_IMAGE" in str(error) else reasons.undecodable(data))
    if image is None or as_stored is None:
        return Unreadable(reasons.undecodable(data))
    if as_stored.dtype.kind == "f":  # OpenCV makes nearly black or noisy images of these (PFM, Radiance, some TIFF)
        return Unreadable(reasons.FLOATING)
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


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
        too_large = np.flatnonzero(sizes_b2.prod(axis=1) > _MAX_PIXELS)
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
    return jpeg.has_end(data) if data.startswith(jpeg.START) else _is_common(data)


def _is_common(data: bytes) -> bool:
    return data.startswith((jpeg.START, reasons.PNG)) or (data.startswith(b"RIFF") and data[8:12] == b"WEBP")


def _without_header(data: bytes) -> str:
    reason = reasons.undecodable(data)
    return reasons.NO_HEADER if reason == reasons.DAMAGED else reason
