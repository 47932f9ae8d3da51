"""How far a long task is: tqdm's bar on a terminal, a plain line now and then in a log. Only rank 0 of a job speaks.

Without tqdm, as where only an export is used, a terminal gets the lines too."""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.util import find_spec
from typing import Any, TextIO

from dali_loaders.extras import extra

LINE_SECONDS = 30.0  # between two lines in a log; a task that is done before the first one gives none
SHORT_SECONDS = 0.5  # what is done by then shows no bar
_LONGEST = 30  # characters of what a bar is of, so that the time left is in sight on 80 columns
_SCALED = 10_000_000  # a total from which counts are shown as 12.3M: bytes, say
_WITH_TOTAL = "{desc} {percentage:3.0f}% |{bar}| COUNT, {remaining} left, {rate_noinv_fmt}"
_WITHOUT = "{desc} {n:,}, {elapsed}, {rate_noinv_fmt}"


def bar(**options: Any) -> Any:
    """A tqdm bar as wide as its terminal; others may stand above and below."""
    made = _kind_of_bar()(mininterval=0.1, ncols=columns(options["file"]), **options)
    made.dynamic_ncols = lambda stream: (columns(stream), None)
    return made


def columns(stream: TextIO) -> int:
    """Characters that fit into a line of the terminal that `stream` is; standard output may be a file."""
    try:
        return (int(os.environ.get("COLUMNS", 0)) or os.get_terminal_size(stream.fileno()).columns) - 1
    except (OSError, ValueError):
        return 79


@functools.cache
def _kind_of_bar() -> Any:
    """Without tqdm's watching thread and its lock between processes, neither of which is of use here."""
    with extra("train"):
        from tqdm import tqdm  # here, because most that imports this shows no bar

    class Bar(tqdm):
        monitor_interval = 0

    Bar.set_lock(threading.RLock())
    return Bar


class Progress:
    """Counts what is done."""

    def __init__(self, what: str, total: int | None, stream: TextIO | None) -> None:
        self._what, self._total, self._stream = what, total or None, stream
        self._done, self._start = 0, time.monotonic()
        self._line_at = self._start + LINE_SECONDS
        self._bar: Any = None
        if stream is not None and stream.isatty() and find_spec("tqdm"):
            form = _WITHOUT
            if self._total:
                form = _WITH_TOTAL.replace("COUNT", "{n:,}/{total:,}" if self._total < _SCALED else "{n_fmt}/{total_fmt}")
            options = {"bar_format": form, "unit": "", "unit_scale": True, "leave": False, "delay": SHORT_SECONDS}
            self._bar = bar(desc=_short(what), total=self._total, file=stream, **options)

    def add(self, count: int = 1) -> None:
        """More than the total is not done: the last batch of a task may be smaller than the others."""
        count = count if self._total is None else min(count, self._total - self._done)
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._stream is not None and time.monotonic() >= self._line_at:
            self._line_at = time.monotonic() + LINE_SECONDS
            say(self._line(), self._stream)

    def _line(self) -> str:
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        if not self._total:
            return f"{self._what}: {self._done:,}, {rate:,.0f}/s"
        left = max(0, self._total - self._done) / max(rate, 1e-9)
        return f"{self._what}: {self._done:,} of {self._total:,} ({self._done / self._total:.0%}), {rate:,.0f}/s, {time_left(left)}"

    def erase(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Progress]:
    """`with progress("checking", len(source)) as done: ... done.add(256)`. A bar is erased at the end. `total` None: it is not known
    beforehand."""
    # A closed or absent standard error (a daemon's) is told nothing, nor is it told by ranks that do the same as rank 0.
    speaks = sys.stderr is not None and not sys.stderr.closed and os.environ.get("RANK", "0") == "0"
    shown = Progress(what, total, sys.stderr if speaks else None)
    try:
        yield shown
    finally:
        shown.erase()


def announce(what: str) -> None:
    """A line on what begins now, of rank 0, on standard error."""
    if sys.stderr is not None and not sys.stderr.closed and os.environ.get("RANK", "0") == "0":
        say(what, sys.stderr)


def say(message: str, stream: TextIO) -> None:
    """A line; one of a log has date and time, and one of a terminal stands above its bars. Nobody may be left to read it."""
    with suppress(OSError, ValueError), _no_bars():
        stream.write(("" if stream.isatty() else f"{clock()}  ") + message + "\n")
        stream.flush()


@contextmanager
def _no_bars() -> Iterator[None]:
    """What is written inside does not mix with a bar; those that are on the screen are drawn again."""
    if not _kind_of_bar.cache_info().currsize:
        yield
        return
    kind = _kind_of_bar()
    with kind.get_lock():
        shown = [each for each in getattr(kind, "_instances", ()) if each.last_print_t >= each.start_t + each.delay]
        for each in shown:
            each.clear(nolock=True)
        try:
            yield
        finally:
            for each in shown:
                each.refresh(nolock=True)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:
            say(self.format(record), sys.stderr)


def show_warnings() -> None:
    """Warnings that modules log are lines like all others, unless the program has handlers of its own."""
    logging.basicConfig(format="%(message)s", handlers=[_Lines()])


def clock() -> str:
    """Date and time here, as a line of a log begins."""
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S")


def time_left(seconds: float) -> str:
    """ "2d03h left", "2h05m left" or "3m20s left"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d{hours:02}h" if days else f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s") + " left"


def _short(what: str) -> str:
    half = _LONGEST // 2
    return what if len(what) <= _LONGEST else f"{what[:half]}…{what[1 - half :]}"
