"""A line on a terminal that says how far a long task is. Where standard error is no terminal it prints nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_SECONDS = 0.25  # between two looks of the line


class Progress:
    """Counts what is done; the line is drawn anew at most four times a second."""

    def __init__(self, what: str, total: int | None, stream: TextIO | None) -> None:
        self._what, self._total, self._stream = what, total, stream
        self._done, self._start, self._drawn, self._width = 0, time.monotonic(), 0.0, 0

    def add(self, count: int = 1) -> None:
        self._done += count
        if self._stream is not None and time.monotonic() - self._drawn >= _SECONDS:
            self._drawn = time.monotonic()
            self._draw(self._stream)

    def _draw(self, stream: TextIO) -> None:
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        line = f"{self._what} {self._done:,}"
        if self._total:
            left = max(0, self._total - self._done) / max(rate, 1e-9)
            line += f" of {self._total:,} ({self._done / self._total:.0%}), {rate:,.0f}/s, {_clock(left)} left"
        else:
            line += f", {rate:,.0f}/s"
        stream.write("\r" + line.ljust(self._width))
        stream.flush()
        self._width = len(line)

    def erase(self) -> None:
        if self._stream is not None and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Progress]:
    """`with progress("checking", len(source)) as done: ... done.add(256)`: "checking 5,120 of 8,000 (64%), 2,900/s, 0:01 left", erased at
    the end. `total` None: it is not known beforehand."""
    # A closed or absent standard error (a daemon's) is no terminal either.
    shown = Progress(what, total, sys.stderr if sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty() else None)
    try:
        yield shown
    finally:
        shown.erase()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
