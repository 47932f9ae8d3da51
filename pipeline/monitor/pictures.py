"""Pictures as files have them: figures, and images side by side."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png_of_figure(figure: Figure) -> bytes:
    """A matplotlib figure at 100 dots per inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def png_of(image_HWC: np.ndarray) -> bytes:
    """Of RGB, uint8 [H, W, 3]."""
    import cv2  # here, because a run without pictures needs none

    _, png = cv2.imencode(".png", cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR))
    return png.tobytes()


def jpeg_of(image_HWC: np.ndarray) -> bytes:
    """Of RGB, uint8 [H, W, 3]: a fifth of the bytes of a PNG file of photos."""
    import cv2

    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return jpeg.tobytes()


def pixels_of(png: bytes) -> np.ndarray:
    """RGB, uint8 [H, W, 3]."""
    import cv2

    return cv2.cvtColor(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height, as the header says (PNG specification, 11.2.2)."""
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def tiled(images_nHWC: np.ndarray, columns: int) -> np.ndarray:
    """One image [rows H, columns W, 3], filled row by row; what is left over is black."""
    n, height, width, channels = images_nHWC.shape
    rows = -(-n // columns)
    sheet = np.zeros((rows * columns, height, width, channels), np.uint8)
    sheet[:n] = images_nHWC
    sheet = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return sheet.reshape(rows * height, columns * width, channels)
