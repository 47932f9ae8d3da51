"""TensorBoard's event files, written by whoever calls. torch's own writer has a thread for it, which dies of a full disk, and from then on
every call raises what it died of."""

from __future__ import annotations

import itertools
import os
import re
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.monitor.appending import Appending

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

NAME = "events.out.tfevents."
_count = itertools.count()


def open_tensorboard(folder: Path, first_step: int) -> SummaryWriter | None:
    """A writer whose readers forget older events from `first_step` on; None where the package is missing. Imported late: it is slow.

    Its methods raise OSError where their record is not written. The file is made with the first record."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import FileWriter, SummaryWriter
    except ImportError:
        return None

    class EventFile:
        """What torch's FileWriter has as `event_writer`."""

        def __init__(self) -> None:
            self._file: Appending | None = None
            self._due: list[bytes] = []  # of a record that is being made

        def add_event(self, event: Any) -> None:
            records = [event]
            if self._file is None:
                self._file = Appending(folder / _name(folder))
                self._is_empty = True
            if self._is_empty:
                start = SessionLog(status=SessionLog.START)
                version = {"wall_time": event.wall_time, "file_version": "brain.Event:2"}
                records[:0] = [Event(**version), Event(wall_time=event.wall_time, step=first_step, session_log=start)]
            for record in records:
                RecordWriter(self).write(record.SerializeToString())
            due, self._due = b"".join(self._due), []
            self._file.append(due)
            self._is_empty = False

        def write(self, data: bytes) -> None:
            self._due.append(data)

        def flush(self) -> None:
            pass

        def close(self) -> None:
            if self._file is not None:
                self._file.close()

    class Events(FileWriter):
        def __init__(self) -> None:
            self.event_writer = EventFile()

    class Board(SummaryWriter):
        def _get_file_writer(self) -> Any:
            if self.file_writer is None:
                writer: Any = Events()
                writers: Any = {self.log_dir: writer}
                self.file_writer, self.all_writers = writer, writers
            return self.file_writer

    return Board(str(folder))


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
