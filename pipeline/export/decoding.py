"""Images decoded without DALI, for machines that have none: the same pixels where an image has the model's size already, to the bit, and
within 3 of 255 levels where it is stretched."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dali_loaders import jpeg, reasons
from dali_loaders.account import ReadError, Unreadable
from dali_loaders.config import DataConfig
from dali_loaders.encoded import MAX_PIXELS, read_image
from dali_loaders.feed import Seen
from dali_loaders.packing.pixels import decode
from dali_loaders.regular import read_regular
from dali_loaders.skipped import Skipped
from dali_loaders.sources import Source

SCALE = torch.tensor(1.0) / torch.tensor(127.5)  # DALI multiplies, and the product differs from the quotient in the last bit


class Images(NamedTuple):
    images: Tensor  # float32 [b, 3, H, W], RGB, (x - 127.5) / 127.5, channels last in memory
    indices: np.ndarray  # int64 [b]: numbers of the images in their source


class Decoded(NamedTuple):
    pixels: np.ndarray  # uint8 RGB [side, side, 3]
    size: tuple[int, int]  # height and width before it was stretched


def batches(source: Source, data: DataConfig, indices: np.ndarray, batch_size: int, skipped: Skipped, seen: Seen) -> Iterator[Images]:
    """What `dali_loaders.evaluation_batches` gives, decoded by OpenCV in `data.threads` threads. Unreadable images are left out."""

    def one(index: int) -> Decoded | Unreadable:
        encoded = read_image(source, index)
        return encoded if isinstance(encoded, Unreadable) else _decoded(encoded, data.image_size)

    with ThreadPoolExecutor(data.thread_count()) as threads:
        for start in range(0, len(indices), batch_size):
            some = indices[start : start + batch_size].tolist()
            found = list(threads.map(one, some))
            for index, image in zip(some, found, strict=True):
                if isinstance(image, Unreadable):
                    skipped.add(index, image.reason)
            good = [(index, image) for index, image in zip(some, found, strict=True) if not isinstance(image, Unreadable)]
            if good:
                numbers, images = zip(*good, strict=True)
                index_b = np.array(numbers, np.int64)
                seen(index_b, np.array([image.size for image in images], np.int64))
                yield Images(batch_of([image.pixels for image in images]), index_b)


def decoded_file(image: str | os.PathLike[str] | bytes, side: int) -> Decoded:
    """An image file, given as its path or its contents. ValueError if it cannot be decoded."""
    try:
        encoded = image if isinstance(image, bytes) else read_regular(os.fspath(image))
    except OSError as error:
        raise ValueError(f"{called(image)} cannot be read: {error.strerror or error}") from error
    decoded = _decoded(encoded, side)
    if isinstance(decoded, Unreadable):
        raise ValueError(f"{called(image)} cannot be decoded: {decoded.reason}")
    return decoded


def called(image: str | os.PathLike[str] | bytes) -> str:
    return "an image given as bytes" if isinstance(image, bytes) else os.fspath(image)


def batch_of(images: Sequence[np.ndarray]) -> Tensor:
    """float32 [b, 3, H, W] of uint8 [H, W, 3] each."""
    return ((torch.from_numpy(np.stack(images)).float() - 127.5) * SCALE).permute(0, 3, 1, 2)


def stretched(image_HW3: np.ndarray, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: linear between pixels, and where it shrinks a mean weighted by a triangle, as DALI's resize."""
    if image_HW3.shape[:2] == (side, side):
        return image_HW3
    levels = torch.from_numpy(image_HW3).permute(2, 0, 1)[None].float()
    resized = interpolate(levels, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def size_of(encoded: bytes) -> tuple[int, int] | None:
    """Height and width that the header of a JPEG or PNG claims; None for other formats and damaged headers."""
    if encoded.startswith(reasons.PNG) and len(encoded) >= 24:
        return int.from_bytes(encoded[20:24], "big"), int.from_bytes(encoded[16:20], "big")
    frame = jpeg.frame(encoded) if encoded.startswith(jpeg.START) else None
    return None if frame is None else (frame.height, frame.width)


def _decoded(encoded: bytes, side: int) -> Decoded | Unreadable:
    claimed = size_of(encoded)
    if claimed and claimed[0] * claimed[1] > MAX_PIXELS:
        return Unreadable(reasons.too_large(*claimed))
    try:
        image_HW3 = cv2.cvtColor(decode(encoded), cv2.COLOR_BGR2RGB)
    except ReadError as error:
        return Unreadable(str(error))
    height, width = image_HW3.shape[:2]
    return Decoded(stretched(image_HW3, side), (height, width))
