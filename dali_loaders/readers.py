"""Threads that read images, each image within a time limit. One that hangs cannot be ended, so it is left behind: the image counts as
unreadable, another thread goes on with the next one, and where all reads hang the storage is at fault."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from typing import Generic, TypeVar

import numpy as np

from dali_loaders.account import StorageError, Unreadable

T = TypeVar("T")
Numbers = Sequence[int] | np.ndarray  # of images

MOST_HANGING = 4  # images at once; more are no chance, and each costs its time limit
_LOOK = 0.1  # seconds between two looks at reads that take long
_AWAKE = 1.0  # seconds of looks before a read is given up: after a SIGSTOP, say, all clocks have run on
_GRACE = 5.0  # seconds that closing waits for reads under way


class Part(Generic[T]):
    """Images on their way, by one thread."""

    def __init__(self, numbers: Numbers, singly: bool = False) -> None:
        self.numbers, self.singly = numbers, singly
        self.found: list[T] = []
        self.seen, self.since = 0, math.inf  # how many were found at the last look, and when that was found first
        self.thread: threading.Thread | None = None
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.left = False  # nobody waits for it any more
        self.kept: list[T] = []  # what was found until it was left
        self.hangs = False  # at an image that is known: numbers[len(kept)]
        self.rest: Part[T] | None = None  # the images behind it, read by another thread


class Readers(Generic[T]):
    """Up to `threads` threads.

    read: from numbers of images to what was read of each, one after the other; called in any of the threads
    path, name: of the set, and of an image, for messages
    timeout: seconds that the next image may take; 0 for any time
    together: `read` has images only when it has read all of them, so that it cannot be told which one hangs
    stop: set by others when nobody wants the images"""

    def __init__(
        self,
        read: Callable[[Numbers], Iterable[T]],
        path: str,
        name: Callable[[int], str],
        threads: int,
        timeout: float,
        *,
        together: bool = False,
        stop: threading.Event | None = None,
    ) -> None:
        self._read, self._path, self._name, self._together = read, path, name, together
        self._most, self._timeout = threads, timeout or math.inf
        self._stop = stop or threading.Event()
        self._queue: queue.SimpleQueue[Part[T] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: set[threading.Thread] = set()  # without those that hang
        self._active: set[Part[T]] = set()
        self._hanging: set[Part[T]] = set()  # images that were given up, and are not back yet
        self._answered = -math.inf  # when a read returned

    def submit(self, numbers: Numbers) -> Part[T]:
        part: Part[T] = Part(numbers)
        self._queue.put(part)
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._most:
            self._start()
        return part

    def result(self, part: Part[T]) -> list[T | Unreadable]:
        """What `read` gave for the images of a part, and Unreadable for those that took longer than the limit. Raises what `read` raised;
        StorageError where not the images are at fault; CancelledError once `stop` is set."""
        images: list[T | Unreadable] = []
        rest: Part[T] | None = part
        while rest is not None:
            part, rest = rest, None
            if self._is_done(part):
                if part.error is not None:
                    raise part.error
                images += part.found
            else:
                images += part.kept
                images += [Unreadable(f"no answer within {self._timeout:g} s")] * part.hangs
                rest = part.rest
        return images

    def doing(self) -> str:
        """Which read has been under way for the longest time; "" where there is none."""
        active = [part for part in list(self._active) if not (part.left or part.done.is_set())]
        if not active:
            return ""
        part = min(active, key=lambda part: part.since)
        return f"reading {self._called(part)} for {max(0.0, time.monotonic() - part.since):.0f} s"

    def close(self) -> None:
        """Ends the threads. Reads that have not begun are dropped, and those under way are waited for a moment."""
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            self._queue.put(None)
        for part in list(self._active):
            part.left = True
        until = time.monotonic() + _GRACE
        for thread in list(self._threads):
            thread.join(max(0.0, until - time.monotonic()))

    def _start(self, first: Part[T] | None = None) -> None:
        # Daemons, and no pool of concurrent.futures: the interpreter's end would wait for one that hangs.
        thread = threading.Thread(target=self._work, args=(first,), name="protoshard-read", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _work(self, first: Part[T] | None) -> None:
        part = first or self._next()
        while part is not None:
            self._fill(part)
            if part.left:
                return  # another one has this one's place
            part = self._next()
        self._queue.put(None)  # for the next one

    def _next(self) -> Part[T] | None:
        try:
            return self._queue.get_nowait()
        except queue.Empty:
            self._idle.release()
            return self._queue.get()

    def _fill(self, part: Part[T]) -> None:
        part.thread, part.since = threading.current_thread(), time.monotonic()
        self._active.add(part)
        try:
            if self._together and not part.singly:
                part.found.extend(self._read(part.numbers))
            else:
                for image in self._images(part):
                    if part.left:
                        break
                    part.found.append(image)
        except BaseException as error:  # whatever it is, somebody waits for it
            part.error = error
        self._answered = time.monotonic()
        part.done.set()  # first, see _give_up
        self._active.discard(part)
        self._hanging.discard(part)

    def _images(self, part: Part[T]) -> Iterable[T]:
        return (image for number in part.numbers for image in self._read([number])) if part.singly else self._read(part.numbers)

    def _is_done(self, part: Part[T]) -> bool:
        """Waits for that; False once it is given up."""
        look, awake = min(_LOOK, self._timeout / 4), 0.0
        while not part.left:
            begun = time.monotonic()
            if part.done.wait(look):
                return not part.left
            if self._stop.is_set():
                raise CancelledError
            if part.thread is not None and not part.thread.is_alive() and not part.done.is_set():
                raise RuntimeError(f"the thread that read {self._path} has ended without a word")
            now = time.monotonic()
            self._look(now)
            awake = awake + now - begun if now - begun < look + _AWAKE else 0.0
            if awake >= min(_AWAKE, self._timeout):
                self._give_up(now)
        return False

    def _look(self, now: float) -> None:
        """Who waits keeps the time, so that it costs the readers none."""
        for part in list(self._active):
            if len(part.found) > part.seen:
                part.seen, part.since, self._answered = len(part.found), now, now

    def _give_up(self, now: float) -> None:
        """All reads beyond their time, also those that nobody waits for yet: no thread may be left for the others."""
        for part in list(self._active):
            if part.left or now - part.since <= self._timeout:
                continue
            is_unclear, part.left, part.kept = self._is_unclear(part), True, list(part.found)
            part.hangs = not is_unclear and len(part.kept) == part.seen  # else it has gone on since the look
            if part.hangs:
                self._hanging.add(part)
                self._judge(part)
            if part.done.is_set():
                self._hanging.discard(part)
            if part.thread is not None:
                self._threads.discard(part.thread)
            rest = part.numbers[len(part.kept) + part.hangs :]
            part.rest = Part(rest, part.singly or is_unclear) if len(rest) else None
            self._start(part.rest)  # at once: what comes back tells whether the storage answers

    def _called(self, part: Part[T]) -> str:
        """The image that it is at, or the first of those that it reads together."""
        name = self._name(int(part.numbers[min(len(part.found), len(part.numbers) - 1)]))
        return f"{name} and {len(part.numbers) - 1} others" if self._is_unclear(part) else name

    def _is_unclear(self, part: Part[T]) -> bool:
        return self._together and not part.singly and not part.found and len(part.numbers) > 1

    def _judge(self, last: Part[T]) -> None:
        """StorageError unless it may be the images that hang: others were read meanwhile, and there are few of them."""
        hanging = [last, *(set(self._hanging) - {last})]
        if sum(part.since >= self._answered for part in hanging) < 2 and len(hanging) <= MOST_HANGING:
            return
        names = [self._called(part) for part in hanging]
        more = f" nor for {len(names) - 2} more" if len(names) > 2 else ""
        raise StorageError(
            f"{self._path} cannot be read: no answer within {self._timeout:g} s, neither for {names[0]} nor for {names[-1]}{more}; that is "
            "the fault of no image: mend the storage or network of this machine and resume, or give it more time by data.timeout."
        )
