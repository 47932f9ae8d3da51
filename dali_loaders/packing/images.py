"""What is packed of each image: its bytes as they are, or encoded anew at another size or with the face brought to its place."""

from __future__ import annotations

from collections.abc import Sequence

from dali_loaders import jpeg, reasons
from dali_loaders.account import ReadError
from dali_loaders.packing.landmarks import Landmarks
from dali_loaders.reading import patiently
from dali_loaders.sources import Source


class Images:
    """Called with the number of an image it gives the bytes to pack, or a ReadError. Any thread may call it, in any order."""

    def __init__(self, source: Source, side: int, quality: int, decodes: bool, landmarks: Landmarks | None, names: Sequence[str]) -> None:
        """side: in pixels, 0 for as it is. decodes: whether images that stay as they are must be readable too. names: by which `landmarks`
        knows the images; not used without."""
        self.source, self._side, self._quality, self._decodes = source, side, quality, decodes
        self._landmarks, self._names = landmarks, names
        if side or decodes or landmarks is not None:  # else the bytes stay as they are, and OpenCV may be missing
            from dali_loaders.packing import pixels

            self._pixels = pixels

    def __call__(self, index: int) -> bytes:
        try:
            data = patiently(lambda: self.source.read(index), self.source)
        except OSError as error:
            raise ReadError.of(error) from error
        if not data:
            raise ReadError(reasons.EMPTY)
        if self._landmarks is not None:
            points = self._landmarks.of(self._names[index])
            if isinstance(points, str):
                raise ReadError(points)
            return self._pixels.encode(self._pixels.cut_face(self._pixels.decode(data), points, self._side), self._quality)
        if not (self._side or self._decodes):
            return data
        image = self._pixels.decode(data)
        if not self._side or (image.shape[:2] == (self._side, self._side) and extension(data) in (".jpg", ".png", ".webp")):
            return data
        return self._pixels.encode(self._pixels.resize(image, self._side), self._quality)


def extension(data: bytes) -> str | None:
    """The ending of a file with this image, by its content; None for what is no image that is decoded here."""
    if reasons.is_webp(data):
        return ".webp"
    known = ((jpeg.START, ".jpg"), (reasons.PNG, ".png"), (b"BM", ".bmp"), (b"II*\0", ".tif"), (b"MM\0*", ".tif"))
    return next((ending for start, ending in known if data.startswith(start)), ".ppm" if reasons.format_of(data) == "PNM" else None)
