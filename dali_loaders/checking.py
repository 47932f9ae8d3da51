"""Looks at every image of a data set before it costs a training run: counts, sizes, unreadable files, identities with one image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from dali_loaders.decode import DataConfig, dali_modules, is_complete
from dali_loaders.sources import Source, open_source, single_image_identities

_BATCH = 256


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; str() of it is the text for people."""

    path: str
    images: int
    identities: int
    images_per_identity: tuple[int, float, int]  # min, median, max
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
        ]
        return "\n".join(lines)


def check(path: str, reader: str = "native", threads: int = 0) -> CheckReport:
    """Opens the data set and decodes every image fully, with the decoder that training uses (on the CPU). ValueError as for open_source."""
    source = open_source(path, reader)
    threads = DataConfig(threads=threads).thread_count()
    decoder = _SizeDecoder(threads)
    sizes: Counter[tuple[int, int]] = Counter()
    unreadable = []
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), _BATCH):
            indices = range(start, min(start + _BATCH, len(source)))
            encoded = list(pool.map(lambda index: _read(source, index), indices))
            complete = [(index, data) for index, data in zip(indices, encoded, strict=True) if is_complete(data)]
            found = dict(zip((index for index, _ in complete), decoder.sizes([data for _, data in complete]), strict=True))
            sizes.update(size for size in found.values() if size is not None)
            unreadable += [source.name(index) for index in indices if found.get(index) is None]
    counts = np.bincount(source.labels, minlength=len(source.identities))
    return CheckReport(
        path=path,
        images=len(source),
        identities=len(source.identities),
        images_per_identity=(int(counts.min()), float(np.median(counts)), int(counts.max())),
        sizes=dict(sizes.most_common()),
        unreadable=unreadable,
        single=single_image_identities(source),
    )


class _SizeDecoder:
    """Decodes on the CPU and keeps the sizes alone."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pipeline: Any = None

    def sizes(self, encoded: Sequence[bytes]) -> list[tuple[int, int] | None]:
        """(width, height) of each image, None where it cannot be decoded, which is found by bisection."""
        if not encoded:
            return []
        self._pipeline = self._pipeline or self._build()
        self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        try:
            (shapes,) = self._pipeline.run()
        except RuntimeError:
            self._pipeline = None
            if len(encoded) == 1:
                return [None]
            half = len(encoded) // 2
            return self.sizes(encoded[:half]) + self.sizes(encoded[half:])
        return [(int(width), int(height)) for height, width, _ in np.asarray(shapes.as_tensor())]

    def _build(self) -> Any:
        dali, fn, types = dali_modules()
        pipeline = dali.Pipeline(_BATCH, self._threads, None, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
            pipeline.set_outputs(fn.decoders.image(encoded, output_type=types.RGB).shape())
        pipeline.build()
        return pipeline


def _read(source: Source, index: int) -> bytes:
    try:
        return source.read(index)
    except (OSError, ValueError):
        return b""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{len(names)}" + (f" ({', '.join(names[:10])}{more})" if names else "")
