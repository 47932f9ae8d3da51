"""Batches for one rank, read and decoded in the background while the training step runs; resumable at any sample.

Which image stands at which place, and how it is augmented, depends on (seed, position in the stream) only, not on the number of ranks."""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from dali_loaders.augment import augment_arguments
from dali_loaders.background import Background
from dali_loaders.config import DataConfig
from dali_loaders.decode import Decoder, UnreadableImagesError
from dali_loaders.encoded import Unreadable, read_image
from dali_loaders.order import Order, build_order
from dali_loaders.sources import Source

MAX_SKIPPED = 0.01  # share of unreadable images that ends a run
_JUDGED = 10_000  # reads, or the size of a smaller set, below which chance could mislead a rank about that share

_KNOWN = Unreadable("unreadable before")

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    images: torch.Tensor  # [b, 3, H, W], RGB, (x - 127.5) / 127.5
    labels: torch.Tensor  # int64 [b]
    indices: np.ndarray  # int64 [b]: dataset index of each row


class TrainLoader:
    """Endless iterator over this rank's slice of the global batches; images and labels are on `device`, images with `dtype` (float32 or
    float16) and in the memory format `channels_last` if asked.

    Global batch k is the stream positions [consumed + k * global_batch, + global_batch) of the order (UniformOrder, or GroupedOrder where
    config.images_per_identity is above 1); rank r takes the r-th of world_size equal contiguous slices, which hold whole groups. An
    unreadable image is replaced by the next readable one (dataset index + 1, wrapping; with groups, of its own identity if there is one),
    logged, added to `skipped` and to the file `skipped_path`; more than 1 % of such reads end the iteration with a ValueError.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        consumed: int = 0,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
        skipped_path: str | None = None,
    ) -> None:
        group = config.images_per_identity
        if global_batch < 1 or global_batch % (world_size * group):
            groups = f" in groups of {group} images" if group > 1 else ""
            raise ValueError(
                f"the global batch of {global_batch} does not divide among {world_size} ranks{groups}; choose a positive multiple of "
                f"{world_size * group}."
            )
        assert 0 <= rank < world_size
        assert consumed >= 0
        self.skipped: list[str] = []
        size = global_batch // world_size
        starts = itertools.count(consumed + rank * size, global_batch)
        feed = _Feed(source, config, _decoder(config, size, device, channels_last, dtype), self.skipped, skipped_path)
        batches = feed.train_batches(build_order(source, group, seed), seed, starts)
        self._batches = Background(batches, config.prefetch, feed.decoder.device)

    @property
    def wait_seconds(self) -> float:
        """Total time that __next__ has waited for data."""
        return self._batches.wait_seconds

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        return _on_current_stream(next(self._batches))

    def close(self) -> None:
        """Stops the background threads; the iterator is at its end afterwards."""
        self._batches.close()


def evaluation_batches(
    source: Source,
    config: DataConfig,
    indices: np.ndarray,
    batch_size: int,
    device: torch.device | str = "cpu",
    *,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Batch]:
    """The images `indices` in this order, as TrainLoader gives them, but not augmented. Rows of unreadable images are left out;
    `Batch.indices` says which are there. The last batch may be smaller."""
    feed = _Feed(source, config, _decoder(config, batch_size, device, channels_last, dtype), [], None)
    batches = Background(feed.evaluation_batches(np.asarray(indices, np.int64)), config.prefetch, feed.decoder.device)
    try:
        for batch in batches:
            yield _on_current_stream(batch)
    finally:
        batches.close()


def _decoder(config: DataConfig, batch_size: int, device: torch.device | str, channels_last: bool, dtype: torch.dtype) -> Decoder:
    size, threads, on = config.image_size, config.thread_count(), torch.device(device)
    return Decoder(size, batch_size, threads, on, decoder=config.decoder, channels_last=channels_last, dtype=dtype)


class _Request(NamedTuple):
    indices: np.ndarray  # wanted images, int64 [b]
    arguments: dict[str, np.ndarray]
    reads: list[Future[list[bytes | Unreadable]]]  # one per reading thread


class _Feed:
    """Reads ahead, decodes, and deals with unreadable images. Runs in one background thread; reading uses a few more."""

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        decoder: Decoder,
        skipped: list[str],
        skipped_path: str | None,
    ) -> None:
        self._source, self._config, self.decoder = source, config, decoder
        self._threads = config.thread_count()
        self._labels = torch.from_numpy(source.labels)
        self._bad: set[int] = set()
        self._skipped, self._skipped_path = skipped, skipped_path

    def train_batches(self, order: Order, seed: int, starts: Iterable[int]) -> Iterator[Batch]:
        config, reads_so_far, skipped_reads = self._config, 0, 0
        with ThreadPoolExecutor(self._threads, "protoshard-read") as pool:
            requests = (
                (order.indices(start, stop), augment_arguments(config.augment, config.image_size, seed, np.arange(start, stop)))
                for start, stop in ((s, s + self.decoder.batch_size) for s in starts)
            )
            for wanted, arguments, encoded in self._read_ahead(pool, requests):
                images = self._decode(encoded, wanted, arguments)
                reads_so_far += len(wanted)
                indices = wanted
                while images is None:
                    unreadable = sum(int(index) in self._bad for index in wanted)
                    self._stop_above(skipped_reads + unreadable, reads_so_far)
                    indices = np.array([self._next_readable(order, int(index)) for index in wanted])
                    images = self._decode(self._read(indices), indices, arguments)
                skipped_reads += int((indices != wanted).sum())
                yield self._batch(images, indices)

    def evaluation_batches(self, indices: np.ndarray) -> Iterator[Batch]:
        with ThreadPoolExecutor(self._threads, "protoshard-read") as pool:
            size = self.decoder.batch_size
            parts = (indices[start : start + size] for start in range(0, len(indices), size))
            for wanted, arguments, encoded in self._read_ahead(pool, ((part, {}) for part in parts)):
                images = self._decode(encoded, wanted, arguments)
                while images is None:
                    wanted = wanted[[int(index) not in self._bad for index in wanted]]
                    if not wanted.size:
                        break
                    images = self._decode(self._read(wanted), wanted, arguments)
                else:
                    yield self._batch(images, wanted)

    def _read_ahead(
        self, pool: ThreadPoolExecutor, requests: Iterable[tuple[np.ndarray, dict[str, np.ndarray]]]
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], list[bytes | Unreadable]]]:
        """Adds the encoded images to each request while the one before it is decoded; several threads hide the latency of storage."""
        pending: deque[_Request] = deque()
        for request in itertools.chain(requests, [None]):
            if request is not None:
                parts = np.array_split(request[0], self._threads)
                pending.append(_Request(*request, [pool.submit(self._read, part) for part in parts]))
            while pending and (request is None or len(pending) > 1):
                indices, arguments, reads = pending.popleft()
                yield indices, arguments, [data for read in reads for data in read.result()]

    def _read(self, indices: np.ndarray) -> list[bytes | Unreadable]:
        return [_KNOWN if index in self._bad else read_image(self._source, index) for index in indices.tolist()]

    def _decode(self, encoded: list[bytes | Unreadable], indices: np.ndarray, arguments: dict[str, np.ndarray]) -> torch.Tensor | None:
        """The images of a batch, or None after naming those of it that cannot be decoded."""
        try:
            return self.decoder(encoded, arguments)
        except UnreadableImagesError as error:
            why = {int(indices[at]): reason for at, reason in error.why.items()}
        for index in sorted(why.keys() - self._bad):
            self._name_unreadable(index, why[index])
        return None

    def _name_unreadable(self, index: int, reason: str) -> None:
        name = self._source.name(index)
        log.warning("skipping unreadable image %s: %s", name, reason)
        self._bad.add(index)
        self._skipped.append(name)
        if self._skipped_path is not None:
            os.makedirs(os.path.dirname(self._skipped_path) or ".", exist_ok=True)
            with open(self._skipped_path, "a", encoding="utf-8") as file:
                file.write(f"{name}\t{reason}\n")

    def _stop_above(self, skipped_reads: int, reads_so_far: int) -> None:
        images = len(self._source)
        if skipped_reads > MAX_SKIPPED * max(reads_so_far, min(images, _JUDGED)) or len(self._bad) > MAX_SKIPPED * images:
            where = f"listed in {self._skipped_path}" if self._skipped_path else f"the first are {', '.join(self._skipped[:3])}"
            count = max(skipped_reads, len(self._bad))
            raise ValueError(
                f"{count} unreadable images among the first {reads_so_far} of {self._source.path} are more than "
                f"{MAX_SKIPPED:.0%} ({where}); repair or remove them."
            )

    def _next_readable(self, order: Order, index: int) -> int:
        return next(other for other in order.replacements(index) if other not in self._bad)

    def _batch(self, images: torch.Tensor, indices: np.ndarray) -> Batch:
        return Batch(images, self.decoder.to_device(self._labels[torch.from_numpy(indices)]), indices)


def _on_current_stream(batch: Batch) -> Batch:
    """Tells the allocator that the training stream uses memory which the feeding thread's stream allocated."""
    if batch.images.is_cuda:
        stream = torch.cuda.current_stream(batch.images.device)
        batch.images.record_stream(stream)
        batch.labels.record_stream(stream)
    return batch
