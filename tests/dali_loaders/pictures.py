"""Tiny images, and folders of them, for the tests of this room."""

from pathlib import Path

import cv2
import numpy as np


def picture(number: int, size: int | tuple[int, int] = 32, extension: str = ".jpg", channels: int = 3) -> bytes:
    """A smooth random image, different for each number, encoded."""
    height, width = (size, size) if isinstance(size, int) else size
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    return cv2.imencode(extension, cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))[1].tobytes()


def write_folder(path: Path, identities: int, images: int, extension: str = ".jpg", size: int = 32) -> Path:
    for identity in range(identities):
        (path / f"person{identity:02}").mkdir(parents=True)
        for image in range(images):
            file = path / f"person{identity:02}" / f"{image:02}{extension}"
            file.write_bytes(picture(identity * images + image, size, extension))
    return path
