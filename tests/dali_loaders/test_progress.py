"""The line of a long task, on a terminal and elsewhere."""

import io
import sys

import pytest

from dali_loaders import progress as module
from dali_loaders.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_how_far_it_is_and_nothing_at_the_end(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "_SECONDS", 0)
    with progress("checking", 8000) as done:
        done.add(2000)
        done.add(2000)
    lines = terminal.getvalue().split("\r")
    assert lines[1].startswith("checking 2,000 of 8,000 (25%), ")
    assert lines[2].startswith("checking 4,000 of 8,000 (50%), ") and " left" in lines[2]
    assert lines[-2].isspace() and lines[-1] == ""


def test_without_a_total(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "_SECONDS", 0)
    with pytest.raises(ZeroDivisionError), progress("reading") as done:
        done.add(5)
        raise ZeroDivisionError
    assert "reading 5, " in terminal.getvalue() and terminal.getvalue().endswith("\r")


@pytest.mark.parametrize("stream", [io.StringIO(), None])
def test_no_terminal_sees_nothing(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("checking", 10) as done:
        done.add(10)
    assert stream is None or stream.getvalue() == ""


def test_it_is_drawn_only_a_few_times_a_second(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("checking", 100_000) as done:
        for _ in range(100_000):
            done.add()
    assert terminal.getvalue().count("checking") < 20


@pytest.mark.parametrize(("seconds", "text"), [(0.9, "0:00"), (75, "1:15"), (3661, "1:01:01")])
def test_clock(seconds, text):
    assert module._clock(seconds) == text
