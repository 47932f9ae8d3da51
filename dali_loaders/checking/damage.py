"""Damage inside a JPEG that a decoder covers up: it warns, and gives an image of which a part is grey or garbage."""

from __future__ import annotations

import re

from dali_loaders import jpeg
from dali_loaders.extras import extra

with extra("train"):
    import simplejpeg

# Warnings of libjpeg that cost no pixel: odd markers, and odd orders of a progressive image's coefficients.
_HARMLESS = re.compile(
    "Unknown Adobe color transform|Warning: unknown JFIF revision|Inconsistent progression sequence|Invalid SOS parameters|"
    "Corrupt JPEG data: bad ICC marker"
)
_BEFORE_END = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")


def damage(data: bytes) -> str | None:
    """What libjpeg-turbo says about the inside of a JPEG; None where it has nothing to say, and for other formats, whose decoders refuse
    damaged images or cannot tell. All coefficients are read, and few pixels made of them: 0.4 times the time of decoding.

    A changed bit often gives another valid JPEG, about which no decoder has anything to say (docs/data.md)."""
    if not data.startswith(jpeg.START):
        return None
    try:
        simplejpeg.decode_jpeg(data, colorspace="GRAY", min_height=1, min_width=1, strict=True)
    except ValueError as error:
        warning = str(error)
        if _HARMLESS.match(warning) or _is_padding(data, warning):
            return None
        return f"damaged inside ({warning.removeprefix('Corrupt JPEG data: ')})"
    return "damaged inside (scans are missing)" if jpeg.lacks_scans(data) else None


def _is_padding(data: bytes, warning: str) -> bool:
    """Some cameras fill the place between the last pixels and the end with zeros."""
    extraneous = _BEFORE_END.match(warning)
    end = next((stop for marker, _, stop in jpeg.markers(memoryview(data)) if marker == jpeg.END), None)
    return extraneous is not None and end is not None and not data[end - 2 - int(extraneous[1]) : end - 2].strip(b"\0\xff")
