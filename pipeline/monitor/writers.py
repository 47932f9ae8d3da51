"""Where metrics go on disk: metrics.jsonl (one JSON object per line) and TensorBoard's event files."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class JsonLines:
    """Appends {"step", "time" (seconds since 1970), name: value, ...} lines to `path`, flushed one by one.

    Lines of step `first_step` or later are dropped first, and so is a last line that a killed run left half-written. NaN and infinities,
    which JSON does not know, become null.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _drop_from(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        record: dict[str, float | None] = {"step": step, "time": round(time.time(), 3)}
        record.update((name, float(value) if math.isfinite(value) else None) for name, value in values.items())
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def open_tensorboard(folder: Path, first_step: int) -> "SummaryWriter | None":
    """A writer whose readers forget older events from `first_step` on; None where the package is missing. Imported late: it is slow."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step, flush_secs=10)


def _drop_from(path: Path, first_step: int) -> None:
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) < first_step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _step(line: str) -> float:
    """The step a line reports; infinity, so that it is dropped, where the line is not whole."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
