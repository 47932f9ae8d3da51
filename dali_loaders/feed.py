"""Reads ahead, decodes, and deals with unreadable images: from image numbers to batches, in one thread and a few that read.

While DALI decodes a batch, this thread looks at the headers of the next one, and the reading threads fetch the one after that."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from dali_loaders.augment import augment_arguments
from dali_loaders.config import DataConfig
from dali_loaders.decode import Decoder, UnreadableImagesError
from dali_loaders.encoded import Unreadable, read_images
from dali_loaders.order import Order
from dali_loaders.readers import Part, Readers
from dali_loaders.skipped import Skipped
from dali_loaders.sources import Source

_BLOCK = 1024  # stream positions
_READ_AHEAD = 2  # batches, of which one is on its way while the other is looked at
_KNOWN = Unreadable("unreadable before")

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    images: torch.Tensor  # [b, 3, H, W], RGB, (x - 127.5) / 127.5
    labels: torch.Tensor  # int64 [b]
    indices: np.ndarray  # int64 [b]: dataset index of each row


@dataclass
class _Pending:
    """A batch on its way. What is unreadable in it is mended in place: replaced in training, dropped in evaluation."""

    wanted: np.ndarray  # int64 [b]
    arguments: dict[str, np.ndarray]
    reads: list[Part[bytes | Unreadable]] = field(default_factory=list)  # one per reading thread
    is_known: np.ndarray | None = None  # bool [b], what is not read since it is known to be unreadable; None: nothing is
    encoded: list[bytes | Unreadable] = field(default_factory=list)
    sizes_b2: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    indices: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # what stands at the places of `wanted`


Seen = Callable[
    [np.ndarray, np.ndarray], None
]  # gets numbers int64 [b] of decoded images and their sizes before any resizing, int64 [b, 2]
_Mend = Callable[[_Pending, list[int]], list[int]]  # mends a batch at these places, and says which are to be looked at again


class Feed:
    """From image numbers to batches. `stop`: for others to set when no more are wanted, since reads may be slow. `seen`, if given, is told
    of each batch, in the thread that feeds."""

    def __init__(self, source: Source, config: DataConfig, decoder: Decoder, skipped: Skipped, seen: Seen | None = None) -> None:
        self._source, self._config, self.decoder, self._skipped = source, config, decoder, skipped
        self._threads, self._seen = config.thread_count(), seen
        self._labels = torch.from_numpy(source.labels)
        self.stop = threading.Event()
        self._readers = Readers(
            lambda indices: read_images(source, np.asarray(indices)),
            source.path,
            source.name,
            self._threads,
            config.timeout,
            together=hasattr(source, "read_many"),
            stop=self.stop,
        )

    def doing(self) -> str:
        """For messages, from any thread."""
        return self._readers.doing() or "decoding"

    def train_batches(self, order: Order, seed: int, starts: Iterable[int]) -> Iterator[Batch]:
        """Batches of the stream positions from each of `starts` on; unreadable images are replaced as `order` says."""
        size = self.decoder.batch_size
        reads = replaced = 0

        def replace(batch: _Pending, bad: list[int]) -> list[int]:
            nonlocal replaced
            replaced += int((batch.indices[bad] == batch.wanted[bad]).sum())
            self._skipped.stop_above(replaced, reads)
            for at in bad:
                batch.indices[at] = next(i for i in order.replacements(int(batch.wanted[at])) if i not in self._skipped)
            for at, read in [(at, self._readers.submit([int(batch.indices[at])])) for at in bad]:
                (batch.encoded[at],) = self._readers.result(read)
            return bad

        def counted() -> Iterator[_Pending]:
            nonlocal reads
            for batch in self._read_ahead(self._train_requests(order, seed, starts)):
                reads += size
                yield batch

        return self._batches(counted(), replace)

    def _train_requests(self, order: Order, seed: int, starts: Iterable[int]) -> Iterator[_Pending]:
        """Order and random numbers of several batches at a time: for one of 128 images their dozens of calls to numpy take 1 ms, if the
        set is large, and for eight of them 1.3."""
        starts, size = iter(starts), self.decoder.batch_size
        augment, side = self._config.augment, self._config.image_size
        while block := list(itertools.islice(starts, max(1, _BLOCK // size))):
            positions = np.concatenate([np.arange(start, start + size) for start in block])
            wanted, arguments = order.at(positions), augment_arguments(augment, side, seed, positions)
            for part in (slice(at, at + size) for at in range(0, len(positions), size)):
                yield _Pending(wanted[part], {name: values[part] for name, values in arguments.items()})

    def evaluation_batches(self, indices: np.ndarray) -> Iterator[Batch]:
        """Batches of these images in their order; unreadable ones are left out, and counted at the end."""
        size, known = self.decoder.batch_size, len(self._skipped)

        def drop(batch: _Pending, bad: list[int]) -> list[int]:
            batch.encoded = [data for at, data in enumerate(batch.encoded) if at not in set(bad)]
            batch.sizes_b2, batch.indices = np.delete(batch.sizes_b2, bad, 0), np.delete(batch.indices, bad)
            return []

        requests = (_Pending(indices[start : start + size], {}) for start in range(0, len(indices), size))
        yield from self._batches(self._read_ahead(requests), drop)
        if len(self._skipped) > known:
            log.warning("%d unreadable images of %s are left out: %s", len(self._skipped), self._source.path, self._skipped.why())

    def _batches(self, pending: Iterator[_Pending], mend: _Mend) -> Iterator[Batch]:
        decoding: _Pending | None = None
        try:
            for batch in itertools.chain(pending, [None]):
                if batch is not None:
                    self._examine(batch, range(len(batch.wanted)), mend)
                done = decoding and self._finish(decoding, mend)
                if batch is not None and len(batch.indices):
                    self._start(batch)
                    decoding = batch
                else:
                    decoding = None
                if done:
                    yield done
        finally:
            self._readers.close()

    def _examine(self, batch: _Pending, places: Iterable[int], mend: _Mend) -> None:
        """Looks at the headers of the images at these places, until what stands there has sound ones."""
        places = list(places)
        while places:
            sizes_b2, why = self.decoder.sizes([batch.encoded[at] for at in places])
            batch.sizes_b2[places] = sizes_b2
            places = self._mend(batch, {places[at]: reason for at, reason in why.items()}, mend)

    def _mend(self, batch: _Pending, why: dict[int, str], mend: _Mend) -> list[int]:
        for at in sorted(why, key=lambda at: batch.indices[at]):
            self._skipped.add(int(batch.indices[at]), why[at])
        return mend(batch, sorted(why)) if why else []

    def _start(self, batch: _Pending) -> None:
        encoded = [data for data in batch.encoded if not isinstance(data, Unreadable)]  # all of them
        self.decoder.start(encoded, batch.sizes_b2, batch.arguments)

    def _finish(self, batch: _Pending, mend: _Mend) -> Batch | None:
        """None where no image is left."""
        while True:
            try:
                images = self.decoder.finish()
            except UnreadableImagesError as error:
                self._examine(batch, self._mend(batch, error.why, mend), mend)
            else:
                if self._seen:
                    self._seen(batch.indices, batch.sizes_b2)
                return Batch(images, self.decoder.to_device(self._labels[torch.from_numpy(batch.indices)]), batch.indices)
            if not len(batch.indices):
                return None
            self._start(batch)

    def _read_ahead(self, requests: Iterator[_Pending]) -> Iterator[_Pending]:
        """Adds the encoded images to each request while the one before it is decoded. Several threads hide the latency of storage, but each
        part that one reads costs about 80 us of Python, which the others wait for. So parts double only while decoding has waited for them
        for a tenth of the time."""
        pending: deque[_Pending] = deque()
        parts, read, last = 1, 0, time.perf_counter()
        for request in itertools.chain(requests, [None]):
            if request is not None:
                self._submit(request, parts)
                pending.append(request)
            while pending and (request is None or len(pending) >= _READ_AHEAD):
                batch, begun = pending.popleft(), time.perf_counter()
                batch.encoded = self._encoded(batch)
                read, now = read + 1, time.perf_counter()
                if read > _READ_AHEAD and now - begun > 0.1 * (now - last):
                    parts = min(2 * parts, self._threads)
                last = now
                batch.indices, batch.sizes_b2 = batch.wanted.copy(), np.zeros((len(batch.wanted), 2), np.int64)
                batch.reads = []
                yield batch

    def _submit(self, batch: _Pending, parts: int) -> None:
        """What is known to be unreadable is not read again."""
        wanted = batch.wanted
        if len(self._skipped):
            batch.is_known = np.array([index in self._skipped for index in wanted.tolist()], bool)
            wanted = wanted[~batch.is_known]
        batch.reads = [self._readers.submit(part) for part in np.array_split(wanted, parts) if len(part)]

    def _encoded(self, batch: _Pending) -> list[bytes | Unreadable]:
        encoded = [data for part in batch.reads for data in self._readers.result(part)]
        if batch.is_known is None:
            return encoded
        found = iter(encoded)
        return [_KNOWN if is_known else next(found) for is_known in batch.is_known.tolist()]
