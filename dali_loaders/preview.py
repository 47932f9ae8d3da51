"""A sheet of augmented images to look at."""

from __future__ import annotations

import logging
from contextlib import closing

import numpy as np
import torch

from dali_loaders.augment import augment_arguments
from dali_loaders.config import DataConfig
from dali_loaders.decode import Decoder, UnreadableImagesError
from dali_loaders.encoded import Unreadable, read_image
from dali_loaders.extras import extra
from dali_loaders.readers import Readers
from dali_loaders.sources import Source
from dali_loaders.waiting import waiting

with extra("train"):
    import cv2

_GAP = 2  # pixels between images
_MOST = 1 << 27  # pixels of a sheet

log = logging.getLogger(__name__)


def write_preview(path: str, source: Source, config: DataConfig, *, images: int = 8, versions: int = 8, seed: int = 0) -> list[str]:
    """Writes `preview` as a PNG file and returns the names. ValueError also for a path that cannot be written."""
    if not path.lower().endswith(".png"):
        raise ValueError(f"the sheet is a PNG file, but its name is {path!r}; expected one that ends in .png")
    sheet, names = preview(source, config, images=images, versions=versions, seed=seed)
    _, png = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    try:
        with open(path, "wb") as file:
            file.write(png.tobytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    return names


def preview(source: Source, config: DataConfig, *, images: int, versions: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """RGB, uint8 [height, width, 3], and the names of the images: one a row, from all over the set, first as it is and then augmented
    `versions` times as a training run with `config` augments. Unreadable images are passed over and logged; ValueError if all are."""
    if images < 1 or versions < 1:
        raise ValueError(f"a sheet of {images} images in {versions} versions is empty; expected at least 1 of each")
    count = min(images, len(source))
    if count * (versions + 1) * config.image_size**2 > _MOST:
        raise ValueError(f"a sheet of {count} images in {versions} versions would have more than {_MOST} pixels; take fewer")
    decode = Decoder(config.image_size, 1, 1, torch.device("cpu"))
    augment = Decoder(config.image_size, versions, config.thread_count(), torch.device("cpu"))
    numbers = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()
    readers: Readers[bytes | Unreadable] = Readers(
        lambda images: (read_image(source, image) for image in images), source.path, source.name, 1, config.timeout
    )
    with closing(readers), waiting(lambda: f"data: {readers.doing()}"):
        read = readers.result(readers.submit(numbers))
    rows, names, why = [], [], "it is empty"
    for row, (index, encoded) in enumerate(zip(numbers, read, strict=True)):
        arguments = augment_arguments(config.augment, config.image_size, seed, np.arange(row * versions, (row + 1) * versions))
        try:
            plain, augmented = decode([encoded], {}), augment([encoded] * versions, arguments)
        except UnreadableImagesError as error:
            why = f"{source.name(index)}: {error.why[0]}"
            log.warning("passing over unreadable image %s", why)
            continue
        rows.append(_row(torch.cat([plain, augmented])))
        names.append(source.name(index))
    if not rows:
        raise ValueError(f"none of {count} images of {source.path} can be read ({why}); see protoshard data check")
    return np.concatenate(rows)[:-_GAP, :-_GAP], names


def _row(images_b3HW: torch.Tensor) -> np.ndarray:
    """The images side by side, each with a white gap to its right and below."""
    levels = (images_b3HW * 127.5 + 127.5).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    return np.concatenate(np.pad(levels, [(0, 0), (0, _GAP), (0, _GAP), (0, 0)], constant_values=255), axis=1)
