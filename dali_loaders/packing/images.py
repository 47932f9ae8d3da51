"""What is packed of each image: its bytes as they are, or encoded anew at another size or with the face brought to its place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dali_loaders import jpeg, reasons
from dali_loaders.account import ReadError
from dali_loaders.extras import extra
from dali_loaders.packing.alignment import align
from dali_loaders.packing.landmarks import Landmarks
from dali_loaders.sources import Source

with extra("train"):
    import cv2


class Images:
    """Called with the number of an image it gives the bytes to pack, or a ReadError. Any thread may call it, in any order."""

    def __init__(self, source: Source, side: int, quality: int, decodes: bool, landmarks: Landmarks | None, names: Sequence[str]) -> None:
        """side: in pixels, 0 for as it is. decodes: whether images that stay as they are must be readable too. names: by which `landmarks`
        knows the images; not used without."""
        self._source, self._side, self._quality, self._decodes = source, side, quality, decodes
        self._landmarks, self._names = landmarks, names

    def __call__(self, index: int) -> bytes:
        try:
            data = self._source.read(index)
        except OSError as error:
            raise ReadError.of(error) from error
        if not data:
            raise ReadError(reasons.EMPTY)
        if self._landmarks is not None:
            points = self._landmarks.of(self._names[index])
            if isinstance(points, str):
                raise ReadError(points)
            return self._encode(_cut_face(decode(data), points, self._side))
        if not (self._side or self._decodes):
            return data
        image = decode(data)
        if not self._side or (image.shape[:2] == (self._side, self._side) and extension(data) in (".jpg", ".png", ".webp")):
            return data
        return self._encode(resize(image, self._side))

    def _encode(self, image: np.ndarray) -> bytes:
        return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, self._quality])[1].tobytes()


def extension(data: bytes) -> str | None:
    """The ending of a file with this image, by its content; None for what is no image that is decoded here."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return ".webp"
    known = ((jpeg.START, ".jpg"), (reasons.PNG, ".png"), (b"BM", ".bmp"), (b"II*\0", ".tif"), (b"MM\0*", ".tif"))
    return next((ending for start, ending in known if data.startswith(start)), ".ppm" if reasons.format_of(data) == "PNM" else None)


def decode(data: bytes) -> np.ndarray:
    """uint8 BGR [H, W, 3], upright as its EXIF data say. ReadError if it cannot be decoded whole."""
    if data.startswith(jpeg.START) and not jpeg.has_end(data):
        raise ReadError(reasons.undecodable(data))  # OpenCV would fill what is missing with grey
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise ReadError("too large" if "MAX_IMAGE" in str(error) else reasons.undecodable(data)) from error
    if image is None:
        raise ReadError(reasons.undecodable(data))
    return image


def resize(image_HW3: np.ndarray, side: int) -> np.ndarray:
    """Stretched to [side, side, 3]. Areas are averaged where it shrinks; INTER_AREA would repeat pixels where it grows."""
    shrinks = min(image_HW3.shape[:2]) >= side
    return cv2.resize(image_HW3, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _cut_face(image_HW3: np.ndarray, points_52: np.ndarray, side: int) -> np.ndarray:
    height, width = image_HW3.shape[:2]
    x, y = points_52.mean(axis=0)
    if not (0 <= x < width and 0 <= y < height):
        raise ReadError(f"landmarks outside of the image ({width} x {height} pixels)")
    try:
        return align(image_HW3, points_52, side)
    except ValueError as error:
        raise ReadError(str(error)) from error
