"""Says what is waited for where that takes long: on the log after a minute, and to whoever asks what hangs in this process."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST = 60.0  # seconds until the first line; another one follows whenever the time has doubled

log = logging.getLogger(__name__)


class _Wait:
    def __init__(self, what: str | Callable[[], str]) -> None:
        self._what, self.since, self.next = what, time.monotonic(), FIRST

    def __str__(self) -> str:
        return f"waiting {time.monotonic() - self.since:.0f} s for {self._what if isinstance(self._what, str) else self._what()}"


_waits: set[_Wait] = set()
_watched_in = 0  # the process that has the watching thread, which a fork does not take along


@contextmanager
def waiting(what: str | Callable[[], str]) -> Iterator[None]:
    """`with waiting("the lock of x"): ...` A function is called in another thread, so it must not wait itself."""
    global _watched_in
    wait = _Wait(what)
    _waits.add(wait)
    if _watched_in != os.getpid():
        _watched_in = os.getpid()
        threading.Thread(target=_watch, name="protoshard-waiting", daemon=True).start()
    try:
        yield
    finally:
        _waits.discard(wait)


def waits() -> list[str]:
    """What threads of this process wait for just now, the longest first: "waiting 63 s for data: reading set/anna/1.jpg for 63 s"."""
    return [str(wait) for wait in sorted(_waits, key=lambda wait: wait.since)]


def _watch() -> None:
    pause = threading.Event()
    while not pause.wait(min(1.0, FIRST / 4)):
        for wait in list(_waits):
            if time.monotonic() - wait.since >= wait.next:
                wait.next *= 2
                log.warning("%s", str(wait))  # here, since every handler would ask anew
