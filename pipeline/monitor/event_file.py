"""TensorBoard's event files, written by whoever calls. torch's own writer has a thread for it, which dies of a full disk, and from then on
every call raises what it died of."""

from __future__ import annotations

import itertools
import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from pipeline.monitor.appending import Appending

NAME = "events.out.tfevents."
_count = itertools.count()


class EventFile:
    """A new file in `folder`, whose readers forget older events from `first_step` on (None: nothing). It is made with the first record,
    and begins with `head`, what readers should know before that. Its name ends in `ending`."""

    def __init__(self, folder: Path, first_step: int | None, head: Sequence[Summary] = (), ending: str = "") -> None:
        self._folder, self._first_step, self._head, self._ending = folder, first_step, head, ending
        self._file: Appending | None = None
        self._is_empty = True
        self._due: list[bytes] = []  # of a record that is being made

    def add(self, step: int, *summaries: Summary) -> None:
        """One record. OSError if it is not written."""
        now = time.time()
        events = [Event(wall_time=now, step=step, summary=summary) for summary in summaries]
        if self._file is None:
            self._file = Appending(self._folder / f"{_name(self._folder)}{self._ending}")
        if self._is_empty:
            version: dict[str, Any] = {"wall_time": now, "file_version": "brain.Event:2"}
            first = [] if self._first_step is None else [SessionLog(status=SessionLog.START)]
            events[:0] = [
                Event(**version),
                *(Event(wall_time=now, step=self._first_step, session_log=start) for start in first),
                *(Event(wall_time=now, step=self._first_step, summary=summary) for summary in self._head),
            ]
        for event in events:
            RecordWriter(self).write(event.SerializeToString())
        due, self._due = b"".join(self._due), []
        self._file.append(due)
        self._is_empty = False

    def write(self, data: bytes) -> None:
        """What RecordWriter calls."""
        self._due.append(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _name(folder: Path) -> str:
    """Readers take the files of a folder in the order of their names, which begin with the time. A clock may have been set back."""
    times = [int(match[1]) for name in _names(folder) if (match := re.match(re.escape(NAME) + r"(\d{1,12})\.", name))]
    after = max(times, default=-1) + 1
    return f"{NAME}{max(int(time.time()), after):010d}.{socket.gethostname()}.{os.getpid()}.{next(_count)}"


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
