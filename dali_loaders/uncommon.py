"""BMP, TIFF and PNM images, which DALI is not given: OpenCV makes PNG of them. Sizes are read first, for a header may claim gigabytes.

Other formats are told by name and refused. OpenCV has decoders for a few, but that of JPEG 2000 crashes on damaged files."""

from __future__ import annotations

import re
import struct
import threading
from contextlib import nullcontext

import numpy as np

from dali_loaders import reasons
from dali_loaders.extras import extra

with extra("train"):
    import cv2

# Bytes between the numbers of a PNM header: white space and comments.
_GAP = rb"(?:\s|#[^\n]*\n)+"
_PNM = re.compile(rb"P[1-6]" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,9})\s")
_LARGE, _LARGE_PIXELS = threading.Lock(), 1 << 22
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257


class NotDecodedError(ValueError):
    """str() is the reason, a few words."""


def to_png(data: bytes, most_pixels: int) -> bytes:
    """A BMP, TIFF or PNM image as PNG of 8 bits. NotDecodedError for whatever else it is, is damaged, or has more than `most_pixels`."""
    if reasons.format_of(data) not in _SIZES:
        raise NotDecodedError(reasons.undecodable(data))
    size = size_of(data)
    if size is None:
        raise NotDecodedError(reasons.undecodable(data))
    if size[0] * size[1] > most_pixels:
        raise NotDecodedError(reasons.too_large(*size))
    # OpenCV holds a large image several times over, and one in each reading thread would be too many.
    with _LARGE if size[0] * size[1] > _LARGE_PIXELS else nullcontext():
        return _converted(data)


def _converted(data: bytes) -> bytes:
    try:
        image, as_stored = (cv2.imdecode(np.frombuffer(data, np.uint8), flag) for flag in (cv2.IMREAD_COLOR, cv2.IMREAD_UNCHANGED))
    except cv2.error:
        image = None
    if image is None or as_stored is None:
        raise NotDecodedError(reasons.undecodable(data))
    if as_stored.dtype.kind == "f":  # which OpenCV converts to noise
        raise NotDecodedError(reasons.FLOATING)
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def size_of(data: bytes) -> tuple[int, int] | None:
    """Height and width that the header of a BMP, TIFF or PNM image claims; None where it is damaged."""
    try:
        return _SIZES[reasons.format_of(data) or ""](data)
    except struct.error:  # the data end within the header
        return None


def _size_of_bmp(data: bytes) -> tuple[int, int] | None:
    is_of_os2 = struct.unpack_from("<I", data, 14)[0] == 12
    width, height = struct.unpack_from("<HH" if is_of_os2 else "<ii", data, 18)
    return abs(height), abs(width)  # a negative height means that the upper line comes first


def _size_of_tiff(data: bytes) -> tuple[int, int] | None:
    order = "<" if data.startswith(b"II") else ">"
    (directory,) = struct.unpack_from(f"{order}I", data, 4)
    (entries,) = struct.unpack_from(f"{order}H", data, directory)
    found = {}
    for at in range(directory + 2, directory + 2 + 12 * entries, 12):
        tag, kind = struct.unpack_from(f"{order}HH", data, at)
        if tag in (_TIFF_WIDTH, _TIFF_HEIGHT):
            (found[tag],) = struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", data, at + 8)
    return (found[_TIFF_HEIGHT], found[_TIFF_WIDTH]) if len(found) == 2 else None


def _size_of_pnm(data: bytes) -> tuple[int, int] | None:
    header = _PNM.match(data)
    return None if header is None else (int(header[2]), int(header[1]))


_SIZES = {"BMP": _size_of_bmp, "TIFF": _size_of_tiff, "PNM": _size_of_pnm}
