"""An iterator that runs in a thread of its own, a few items ahead of its consumer."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from dali_loaders.waiting import waiting

T = TypeVar("T")
_END = object()
_LOOK = 1.0  # seconds between two looks whether the thread still lives
_GRACE = 10.0  # seconds that its end is waited for; it hangs if that takes longer


class Background(Generic[T]):
    """Runs `items` in a thread, up to `depth` items ahead. An exception of `items` is raised again by the consumer's next(), and whatever
    else ends the thread (SystemExit, say) as a RuntimeError there.

    device: what `items` works on; a GPU becomes the thread's current one
    stop: set when nobody wants more items, for `items` to look at
    work: says what `items` is at, for the log where the consumer waits long

    Once this is dropped the thread ends by itself; close() waits for that. RuntimeError from next() in a forked process, which has no such
    thread."""

    def __init__(
        self,
        items: Iterator[T],
        depth: int,
        device: torch.device | None = None,
        stop: threading.Event | None = None,
        work: Callable[[], str] = lambda: "working",
    ) -> None:
        self.wait_seconds = 0.0
        self._process = os.getpid()
        self._ready: queue.Queue = queue.Queue(depth)
        self._stop = stop or threading.Event()
        self._work = work
        self._thread = threading.Thread(target=_produce, args=(items, device, self._ready, self._stop), name="protoshard-data", daemon=True)
        # Not waited for: any thread may be the one that collects a cycle, also those that `items` waits for.
        weakref.finalize(self, self._stop.set)
        # Waited for at the interpreter's end: a daemon thread inside a native library would crash the exit. The last one registered runs
        # first: before the library shuts down what the thread still uses.
        self._finish = partial(_finish, self._thread, self._ready, self._stop)
        atexit.register(self._finish)
        self._thread.start()

    def __iter__(self) -> Background[T]:
        return self

    def __next__(self) -> T:
        if self._process != os.getpid():
            raise RuntimeError("this process was forked from the one that loads, without its threads; start it by spawn and load there.")
        if self._stop.is_set():
            raise StopIteration
        start = time.perf_counter()
        item: Any = self._next()
        self.wait_seconds += time.perf_counter() - start
        if item is _END:
            self.close()
            raise StopIteration
        if isinstance(item, BaseException):
            self.close()
            if isinstance(item, Exception):
                raise item
            # Raised here, SystemExit would end the program without a word, and as if all were well.
            raise RuntimeError(f"loading data was ended by {type(item).__name__} {item}".rstrip()) from item
        return item

    def doing(self) -> str:
        """What is at hand or on its way, from any thread."""
        if self._stop.is_set() or not self._thread.is_alive():
            return "ended"
        ready = self._ready.qsize()
        return f"{ready} ahead" if ready else self._work()

    def close(self) -> None:
        """Stops the thread and waits for it; whoever waits in next() gets StopIteration."""
        self._finish()
        atexit.unregister(self._finish)

    def _next(self) -> object:
        with suppress(queue.Empty):
            return self._ready.get_nowait()
        with waiting(lambda: f"data: {self.doing()}"):
            while True:
                alive = self._thread.is_alive()  # asked first: its last item may come after a look at the queue
                with suppress(queue.Empty):
                    return self._ready.get(timeout=_LOOK)
                if not alive and self._stop.is_set():
                    return _END
                if not alive:
                    return RuntimeError("the thread that loads data has ended without a word")


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
    if not _put(last, ready, stop):
        _empty(ready)  # nobody may be left to do it


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
    thread.join(_GRACE)
    _empty(ready)
    with suppress(queue.Full):
        ready.put_nowait(_END)


def _empty(ready: queue.Queue) -> None:
    with suppress(queue.Empty):
        while True:
            ready.get_nowait()
