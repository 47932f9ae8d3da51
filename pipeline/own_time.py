"""How long a rank needs for its own part of a step, before it first meets the others: its data, and the forward pass of its backbone. The
whole step takes as long on every rank, since each waits for the slowest; this tells which one that is."""

from __future__ import annotations

import time

import torch


class OwnTime:
    """Sums up; nothing waits for the device until `take`, at which it has been waited for anyway."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._began: float | torch.cuda.Event = 0.0
        self._seconds, self._pairs = 0.0, list[tuple[torch.cuda.Event, torch.cuda.Event]]()

    def begin(self) -> None:
        self._began = self._now()

    def end(self) -> None:
        now = self._now()
        if isinstance(now, float):
            assert isinstance(self._began, float)
            self._seconds += now - self._began
        elif isinstance(self._began, torch.cuda.Event):
            self._pairs.append((self._began, now))

    def take(self) -> float:
        """Seconds since the last call."""
        seconds = self._seconds + sum(began.elapsed_time(ended) for began, ended in self._pairs) / 1e3
        self._seconds, self._pairs = 0.0, []
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
