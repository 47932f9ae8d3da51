"""Work on images in several threads, with the results in order. Reading, decoding and encoding run outside of Python's lock."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dali_loaders.account import ReadError

_CHUNK = 8  # images of one task; what is read ahead is held in memory: 128 images with 8 threads, 0.6 GB of photos with 12 megapixels
MOST_WORKERS = 8


def worker_count(workers: int) -> int:
    """`workers`, or for 0 as many as there are cores, but at most 8."""
    if workers < 0:
        raise ValueError(f"images cannot be packed by {workers} workers; use 0 for as many as there are cores.")
    return workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def in_order(work: Callable[[int], bytes], indices: np.ndarray, workers: int) -> Generator[bytes | ReadError, None, None]:
    """work(index) of every index, int64 [n], or the ReadError it raised, in the order of the indices whatever the number of workers."""

    def chunk(start: int) -> list[bytes | ReadError]:
        return [_result(work, index) for index in indices[start : start + _CHUNK].tolist()]

    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[list[bytes | ReadError]]] = deque()
    starts = iter(range(0, len(indices), _CHUNK))
    try:
        waiting.extend(pool.submit(chunk, start) for start in itertools.islice(starts, 2 * workers))
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(pool.submit(chunk, start) for start in itertools.islice(starts, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _result(work: Callable[[int], bytes], index: int) -> bytes | ReadError:
    try:
        return work(index)
    except ReadError as error:
        return error
