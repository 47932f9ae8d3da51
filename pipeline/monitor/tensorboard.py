"""A run for TensorBoard: figures in groups, a first page that tells how the run is (its tab "Custom Scalars"), pictures, a projector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import summary

from pipeline.monitor.event_file import NAME, EventFile
from pipeline.monitor.names import FIRST_PAGE, grouped, of_set
from pipeline.monitor.pictures import jpeg_of, size_of, tiled
from pipeline.monitor.writer import Writer

PROJECTOR = "projector"  # the folder of vectors, in that of the run
OUTCOME = ".hparams"  # how the file of options and last figures ends


class TensorBoard(Writer):
    """Writes FOLDER/NAME, so that the run is called NAME. Where FOLDER has a folder of a run already (this one, before it was renamed, or
    one that another file system spells otherwise), it goes on there."""

    name = "tensorboard"

    def __init__(self, folder: Path, name: str, first_step: int) -> None:
        self._folder = folder / _run_in(folder, name)
        # TensorBoard takes what begins so: without the $, train/loss would find train/loss_scale too.
        whole = {page: {title: [f"{tag}$" for tag in tags] for title, tags in charts.items()} for page, charts in FIRST_PAGE.items()}
        pages = {page: {title: ["Multiline", tags] for title, tags in charts.items()} for page, charts in whole.items()}
        self._file = EventFile(self._folder, first_step, [summary.custom_scalars(pages)])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, {grouped(name): value for name, value in values.items()})

    def evaluation(self, step: int, set_name: str, values: Mapping[str, float], threshold: float) -> None:
        values = {**values, "threshold": threshold}
        self._add(step, {of_set(set_name, name): value for name, value in values.items() if not isinstance(value, int)})
        rows = [f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value:.6g} |" for name, value in values.items()]
        self.text(step, of_set(set_name, "table"), "\n".join([f"| {set_name} | step {step:,} |", "|---|---|", *rows]))

    def histogram(self, step: int, name: str, counts_k: np.ndarray, edges: np.ndarray) -> None:
        centers = (edges[:-1] + edges[1:]) / 2
        values: dict[str, Any] = {"min": edges[0], "max": edges[-1], "num": counts_k.sum()}
        values |= {"sum": counts_k @ centers, "sum_squares": counts_k @ centers**2}
        self._file.add(step, summary.histogram_raw(name, bucket_limits=edges[1:].tolist(), bucket_counts=counts_k.tolist(), **values))

    def picture(self, step: int, name: str, png: bytes) -> None:
        width, height = size_of(png)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._file.add(step, Summary(value=[Summary.Value(tag=name, image=image)]))

    def text(self, step: int, name: str, text: str) -> None:
        self._file.add(step, summary.text(name, text))

    def points(self, step: int, name: str, vectors_nD: np.ndarray, labels: Sequence[str], images_nHWC: np.ndarray) -> None:
        """tensorboard/plugins/projector/projector_config.proto; a folder for each name, and one file that lists them."""
        place = f"{PROJECTOR}/{name}"
        folder = self._folder / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vectors.bytes").write_bytes(np.ascontiguousarray(vectors_nD, dtype="<f4").tobytes())
        (folder / "labels.tsv").write_text("".join(f"{' '.join(label.split())}\n" for label in labels), encoding="utf-8")
        (folder / "thumbnails.jpg").write_bytes(jpeg_of(_square(images_nHWC)))
        _, height, width, _ = images_nHWC.shape
        rows, columns = vectors_nD.shape
        (folder / "entry").write_text(
            f'embeddings {{\n  tensor_name: "{name} at step {step}"\n  tensor_path: "{place}/vectors.bytes"\n'
            f'  tensor_shape: {rows}\n  tensor_shape: {columns}\n  metadata_path: "{place}/labels.tsv"\n'
            f'  sprite {{ image_path: "{place}/thumbnails.jpg" single_image_dim: {width} single_image_dim: {height} }}\n}}\n'
        )
        entries = sorted((self._folder / PROJECTOR).glob("**/entry"))
        (self._folder / "projector_config.pbtxt").write_text("".join(entry.read_text() for entry in entries))

    def outcome(self, options: Mapping[str, str | float], figures: Mapping[str, float]) -> None:
        """In a file of its own, which replaces that of an earlier start: readers keep the first options that they find in a run."""
        reached = {f"evaluation/{name}": value for name, value in figures.items() if not isinstance(value, int)}
        for old in self._folder.glob(f"{NAME}*{OUTCOME}"):
            old.unlink()
        file = EventFile(self._folder, None, ending=OUTCOME)
        file.add(0, *summary.hparams(dict(options), reached))
        file.close()

    def close(self) -> None:
        self._file.close()

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        """All of them in one record, which takes half the bytes of one each."""
        self._file.add(step, Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()]))


def _square(images_nHWC: np.ndarray) -> np.ndarray:
    """One image with as many rows of them as columns: the projector divides an image's number by the rows to find its row."""
    side = math.ceil(math.sqrt(len(images_nHWC)))
    return tiled(np.pad(images_nHWC, [(0, side**2 - len(images_nHWC)), (0, 0), (0, 0), (0, 0)]), side)


def _run_in(folder: Path, name: str) -> str:
    """Other folders may lie there too, a notebook's or a profiler's."""
    found: list[str] = []
    with suppress(OSError):  # a file system that gives no answer
        found = sorted({path.parent.name for path in folder.glob(f"*/{NAME}*")})
    return name if name in found or not found else found[0]
