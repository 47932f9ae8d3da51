"""What every place that a run's figures go to has: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


class Writer:
    """One method for each kind of record, which raises OSError where it is not written. A place that has no room for a kind leaves its
    method as it is here, and nothing is written. Figures come under the names that docs/monitoring.md lists."""

    name: str  # in messages

    def begin(self) -> None:
        """Called once, before any record."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A line of metrics."""

    def evaluation(self, step: int, set_name: str, values: Mapping[str, float], threshold: float) -> None:
        """Figures of an evaluation set, and the cosine at which it is decided best. Whole numbers (int) are sizes of the set, which do not
        change from step to step."""

    def histogram(self, step: int, name: str, counts_k: np.ndarray, edges: np.ndarray) -> None:
        """counts_k[i] values, float64, lie between edges[i] and edges[i + 1]; neither the first nor the last count is 0."""

    def picture(self, step: int, name: str, png: bytes) -> None:
        """A PNG file."""

    def text(self, step: int, name: str, text: str) -> None:
        """Markdown, of bytes that UTF-8 has."""

    def points(self, step: int, name: str, vectors_nD: np.ndarray, labels: Sequence[str], images_nHWC: np.ndarray) -> None:
        """Vectors float32 [n, D] with a label and a thumbnail (RGB, uint8 [n, H, W, 3]) each; they replace those of an earlier step."""

    def outcome(self, options: Mapping[str, str | float], figures: Mapping[str, float]) -> None:
        """At the end of a run, its options and the last figures of its evaluations, by `SET/FIGURE`."""

    def close(self) -> None:
        """Called once, after all records."""
