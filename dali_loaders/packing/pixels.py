"""Images decoded, resized, cut out by landmarks, and encoded: what of packing needs OpenCV."""

from __future__ import annotations

import numpy as np

from dali_loaders import jpeg, reasons
from dali_loaders.account import ReadError
from dali_loaders.encoded import MAX_PIXELS
from dali_loaders.extras import extra
from dali_loaders.packing.alignment import SIDE, TEMPLATE_52, similarity
from dali_loaders.uncommon import NotDecodedError, to_png

with extra("train"):
    import cv2


def decode(data: bytes) -> np.ndarray:
    """uint8 BGR [H, W, 3], upright as its EXIF data say. ReadError if it cannot be decoded whole, or training refuses it."""
    if reasons.format_of(data) is not None:
        try:
            data = to_png(data, MAX_PIXELS)
        except NotDecodedError as error:
            raise ReadError(str(error)) from error
    if data.startswith(jpeg.START) and jpeg.end(data) is None:
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


def cut_face(image_HW3: np.ndarray, points_52: np.ndarray, side: int) -> np.ndarray:
    height, width = image_HW3.shape[:2]
    x, y = points_52.mean(axis=0)
    if not (0 <= x < width and 0 <= y < height):
        raise ReadError(f"landmarks outside of the image ({width} x {height} pixels)")
    try:
        return align(image_HW3, points_52, side)
    except ValueError as error:
        raise ReadError(str(error)) from error


def align(image_HW3: np.ndarray, points_52: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The face cut out, uint8 [side, side, 3]; what lies outside of the image is black. ValueError as for `similarity`.

    points: x and y in pixels of the image, where (0, 0) is the centre of its first pixel."""
    matrix_23 = similarity(points_52, TEMPLATE_52 * (side / SIDE))
    scale = float(np.hypot(*matrix_23[:, 0]))
    if scale < 0.5:  # bilinear sampling would skip pixels, so a large photo is first brought down to twice the size of the crop
        shrink = 2 * scale
        height, width = image_HW3.shape[:2]
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        image_HW3 = cv2.resize(image_HW3, size, interpolation=cv2.INTER_AREA)
        factor = np.array(size) / (width, height)
        points_52 = (points_52 + 0.5) * factor - 0.5
    return warp(image_HW3, points_52, side)


def warp(image_HW3: np.ndarray, points_52: np.ndarray, side: int = SIDE) -> np.ndarray:
    """As `align`, but with bilinear sampling alone, as scripts of published figures have it: it skips pixels of a face of much more than
    `side`."""
    matrix_23 = similarity(points_52, TEMPLATE_52 * (side / SIDE))
    return cv2.warpAffine(image_HW3, matrix_23, (side, side), flags=cv2.INTER_LINEAR, borderValue=(0, 0, 0))


def encode(image_HW3: np.ndarray, quality: int) -> bytes:
    """As JPEG."""
    return cv2.imencode(".jpg", image_HW3, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def lossless(image_HW3: np.ndarray) -> bytes:
    """As PNG."""
    return cv2.imencode(".png", image_HW3, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
