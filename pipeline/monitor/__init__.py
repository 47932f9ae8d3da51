"""What a run tells the world: TensorBoard, metrics.jsonl and the console, behind one object that is silent on every rank but 0."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from pipeline.lease import Lease
from pipeline.monitor.appending import Output
from pipeline.monitor.console import Console
from pipeline.monitor.event_file import open_tensorboard
from pipeline.monitor.json_lines import JsonLines

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Monitor"]


class Monitor:
    """Writes FOLDER/metrics.jsonl and FOLDER/tensorboard and shows progress; ranks other than 0 accept the same calls and do nothing.

    total_steps: steps of the whole run, for the progress line.
    first_step: the first step this run will report. Whatever an interrupted run wrote for this step or a later one is dropped from
        metrics.jsonl and hidden in TensorBoard, so that curves do not double after a resume. 0 starts both afresh.
    every: on a terminal one line is updated in place; elsewhere (a log file, a pipe) a plain line at most once in that many steps.
    stream: where the console goes, standard error unless given.
    lease: of the run's folder. Once another run has it, nothing is written to files any more.

    A full disk or a console that was closed does not end a run: what cannot be written is lost, which is said once, and the next record
    is tried anew. Nothing here reads a device: pass numbers that are on the host already.
    """

    def __init__(
        self,
        folder: str | Path,
        total_steps: int,
        rank: int = 0,
        *,
        first_step: int = 0,
        console: bool = True,
        every: int = 50,
        stream: TextIO | None = None,
        lease: Lease | None = None,
    ) -> None:
        self._lease, self._outputs = lease, dict[str, Output]()
        self._console: Console | None = None
        self._lines: JsonLines | None = None
        self._board: SummaryWriter | None = None
        if rank != 0:
            return
        stream = stream or sys.stderr  # which is None in a process that was started without
        if console and stream is not None:
            self._console = Console(stream, total_steps, first_step, every)
        self._lines = JsonLines(Path(folder) / "metrics.jsonl", first_step)
        self.try_to("metrics.jsonl", self._lines.begin)
        self._board = open_tensorboard(Path(folder) / "tensorboard", first_step)
        if self._board is None:
            self.say("tensorboard is not installed: metrics go to metrics.jsonl only (pip install tensorboard).")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One number per name. The console shows those whose last part is loss, images_per_second or wait_share ("train/loss" too)."""
        lines, board = self._lines, self._board
        if lines:
            self.try_to("metrics.jsonl", lambda: lines.write(step, values))
        if board:
            self.try_to("tensorboard", lambda: _add(board, step, values))
        if self._console:
            self._console.progress(step, values)

    def histogram(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """A histogram already counted: counts[i] values lie between edges[i] and edges[i + 1], so edges is one longer."""
        assert len(edges) == len(counts) + 1, f"{name}: {len(counts)} counts need {len(counts) + 1} edges, not {len(edges)}"
        board = self._board
        if board:
            counts, edges = np.asarray(counts, dtype=np.float64), np.asarray(edges, dtype=np.float64)
            centers = (edges[:-1] + edges[1:]) / 2
            values = {"min": edges[0], "max": edges[-1], "num": counts.sum(), "sum": counts @ centers, "sum_squares": counts @ centers**2}
            values |= {"bucket_limits": edges[1:].tolist(), "bucket_counts": counts.tolist()}
            self.try_to("tensorboard", lambda: board.add_histogram_raw(name, **values, global_step=step))

    def figure(self, step: int, name: str, figure: "Figure") -> None:
        """A matplotlib figure, which the caller closes."""
        board = self._board
        if board:
            self.try_to("tensorboard", lambda: board.add_figure(name, figure, step, close=False))

    def text(self, step: int, name: str, text: str) -> None:
        """Text (Markdown) for TensorBoard, which takes UTF-8 only: other bytes, in names of files, are shown as escapes."""
        board = self._board
        if board:
            self.try_to("tensorboard", lambda: board.add_text(name, text.encode(errors="backslashreplace").decode(), step))

    def try_to(self, name: str, write: Callable[[], object]) -> None:
        """Calls `write`, which writes the file or files that `name` stands for in messages. An OSError of it is said, and not raised."""
        if self._lease is None or self._lease.is_ours():
            self._outputs.setdefault(name, Output(name, self.say)).try_to(write)

    def say(self, message: str) -> None:
        """A plain line on the console, above the progress line where there is one."""
        if self._console:
            self._console.say(message)

    def close(self) -> None:
        """Writes out what is buffered and ends the progress line. Calls after the first do nothing."""
        if self._board:
            self._board.close()
        if self._lines:
            self._lines.close()
        if self._console:
            self._console.close()
        self._board = self._lines = self._console = None


def _add(board: "SummaryWriter", step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        board.add_scalar(name, value, step)
