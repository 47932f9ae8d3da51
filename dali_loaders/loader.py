"""Batches for one rank, read and decoded in the background while the training step runs; resumable at any sample.

Which image stands at which place, and how it is augmented, depends on (seed, position in the stream) only, not on the number of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from dali_loaders.background import Background
from dali_loaders.config import DataConfig
from dali_loaders.decode import Decoder
from dali_loaders.feed import Batch as Batch
from dali_loaders.feed import Feed, Seen
from dali_loaders.order import build_order, part_of_rank
from dali_loaders.skipped import Skipped
from dali_loaders.sources import Source


class TrainLoader:
    """Endless iterator over this rank's slice of the global batches; images and labels are on `device`, images with `dtype` (float32 or
    float16) and in the memory format `channels_last` if asked.

    Global batch k is the stream positions [consumed + k * global_batch, + global_batch) of the order (UniformOrder, or GroupedOrder where
    config.images_per_identity is above 1); rank r takes its part of them (order.part_of_rank): whole groups, at most one more or less than
    another rank. An unreadable image is replaced by the next readable one (dataset index + 1, wrapping; with groups, of its own identity if
    there is one), logged, added to `skipped` and to the file `skipped_path`; more than 1 % of such reads end the iteration with a
    ValueError. So is one whose read takes longer than config.timeout; where that is the storage's fault, StorageError ends the iteration
    (readers.py).
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
        if global_batch < world_size * group or global_batch % group:
            groups = f" in groups of {group} images" if group > 1 else ""
            multiple = f"a multiple of {group} from {world_size * group} on" if group > 1 else f"at least {world_size}"
            raise ValueError(f"the global batch of {global_batch} does not divide among {world_size} ranks{groups}; choose {multiple}.")
        assert consumed >= 0
        part = part_of_rank(global_batch, rank, world_size, group)
        skipped = Skipped(source, skipped_path)
        self.skipped = skipped.names
        starts = itertools.count(consumed + part.start, global_batch)
        feed = Feed(source, config, _decoder(config, len(part), device, channels_last, dtype), skipped)
        batches = feed.train_batches(build_order(source, group, seed), seed, starts)
        self._batches = Background(batches, config.prefetch, feed.decoder.device, feed.stop, feed.doing)

    @property
    def wait_seconds(self) -> float:
        """Total time that __next__ has waited for data."""
        return self._batches.wait_seconds

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        return _on_current_stream(next(self._batches))

    def doing(self) -> str:
        """What the loader is at, from any thread: "reading set/anna/1.jpg for 63 s", or how many batches are ready."""
        return self._batches.doing()

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
    skipped: Skipped | None = None,
    seen: Seen | None = None,
) -> Iterator[Batch]:
    """The images `indices` in this order, as TrainLoader gives them, but not augmented. Rows of unreadable images are left out;
    `Batch.indices` says which are there, and `skipped` is told the others with their reasons. `seen` is told the heights and widths of
    those that are there, before they are stretched, by the time the last batch has come. The last batch may be smaller."""
    skipped = Skipped(source, None) if skipped is None else skipped
    feed = Feed(source, config, _decoder(config, batch_size, device, channels_last, dtype), skipped, seen)
    batches = feed.evaluation_batches(np.asarray(indices, np.int64))
    for batch in Background(batches, config.prefetch, feed.decoder.device, feed.stop, feed.doing):
        yield _on_current_stream(batch)


def _decoder(config: DataConfig, batch_size: int, device: torch.device | str, channels_last: bool, dtype: torch.dtype) -> Decoder:
    size, threads, on = config.image_size, config.thread_count(), torch.device(device)
    return Decoder(size, batch_size, threads, on, decoder=config.decoder, channels_last=channels_last, dtype=dtype)


def _on_current_stream(batch: Batch) -> Batch:
    """Tells the allocator that the training stream uses memory which the feeding thread's stream allocated."""
    if batch.images.is_cuda:
        stream = torch.cuda.current_stream(batch.images.device)
        batch.images.record_stream(stream)
        batch.labels.record_stream(stream)
    return batch
