"""Progress on a terminal (one line, updated) and in a log (a line every k steps), against a clock the test sets."""

import io

import pytest

from pipeline.monitor import console
from pipeline.monitor.console import CLEAR_LINE, Console


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    times = iter(range(0, 10_000, 10))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(times)))
    monkeypatch.setenv("COLUMNS", "200")


def report(loss):
    return {"train/loss": loss, "train/images_per_second": 1234.5, "train/wait_share": 0.031, "train/learning_rate": 0.1}


def test_log_gets_one_plain_line_every_k_steps(clock):
    stream = io.StringIO()
    progress = Console(stream, total_steps=100, every=10)
    for step in range(0, 101, 4):
        progress.progress(step, report(loss=step))
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [0, 12, 24, 36, 48, 60, 72, 84, 96, 100]
    assert lines[0] == "step 0/100  loss 0.0000  1,234 images/s  3% waiting for data"
    assert lines[1].endswith("3m40s left"), "12 steps took 30 s, so 88 take 220 s"
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_terminal_keeps_one_line_and_puts_messages_above_it(clock):
    stream = Terminal()
    progress = Console(stream, total_steps=100)
    progress.progress(1, report(loss=5.0))
    progress.say("checkpoint saved")
    progress.progress(2, {"loss": 4.0})
    progress.close()
    first = "step 1/100  loss 5.0000  1,234 images/s  3% waiting for data"
    second = "step 2/100  loss 4.0000  1,234 images/s  3% waiting for data  16m20s left"
    assert stream.getvalue() == f"{CLEAR_LINE}{first}{CLEAR_LINE}checkpoint saved\n{first}{CLEAR_LINE}{second}\n"


def test_terminal_is_not_redrawn_faster_than_anyone_reads(monkeypatch):
    monkeypatch.setattr(console.time, "monotonic", lambda: 1.0)
    stream = Terminal()
    progress = Console(stream, total_steps=100)
    for step in range(101):
        progress.progress(step, report(loss=1.0))
    assert stream.getvalue().count(CLEAR_LINE) == 2, "the first report and the last"


def test_narrow_terminal_never_wraps(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    Console(stream, total_steps=100).progress(1, report(loss=5.0))
    assert len(stream.getvalue().removeprefix(CLEAR_LINE)) == 19


def test_evaluation_scalars_leave_the_progress_alone(clock):
    stream = io.StringIO()
    Console(stream, total_steps=100).progress(1, {"test/eer": 0.1})
    assert stream.getvalue() == ""


def test_hours_are_shown_without_seconds(clock):
    stream = io.StringIO()
    progress = Console(stream, total_steps=1001, every=1)
    progress.progress(0, report(loss=1.0))
    progress.progress(1, report(loss=1.0))
    assert stream.getvalue().endswith("2h46m left\n")
