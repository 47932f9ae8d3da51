"""What a model is worth: protocols by name, from a network and a set to a Report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dali_loaders.config import DataConfig
from dali_loaders.sources import Source
from pipeline.evaluation.bin_pairs import read_bin, write_bin
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.protocols import open_protocol
from pipeline.evaluation.report import Report

__all__ = ["Embedder", "Report", "evaluate", "open_set", "read_bin", "write_bin"]


def open_set(path: str, data: DataConfig) -> Source:
    """The labelled set, or the images of the pair set, `path`. ValueError where it cannot be opened."""
    return open_protocol(None, path, data).source


def evaluate(
    model: Callable[[Tensor], Tensor],
    path: str,
    data: DataConfig,
    *,
    protocol: str | None = None,
    options: Mapping[str, Any] | None = None,
    **embedding: Any,
) -> Report:
    """What the protocol of that name finds: by default all pairs of a folder, tar or RecordIO file, or the ten folds of a `.bin` file.

    `options` are those of the protocol (`protocols/`), `embedding` what an Embedder takes: batch_size, flip, device, rank, world_size,
    group, breaks, look. All ranks of `group` call it and get the same report, unless `breaks` breaks it off.
    Raises ValueError when `path` is no readable set or makes no genuine or no impostor pair, and for options that the protocol lacks.
    """
    return open_protocol(protocol, path, data, options).evaluate(Embedder(model, data, **embedding))
