"""Progress on a terminal (one bar, updated) and in a log (lines that get rarer), against a clock the test sets."""

from __future__ import annotations

import io
import re

import pytest

from pipeline.monitor import console
from pipeline.monitor.console import Console

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(console.time, "monotonic", lambda: Clock.now)
    Clock.now = 1000.0
    return Clock


def report(loss=4.5, epoch=1.25):
    return {"loss": loss, "images_per_second": 1234.5, "wait_share": 0.031, "learning_rate": 0.0421, "epoch": epoch, "gradient_norm": 3.0}


def test_a_line_of_a_log_says_when_how_far_and_how_fast(clock):
    stream = io.StringIO()
    progress = Console(stream, total_steps=1000)
    progress.progress(20, report())
    clock.now += 60
    progress.progress(120, report(loss=3.0, epoch=2.5))
    progress.say("checkpoint saved: runs/x/checkpoints/step-00000120")
    progress.close()
    first, second, third = stream.getvalue().splitlines()
    assert re.fullmatch(rf"{TIME}step 20/1,000  loss 4\.5000  1,234 images/s  epoch 1\.25  lr 0\.0421  3% waiting for data", first)
    rest = r"loss 3\.0000  1,234 images/s  epoch 2\.50  lr 0\.0421  3% waiting for data"
    assert re.fullmatch(rf"{TIME}step 120/1,000  8m48s left  {rest}", second)
    assert re.fullmatch(rf"{TIME}checkpoint saved: runs/x/checkpoints/step-00000120", third)


def test_a_log_of_three_days_can_be_read(clock):
    """A step a second, and metrics every 20: a line every 10 s at first, every 10 minutes in the end."""
    stream = io.StringIO()
    progress = Console(stream, total_steps=3 * 24 * 3600)
    steps = range(20, 3 * 24 * 3600 + 1, 20)
    for step in steps:
        clock.now = 1000.0 + step
        progress.progress(step, report())
    lines = stream.getvalue().splitlines()
    assert 300 < len(lines) < 1500 and "step 259,200/259,200" in lines[-1]
    assert "2d23h left" in lines[1] and "step 40/" in lines[1]


def test_a_bar_of_80_columns_shows_the_time_left(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    progress = Console(stream, total_steps=1_000_000)
    progress.progress(20, report())
    clock.now += 3600
    progress.progress(123_456, report(loss=12.3456))
    progress.close()
    line = stream.getvalue().split("\r")[-1].rstrip("\n")
    assert len(line) < 80 and "█" in line
    assert "12% |" in line and "123,456/1,000,000  7h06m left  loss 12.3456  1,234 images/s" in line


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_no_terminal_is_too_narrow(clock, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    progress = Console(stream, total_steps=100)
    for step in (1, 50):
        clock.now += 10
        progress.progress(step, report())
    progress.close()
    lines = [line for line in re.split(r"[\r\n]", stream.getvalue()) if line.strip()]
    assert lines and all(len(line) <= columns for line in lines)
    assert columns < 40 or "10s left" in lines[-1]


def test_messages_stand_above_the_bar(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    progress = Console(stream, total_steps=100)
    progress.say("first")
    progress.progress(1, report())
    progress.say("checkpoint saved")
    progress.close()
    text = stream.getvalue()
    assert text.index("first\n") < text.index("1/100") < text.index("checkpoint saved\n") < text.rindex("1/100")
    assert text.endswith("\n") and not re.search(TIME, text)


def test_a_run_that_reports_nothing_leaves_no_bar(clock):
    stream = Terminal()
    progress = Console(stream, total_steps=100)
    progress.say("refused")
    progress.close()
    assert stream.getvalue().replace("\r", "").strip(" ") == "refused\n"


def test_figures_that_are_not_shown_leave_the_progress_alone(clock):
    stream = io.StringIO()
    Console(stream, total_steps=100).progress(1, {"prototypes/norm": 0.1})
    assert stream.getvalue() == ""
