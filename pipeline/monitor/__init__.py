"""What a run tells the world: metrics.jsonl, TensorBoard, Weights & Biases and the console, behind one object that is silent on every rank
but 0."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from pipeline.lease import Lease
from pipeline.monitor.appending import Output
from pipeline.monitor.config import MonitorConfig
from pipeline.monitor.console import Console
from pipeline.monitor.json_lines import JsonLines
from pipeline.monitor.names import of_set
from pipeline.monitor.pictures import png_of, png_of_figure
from pipeline.monitor.writer import Writer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Monitor", "MonitorConfig", "check", "of_set"]

Options = Mapping[str, str | float]


def check(config: MonitorConfig) -> None:
    """ValueError for a writer whose package is missing. Without tensorboard, which is the default's, a run only says so."""
    package = find_spec("wandb") if "wandb" in config.writers else None
    if "wandb" in config.writers and (package is None or package.origin is None):  # None: a folder of that name, as W&B itself makes one
        raise ValueError("monitor.writers has wandb, which is not installed: pip install 'protoshard[wandb]', or take it out")


class Monitor:
    """Writes FOLDER/metrics.jsonl and what `config` names, and shows progress; other ranks than 0 accept the same calls and do nothing.

    total_steps: steps of the whole run, for the progress line.
    first_step: the first step this run will report. Whatever an interrupted run wrote for this step or a later one is dropped from
        metrics.jsonl and hidden in TensorBoard, so that curves do not double after a resume. 0 starts both afresh.
    options: of the run, for tables that compare runs.
    stream: where the console goes, standard error unless given.
    lease: of the run's folder. Once another run has it, nothing is written to files any more.

    A full disk or a console that was closed does not end a run: what cannot be written is lost, which is said once, and the next record
    is tried anew. Nothing here reads a device: pass numbers that are on the host already. ValueError if wandb does not start."""

    def __init__(
        self,
        folder: str | Path,
        total_steps: int,
        rank: int = 0,
        *,
        first_step: int = 0,
        config: MonitorConfig = MonitorConfig(),  # noqa: B008, it is frozen
        options: Options | None = None,
        console: bool = True,
        stream: TextIO | None = None,
        lease: Lease | None = None,
    ) -> None:
        self._lease, self._outputs = lease, dict[str, Output]()
        self._options = {key: _in_utf8(value) if isinstance(value, str) else value for key, value in (options or {}).items()}
        self._console: Console | None = None
        self._writers: list[Writer] = []
        self.config, self.total_steps = config, total_steps
        if rank != 0:
            return
        stream = stream or sys.stderr  # which is None in a process that was started without
        if console and stream is not None:
            self._console = Console(stream, total_steps, first_step)
        self._writers = self._open(Path(folder), first_step)
        self._tell("begin")

    def _open(self, folder: Path, first_step: int) -> list[Writer]:
        name = _in_utf8(folder.resolve().name) or "run"
        writers: list[Writer] = [JsonLines(folder / "metrics.jsonl", first_step)]
        if "tensorboard" in self.config.writers:
            try:  # imported late: it is slow
                from pipeline.monitor.tensorboard import TensorBoard
            except ImportError:
                self.say("tensorboard is not installed: metrics go to metrics.jsonl only (pip install tensorboard).")
            else:
                writers.append(TensorBoard(folder / "tensorboard", name, first_step))
        if "wandb" in self.config.writers:
            from pipeline.monitor.weights_and_biases import WeightsAndBiases

            writers.append(WeightsAndBiases(folder, name, first_step, self._options))
        return writers

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One number per name. The console shows those that it knows (console.SHOWN)."""
        self._tell("scalars", step, values)
        if self._console:
            self._console.progress(step, values)

    def evaluation(self, step: int, set_name: str, values: Mapping[str, float], threshold: float) -> None:
        """Figures of an evaluation set, and the cosine at which it is decided best. Whole numbers (int) are sizes of the set."""
        self._tell("evaluation", step, set_name, values, threshold)

    def histogram(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """A histogram already counted: counts[i] values lie between edges[i] and edges[i + 1], so edges is one longer. Empty ends are cut
        off, because TensorBoard draws the outermost bands from the first edge to the last."""
        assert len(edges) == len(counts) + 1, f"{name}: {len(counts)} counts need {len(counts) + 1} edges, not {len(edges)}"
        used = np.flatnonzero(counts)
        if len(used):
            first, stop = used[0], used[-1] + 1
            counts, edges = np.asarray(counts, np.float64)[first:stop], np.asarray(edges, np.float64)[first : stop + 1]
            self._tell("histogram", step, name, counts, edges)

    def figure(self, step: int, name: str, figure: Figure) -> None:
        """A matplotlib figure."""
        if len(self._writers) > 1:  # metrics.jsonl shows none
            self._picture(step, name, png_of_figure(figure))

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """RGB, uint8 [H, W, 3]."""
        if len(self._writers) > 1:
            self._picture(step, name, png_of(image_HWC))

    def _picture(self, step: int, name: str, png: bytes) -> None:
        self._tell("picture", step, name, png)

    def text(self, step: int, name: str, text: str) -> None:
        """Text (Markdown). Bytes of names of files that are not UTF-8 are shown as escapes."""
        self._tell("text", step, name, _in_utf8(text))

    def points(self, step: int, name: str, vectors_nD: np.ndarray, labels: Sequence[str], images_nHWC: np.ndarray) -> None:
        """Vectors float32 [n, D] with a label and a thumbnail (RGB, uint8 [n, H, W, 3]) each, for TensorBoard's projector."""
        self._tell("points", step, name, vectors_nD, labels, images_nHWC)

    def outcome(self, figures: Mapping[str, float]) -> None:
        """The last figures of a run, by `SET/FIGURE`, beside its options."""
        self._tell("outcome", self._options, figures)

    def _tell(self, kind: str, *record: Any) -> None:
        """Calls the method `kind` of each writer that has it: one that leaves it out must not count as written again."""
        for writer in self._writers:
            if getattr(type(writer), kind) is not getattr(Writer, kind):
                self.try_to(writer.name, functools.partial(getattr(writer, kind), *record))

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
        for writer in self._writers:
            try:
                writer.close()
            except OSError as error:
                self.say(f"{writer.name} cannot be closed ({error.strerror or error}): its last records may be missing")
        if self._console:
            self._console.close()
        self._writers, self._console = [], None


def _in_utf8(text: str) -> str:
    """Other bytes, in names of files, as escapes."""
    return text.encode(errors="backslashreplace").decode()
