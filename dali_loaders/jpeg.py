"""Where a JPEG ends, found by walking its markers, and what kind of JPEG it is.

A file may hold more than one image: thumbnails inside segments, other pictures or a video (motion photos) after the first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

START = b"\xff\xd8\xff"
END = 0xD9
_SCAN, _ANOTHER = 0xDA, 0xD8
_NO_LENGTH = {0x01, *range(0xD0, 0xD8)}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15, between which stand DHT, JPG and DAC
_COEFFICIENTS = 64

# Inside a scan FF 00 stands for a byte FF, and FF D0 to FF D7 are restarts. FF may be repeated before any marker.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class Frame(NamedTuple):
    """What the header of the first image says."""

    process: int  # 0 baseline, 1 extended, 2 progressive, 3 lossless, 9 to 11 the same with arithmetic coding, ...
    bits: int  # of a sample
    height: int
    width: int


def end(data: bytes | memoryview) -> int | None:
    """The place behind the first image's own end marker. None where there is none, and a decoder would fill the missing lines with grey.

    6 microseconds for a face crop with something behind its end, 4 without. A file that ends with an end marker is taken for one image."""
    data = memoryview(data)
    for marker, _, stop in markers(data):
        if marker == END:
            return stop
        # From the first scan on, end markers inside segments are as good as impossible, and most files end with the image.
        if marker == _SCAN and data[-2:] == b"\xff\xd9" and len(data) - 2 >= stop:
            return len(data)
    return None


def frame(data: bytes | memoryview) -> Frame | None:
    """The first image's, or None where its header is damaged."""
    data = memoryview(data)
    for marker, start, stop in markers(data):
        if marker in (_SCAN, END):
            return None
        if marker in _FRAMES and stop - start >= 5:
            number = int.from_bytes
            return Frame(marker - 0xC0, data[start], number(data[start + 1 : start + 3], "big"), number(data[start + 3 : start + 5], "big"))
    return None


def lacks_scans(data: bytes | memoryview) -> bool:
    """Whether some coefficients never come, or not to their last bit, as in a progressive image that was cut between two scans."""
    data = memoryview(data)
    missing: dict[int, list[bool]] = {}  # by component
    for marker, start, stop in markers(data):
        if marker in _FRAMES:
            missing = {component: [True] * _COEFFICIENTS for component in data[start + 6 : stop : 3]}
        elif marker == _SCAN and stop - start >= 4:
            first, last, bits = data[stop - 3 : stop]  # coefficients of the scan; bits of them that are still to come
            for component in data[start + 1 : stop - 3 : 2]:
                if component in missing and last < _COEFFICIENTS:
                    missing[component][first : last + 1] = [bits & 15 > 0] * (last + 1 - first)
    return any(any(coefficients) for coefficients in missing.values())


def markers(data: memoryview) -> Iterator[tuple[int, int, int]]:
    """(marker, start of its payload, place behind it) of the first image, up to END if it has one. Entropy-coded data are passed over."""
    at, scanning = 2, False
    while (found := _next_marker(data, at, scanning)) is not None:
        marker, at = found
        if marker == END:
            yield marker, at, at
        if marker in (END, _ANOTHER):
            return
        scanning = False
        if marker in _NO_LENGTH:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        if length < 2 or at + length > len(data):
            return
        yield marker, at + 2, at + length
        at, scanning = at + length, marker == _SCAN


def _next_marker(data: memoryview, at: int, scanning: bool) -> tuple[int, int] | None:
    """(marker, place behind it) at or after `at`; None where the data end first. Bytes that belong nowhere are skipped, as libjpeg does."""
    if not scanning and at + 1 < len(data) and data[at] == 0xFF and data[at + 1] not in (0x00, 0xFF):
        return data[at + 1], at + 2
    found = _NEXT_MARKER.search(data, at)
    return None if found is None else (data[found.end() - 1], found.end())
