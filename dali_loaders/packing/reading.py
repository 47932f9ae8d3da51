"""Work on images in several threads, with the results in order. Reading, decoding and encoding run outside of Python's lock."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing

import numpy as np

from dali_loaders.account import ReadError, Unreadable
from dali_loaders.config import TIMEOUT
from dali_loaders.packing.images import Images
from dali_loaders.readers import Part, Readers
from dali_loaders.waiting import waiting

_CHUNK = 8  # images of one task; what is read ahead is held in memory: 128 images with 8 threads, 0.6 GB of photos with 12 megapixels
MOST_WORKERS = 8


def worker_count(workers: int) -> int:
    """`workers`, or for 0 as many as there are cores, but at most 8."""
    if workers < 0:
        raise ValueError(f"images cannot be packed by {workers} workers; use 0 for as many as there are cores.")
    return workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def in_order(images: Images, indices: np.ndarray, workers: int, timeout: float = TIMEOUT) -> Generator[bytes | ReadError, None, None]:
    """images(index) of every index, int64 [n], or the ReadError it raised, in the order of the indices whatever the number of workers.

    timeout: seconds that an image may take; a ReadError then stands in its place. StorageError as Readers has it."""
    source = images.source
    readers: Readers[bytes | ReadError] = Readers(
        lambda numbers: (_result(images, int(index)) for index in numbers), source.path, source.name, workers, timeout
    )
    waiting_for: deque[Part[bytes | ReadError]] = deque()
    starts = iter(range(0, len(indices), _CHUNK))

    def submit(count: int) -> None:
        waiting_for.extend(readers.submit(indices[start : start + _CHUNK]) for start in itertools.islice(starts, count))

    with closing(readers):
        submit(2 * workers)
        while waiting_for:
            with waiting(lambda: f"data: {readers.doing()}"):
                results = readers.result(waiting_for.popleft())
            yield from (ReadError(image.reason) if isinstance(image, Unreadable) else image for image in results)
            submit(1)


def _result(work: Callable[[int], bytes], index: int) -> bytes | ReadError:
    try:
        return work(index)
    except ReadError as error:
        return error
