"""Where a JPEG ends, found by walking its markers, and what kind of JPEG it is.

A file may hold more than one image: thumbnails inside segments, other pictures or a video (motion photos) after the first."""

from __future__ import annotations

import re
from typing import NamedTuple

START = b"\xff\xd8\xff"
_END = b"\xff\xd9"
_SCAN, _ANOTHER = 0xDA, 0xD8
_NO_LENGTH = {0x01, *range(0xD0, 0xD8)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15, between which stand DHT, JPG and DAC

# Inside a scan FF 00 stands for a byte FF, and FF D0 to FF D7 are restarts. FF may be repeated before any marker.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class Frame(NamedTuple):
    """What the header of the first image says."""

    process: int  # 0 baseline, 1 extended, 2 progressive, 3 lossless, 9 to 11 the same with arithmetic coding, ...
    bits: int  # of a sample
    height: int
    width: int


def has_end(data: bytes | memoryview) -> bool:
    """Whether the first image's own end marker is there. Where it is not, a decoder fills the missing lines with grey.

    7 microseconds for a face crop with something behind its end, 3 without."""
    data = memoryview(data)
    scanning = False
    at = 2
    while (found := _next_marker(data, at, scanning)) is not None:
        marker, at = found
        if marker in (_END[1], _ANOTHER):
            return marker == _END[1]
        scanning = False
        if marker in _NO_LENGTH:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2 or at + length > len(data):
            return False
        at += length
        if marker == _SCAN:
            # From the first scan on, end markers inside segments are as good as impossible, and most files end with the image.
            if data[-2:] == _END and len(data) - 2 >= at:
                return True
            scanning = True
    return False


def frame(data: bytes | memoryview) -> Frame | None:
    """The first image's, or None where its header is damaged."""
    data = memoryview(data)
    at = 2
    while (found := _next_marker(data, at, False)) is not None:
        marker, at = found
        if marker in (_SCAN, _END[1], _ANOTHER):
            return None
        if marker in _FRAMES and len(data) >= at + 7:
            number = int.from_bytes
            return Frame(marker - 0xC0, data[at + 2], number(data[at + 3 : at + 5], "big"), number(data[at + 5 : at + 7], "big"))
        if marker not in _NO_LENGTH:
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return None


def _next_marker(data: memoryview, at: int, scanning: bool) -> tuple[int, int] | None:
    """(marker, place behind it) at or after `at`; None where the data end first. Bytes that belong nowhere are skipped, as libjpeg does."""
    if not scanning and at + 1 < len(data) and data[at] == 0xFF and data[at + 1] not in (0x00, 0xFF):
        return data[at + 1], at + 2
    found = _NEXT_MARKER.search(data, at)
    return None if found is None else (data[found.end() - 1], found.end())
