"""An iterator that runs in a thread of its own, a few items ahead of its consumer."""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
_END = object()


class Background(Generic[T]):
    """Runs `items` in a thread, up to `depth` items ahead. An exception of `items` is raised again by the consumer's next().

    device: what `items` works on; a GPU becomes the thread's current one."""

    def __init__(self, items: Iterator[T], depth: int, device: torch.device | None = None) -> None:
        self.wait_seconds = 0.0
        self._ready: queue.Queue = queue.Queue(depth)
        stop = threading.Event()
        thread = threading.Thread(target=_produce, args=(items, device, self._ready, stop), name="protoshard-data", daemon=True)
        # The finalizer also runs when the iterator is dropped or the interpreter ends: a daemon thread inside a native library would crash
        # the exit. Registered by itself, since the last one runs first: before the library shuts down what the thread still uses.
        self._finalizer = weakref.finalize(self, _finish, thread, self._ready, stop)
        atexit.register(self._finalizer)
        thread.start()

    def __iter__(self) -> Background[T]:
        return self

    def __next__(self) -> T:
        if not self._finalizer.alive:
            raise StopIteration
        start = time.perf_counter()
        item = self._ready.get()
        self.wait_seconds += time.perf_counter() - start
        if item is _END:
            self.close()
            raise StopIteration
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Stops the thread and waits for it."""
        self._finalizer()
        atexit.unregister(self._finalizer)


def _produce(items: Iterator[T], device: torch.device | None, ready: queue.Queue, stop: threading.Event) -> None:
    last: object = _END
    try:
        try:
            if device is not None and device.type == "cuda":
                # First of all, since a new thread stands on GPU 0, where whatever touches CUDA would open a context of half a gigabyte.
                torch.cuda.set_device(device)
            for item in items:
                if not _put(item, ready, stop):
                    break
        finally:
            items.close()  # type: ignore[attr-defined]
    except BaseException as error:  # also one of close(): the consumer waits for something
        last = error
    _put(last, ready, stop)


def _put(item: object, ready: queue.Queue, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            pass
    return False


def _finish(thread: threading.Thread, ready: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    thread.join()
    while not ready.empty():
        ready.get_nowait()
