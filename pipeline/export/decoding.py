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
from dali_loaders.packing.pixels import decode
from dali_loaders.regular import read_regular
from dali_loaders.skipped import Skipped
from dali_loaders.sources import Source
from pipeline.export.description import Description

SCALE = torch.tensor(1.0) / torch.tensor(127.5)  # DALI multiplies, and the product differs from the quotient in the last bit


class Images(NamedTuple):
    images: Tensor  # float32 [b, 3, H, W], RGB, (x - 127.5) / 127.5, channels last in memory
    indices: np.ndarray  # int64 [b]: numbers of the images in their source


def batches(source: Source, data: DataConfig, indices: np.ndarray, batch_size: int, skipped: Skipped) -> Iterator[Images]:
    """What `dali_loaders.evaluation_batches` gives, decoded by OpenCV in `data.threads` threads. Unreadable images are left out."""

    def one(index: int) -> np.ndarray | Unreadable:
        encoded = read_image(source, index)
        return encoded if isinstance(encoded, Unreadable) else _pixels(encoded, data.image_size)

    with ThreadPoolExecutor(data.thread_count()) as threads:
        for start in range(0, len(indices), batch_size):
            some = indices[start : start + batch_size].tolist()
            found = list(threads.map(one, some))
            for index, image in zip(some, found, strict=True):
                if isinstance(image, Unreadable):
                    skipped.add(index, image.reason)
            good = [(index, image) for index, image in zip(some, found, strict=True) if not isinstance(image, Unreadable)]
            if good:
                yield Images(batch_of([image for _, image in good]), np.array([index for index, _ in good], np.int64))


def decoded_file(image: str | os.PathLike[str] | bytes, side: int) -> np.ndarray:
    """uint8 RGB [side, side, 3] of an image file, given as its path or its contents. ValueError if it cannot be decoded."""
    try:
        encoded = image if isinstance(image, bytes) else read_regular(os.fspath(image))
    except OSError as error:
        raise ValueError(f"{called(image)} cannot be read: {error.strerror or error}") from error
    pixels = _pixels(encoded, side)
    if isinstance(pixels, Unreadable):
        raise ValueError(f"{called(image)} cannot be decoded: {pixels.reason}")
    return pixels


def remarks_on(path: str, about: Description) -> list[str]:
    """What a person should know of an image before its cosines are believed."""
    try:
        size = size_of(read_regular(path))
    except OSError:  # which decoding will say
        return []
    side = about.image_size
    if size is None or size == (side, side):
        return []
    advice = "; cut faces out first (protoshard data pack --landmarks)" if about.landmarks else ""
    return [f"{path} is {size[1]} x {size[0]} pixels and is stretched to {side} x {side}{advice}"]


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


def _pixels(encoded: bytes, side: int) -> np.ndarray | Unreadable:
    claimed = size_of(encoded)
    if claimed and claimed[0] * claimed[1] > MAX_PIXELS:
        return Unreadable(reasons.too_large(*claimed))
    try:
        return stretched(cv2.cvtColor(decode(encoded), cv2.COLOR_BGR2RGB), side)
    except ReadError as error:
        return Unreadable(str(error))
