"""Looks at every image of a data set before it costs a training run: counts, sizes, unreadable files, identities with one image."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from dali_loaders.config import DataConfig
from dali_loaders.decode import Decoder, UnreadableImagesError
from dali_loaders.encoded import HeaderReader, Unreadable, read_image
from dali_loaders.sources import open_source, single_image_identities

_BATCH = 256


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; str() of it is the text for people."""

    path: str
    images: int
    identities: int
    images_per_identity: tuple[int, float, int]  # min, median, max
    decoder: str  # what decoded JPEG
    sizes: dict[tuple[int, int], int]  # (width, height) -> images, most frequent first
    unreadable: list[str]  # names of images
    single: list[str]  # names of identities with one image

    def __str__(self) -> str:
        least, median, most = self.images_per_identity
        shown = ", ".join(f"{width}x{height} ({count})" for (width, height), count in list(self.sizes.items())[:5])
        others = f" and {len(self.sizes) - 5} other sizes" if len(self.sizes) > 5 else ""
        lines = [
            f"{self.path}: {self.images} images of {self.identities} identities",
            f"images per identity: min {least}, median {median:g}, max {most}",
            f"sizes: {shown or 'none'}{others}",
            f"identities with one image: {_listed(self.single)}",
            f"unreadable images: {_listed(self.unreadable)}",
            f"JPEG decoded by: {self.decoder}",
        ]
        return "\n".join(lines)


def check(path: str, reader: str = "native", threads: int = 0, decoder: str = "auto") -> CheckReport:
    """Opens the data set and decodes every image fully, as a run with data.decoder = `decoder` on this machine would: on the GPU if there
    is one. ValueError as for open_source."""
    config = DataConfig(reader=reader, threads=threads, decoder=decoder)
    source = open_source(path, reader)
    threads, device = config.thread_count(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    headers, images = HeaderReader(_BATCH), Decoder(config.image_size, _BATCH, threads, device, decoder=decoder)
    sizes: Counter[tuple[int, int]] = Counter()
    unreadable = []
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), _BATCH):
            indices = range(start, min(start + _BATCH, len(source)))
            encoded = list(pool.map(lambda index: read_image(source, index), indices))
            bad = _unreadable(images, encoded)
            found = headers.sizes(encoded)[0].tolist()
            sizes.update((width, height) for at, (height, width) in enumerate(found) if at not in bad)
            unreadable += [source.name(start + at) for at in sorted(bad)]
    counts = np.bincount(source.labels, minlength=len(source.identities))
    return CheckReport(
        path=path,
        images=len(source),
        identities=len(source.identities),
        images_per_identity=(int(counts.min()), float(np.median(counts)), int(counts.max())),
        decoder={"gpu": "nvJPEG on the GPU", "cpu": "libjpeg-turbo on the CPU"}[images.decodes_on],
        sizes=dict(sizes.most_common()),
        unreadable=unreadable,
        single=single_image_identities(source),
    )


def _unreadable(decoder: Decoder, encoded: list[bytes | Unreadable]) -> set[int]:
    """Places of the images that cannot be decoded. The decoder names broken headers first, then broken bodies."""
    good = list(range(len(encoded)))
    while good:
        try:
            decoder([encoded[at] for at in good], {})
            break
        except UnreadableImagesError as error:
            broken = {good[place] for place in error.why}
            good = [at for at in good if at not in broken]
    return set(range(len(encoded))) - set(good)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{len(names)}" + (f" ({', '.join(names[:10])}{more})" if names else "")
