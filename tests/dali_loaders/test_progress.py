"""How far a long task is, on a terminal, in a log and for ranks that do the same as rank 0."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest

from dali_loaders import progress as module
from dali_loaders.progress import announce, progress, time_left


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_terminal_without_tqdm_gets_lines(monkeypatch, clock):
    """Where only an export is used, the extra train is not installed."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("embedding", 100) as done:
        clock.now = module.LINE_SECONDS
        done.add(50)
    assert terminal.getvalue().startswith("embedding: 50 of 100 (50%)")


@pytest.mark.parametrize("columns", [40, 80])
def test_a_terminal_sees_how_far_it_is_and_nothing_at_the_end(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "24")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    name = "checking a file with a very long name indeed.tar"
    with progress(name, 8000) as done:
        done._bar.mininterval = done._bar.delay = 0
        done.add(2000)
        done.add(2000)
        done.add(9000)
    lines = terminal.getvalue().split("\r")
    assert all(len(line) <= columns for line in lines)
    assert any("checking a file…" in line and " 50% |" in line and "4,000/8,000" in line for line in lines) or columns == 40
    assert columns == 40 or any(" left, " in line and "/s" in line for line in lines)
    assert columns == 40 or "8,000/8,000" in lines[-3]
    assert lines[-2].isspace() and lines[-1] == ""


def test_without_a_total(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(ZeroDivisionError), progress("reading") as done:
        done._bar.mininterval = done._bar.delay = 0
        done.add(5)
        raise ZeroDivisionError
    assert "reading 5, " in terminal.getvalue() and terminal.getvalue().endswith("\r")


def test_a_log_gets_a_line_now_and_then(monkeypatch, clock):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("checking", 8000) as done:
        for _ in range(80):
            clock.now += 1
            done.add(100)
    with progress("reading") as done:
        clock.now += 30
        done.add(60)
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "
    first, second, third = stream.getvalue().splitlines()
    assert re.fullmatch(time + r"checking: 3,000 of 8,000 \(38%\), 100/s, 0m50s left", first)
    assert re.fullmatch(time + r"checking: 6,000 of 8,000 \(75%\), 100/s, 0m20s left", second)
    assert re.fullmatch(time + "reading: 60, 2/s", third)


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_what_is_done_at_once_gives_no_line(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("checking", 10) as done:
        done.add(10)
    assert stream.getvalue() == ""


def test_nobody_hears_other_ranks(monkeypatch, clock):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("RANK", "1")
    with progress("checking", 10) as done:
        clock.now += 100
        done.add(1)
    announce("opening the data")
    assert stream.getvalue() == ""


def test_without_standard_error(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        announce("opening the data")
        with progress("checking", 10) as done:
            done.add(10)


def test_a_bar_is_drawn_only_a_few_times_a_second(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "SHORT_SECONDS", 0.0)
    with progress("checking", 100_000) as done:
        for _ in range(100_000):
            done.add()
    assert terminal.getvalue().count("checking") < 50


@pytest.mark.parametrize(("seconds", "text"), [(0.9, "0m01s"), (75, "1m15s"), (3661, "1h01m"), (3 * 86400 - 1, "2d23h"), (59.9, "1m00s")])
def test_time_left(seconds, text):
    assert time_left(seconds) == f"{text} left"


def test_a_line_on_a_terminal_does_not_mix_with_the_bars(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "SHORT_SECONDS", 0.0)
    with progress("checking", 100) as done:
        done._bar.mininterval = 0
        done.add(50)
        announce("a line")
    monkeypatch.setattr(module, "SHORT_SECONDS", 1e9)
    with progress("short", 100):
        announce("another")
    before, after = terminal.getvalue().split("a line\n")
    assert before.rpartition("\r")[0].rpartition("\r")[2].isspace() and before.endswith("\r")  # the bar was erased
    assert "checking  50%" in after and "short" not in terminal.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_warnings_are_lines_like_all_others(monkeypatch, is_terminal):
    stream = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logging.root, "handlers", [])
    module.show_warnings()
    module.show_warnings()
    logging.getLogger("dali_loaders.reading").warning("reading %s failed", "a.jpg")
    time = "" if is_terminal else r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "
    assert re.fullmatch(time + "reading a.jpg failed\n", stream.getvalue())
