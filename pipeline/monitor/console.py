"""Progress for people: a bar on a terminal (tqdm), and in a log plain lines with date and time, which get rarer as the run goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TextIO

from dali_loaders.progress import bar, clock, columns, say, time_left

# In the order in which a terminal that is too narrow leaves them out, from the last on.
SHOWN = {
    "loss": "loss {:.4f}",
    "images_per_second": "{:,.0f} images/s",
    "epoch": "epoch {:.2f}",
    "learning_rate": "lr {:.3g}",
    "wait_share": "{:.0%} waiting for data",
}
BAR = 10  # least columns of the bar
SHORTEST, LONGEST = 10.0, 600.0  # seconds between two lines of a log: a hundredth of the time so far, within these


class Console:
    """Progress of a run of `total_steps` that goes on from `first_step`. The remaining time is estimated from the first report on."""

    def __init__(self, stream: TextIO, total_steps: int, first_step: int = 0) -> None:
        self._stream: Any = _Patient(stream)  # as much of a stream as is used
        self._total = total_steps
        self._bar: Any = None
        if self._stream.isatty():
            self._bar = bar(total=total_steps, initial=first_step, file=self._stream, leave=True, delay=1e9, bar_format="")
        self._began = time.monotonic()
        self._line_at = 0.0
        self._start: tuple[int, float] | None = None
        self._shown: dict[str, str] = {}

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the values named in SHOWN, each until a newer one comes; a call without any of them changes nothing."""
        names = {name.rpartition("/")[2]: name for name in values}
        fresh = {name: form.format(values[names[name]]) for name, form in SHOWN.items() if name in names}
        if not fresh:
            return
        self._shown.update(fresh)
        now = time.monotonic()
        self._start = self._start or (step, now)
        parts = [f"{step:,}/{self._total:,}", *self._remaining(step, now), *(self._shown[name] for name in SHOWN if name in self._shown)]
        if self._bar is not None:
            self._draw(step, parts)
        elif now >= self._line_at or step >= self._total:
            self._line_at = now + min(max((now - self._began) / 100, SHORTEST), LONGEST)
            self._stream.write(f"{clock()}  step {'  '.join(parts)}\n")

    def _draw(self, step: int, parts: list[str]) -> None:
        share = f"{min(1.0, step / self._total):4.0%} |"
        room = columns(self._stream) - len(share) - BAR - 2
        while len(parts) > 1 and len("  ".join(parts)) > room:
            parts = parts[:-1]
        self._bar.n, self._bar.delay = step, 0  # closing keeps on the screen what was shown at all
        self._bar.bar_format = f"{share}{{bar}}| {'  '.join(parts)}"
        self._bar.refresh()

    def say(self, message: str) -> None:
        """Writes a line of its own; bars stay below it."""
        say(message, self._stream)

    def close(self) -> None:
        """Keeps the last state of the bar on the screen, with the cursor below it."""
        if self._bar is not None:
            if self._start is None:
                self._bar.leave = False
            self._bar.close()
            self._bar = None

    def _remaining(self, step: int, now: float) -> list[str]:
        assert self._start is not None
        first, started = self._start
        if step <= first or step >= self._total:
            return []
        return [time_left((self._total - step) * (now - started) / (step - first))]


class _Patient:
    """A stream for lines of a run, which neither a terminal that was closed, a pipe without a reader nor a log on a full disk ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lost = stream, 0  # lines that could not be written
        self.encoding = getattr(stream, "encoding", None)

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> None:
        try:
            if self._lost:
                self._stream.write(f"{self._lost} lines may be missing here, which could not be written\n")
            self._stream.write(text)
            self._stream.flush()
            self._lost = 0
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._lost += 1

    def flush(self) -> None:
        pass
