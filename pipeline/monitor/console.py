"""Progress for people: one line updated in place on a terminal, one plain line every few steps in a log."""

import shutil
import time
from collections.abc import Mapping
from typing import TextIO

SHOWN = {"loss": "loss {:.4f}", "images_per_second": "{:,.0f} images/s", "wait_share": "{:.0%} waiting for data"}
REDRAW_SECONDS = 0.1
CLEAR_LINE = "\r\x1b[2K"


class Console:
    """Progress of a run of `total_steps` that goes on from `first_step`. The remaining time is estimated from the first report on."""

    def __init__(self, stream: TextIO, total_steps: int, first_step: int = 0, every: int = 50) -> None:
        self._stream = stream
        self._terminal = not stream.closed and stream.isatty()
        self._lost = 0  # lines that could not be written
        self._total = total_steps
        self._every = every
        self._next_step = first_step
        self._redraw_at = 0.0
        self._start: tuple[int, float] | None = None
        self._shown: dict[str, str] = {}
        self._line = ""

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the values named in SHOWN, each until a newer one comes; a call without any of them changes nothing."""
        names = {name.rpartition("/")[2]: name for name in values}
        fresh = {name: form.format(values[names[name]]) for name, form in SHOWN.items() if name in names}
        if not fresh:
            return
        self._shown.update(fresh)
        now = time.monotonic()
        self._start = self._start or (step, now)
        line = "  ".join(
            [f"step {step:,}/{self._total:,}", *(self._shown[n] for n in SHOWN if n in self._shown), *self._remaining(step, now)]
        )
        if self._terminal and (now >= self._redraw_at or step >= self._total):
            self._line = line[: shutil.get_terminal_size().columns - 1]
            self._redraw_at = now + REDRAW_SECONDS
            self._write(CLEAR_LINE + self._line)
        elif not self._terminal and (step >= self._next_step or step >= self._total):
            self._next_step = step + self._every
            self._write(line + "\n")

    def say(self, message: str) -> None:
        """Writes a line of its own; the progress line stays below it."""
        self._write((CLEAR_LINE if self._line else "") + message + "\n" + self._line)

    def close(self) -> None:
        """Keeps the last progress line on the screen, with the cursor below it."""
        if self._line:
            self._line = ""
            self._write("\n")

    def _remaining(self, step: int, now: float) -> list[str]:
        assert self._start is not None
        first, started = self._start
        if step <= first or step >= self._total:
            return []
        seconds = round((self._total - step) * (now - started) / (step - first))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return [f"{hours}h{minutes:02d}m left" if hours else f"{minutes}m{seconds % 60:02d}s left"]

    def _write(self, text: str) -> None:
        """A terminal that was closed, a pipe without a reader or a log on a full disk does not end a run."""
        try:
            if self._lost:
                self._stream.write(f"{self._lost} lines may be missing here, which could not be written\n")
            self._stream.write(text)
            self._stream.flush()
            self._lost = 0
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._lost += 1
