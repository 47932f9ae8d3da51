"""Verification of a model on a labelled source (all pairs) or on an InsightFace `.bin` pair set."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dali_loaders.config import DataConfig
from dali_loaders.sources import Source, open_source
from pipeline.evaluation import all_pairs, cleaning, embed  # the modules: exporting their functions would hide them
from pipeline.evaluation.bin_pairs import MemorySource, evaluate_bin, read_bin, write_bin
from pipeline.evaluation.report import Report

__all__ = ["Report", "evaluate", "evaluate_bin", "open_set", "read_bin", "write_bin"]


def open_set(path: str, data: DataConfig) -> Source:
    """The labelled set, or the images of the pair set, `path`. ValueError where it cannot be opened."""
    if path.endswith(".bin"):
        return MemorySource(path, read_bin(path)[0])
    return open_source(path, data.reader if path.endswith(".rec") else "native", cache=data.cache)


def evaluate(
    model: Callable[[Tensor], Tensor],
    path: str,
    data: DataConfig,
    *,
    batch_size: int = 64,
    flip: bool = True,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    breaks: embed.Breaks | None = None,
    look: embed.Look | None = None,
    resamples: int | None = None,
    cleaning_file: str | None = None,
) -> Report:
    """All pairs of a folder, tar or RecordIO file, or the 10-fold protocol of a `.bin` file, which always adds the mirror image.

    All ranks of `group` call it and get the same report, unless `breaks` breaks it off. `resamples`: draws for the 95 % intervals, 0 for
    none; by default 1000, and none for more than 2,236 images. `cleaning_file`: a .csv in which rank 0 of a labelled set lists what looks
    wrong with its identities, as `cleaning.py` says, above the threshold at FAR 1e-3 or, if that is unreached, at the EER. `look` gets the
    embeddings of a labelled set.
    Raises ValueError when `path` is no readable set or makes no genuine or no impostor pair.
    """
    if cleaning_file:
        if path.endswith(".bin"):
            raise ValueError(f"--cleaning: the pair set {path} does not say who is in its images; name a labelled folder, .tar or .rec.")
        cleaning.check_path(cleaning_file)
    if path.endswith(".bin"):
        return evaluate_bin(
            model, path, data,
            batch_size=batch_size, device=device, rank=rank, world_size=world_size, group=group, breaks=breaks, resamples=resamples,
        )  # fmt: skip
    source = open_set(path, data)
    embeddings_nD, readable_n = embed.embed(
        model,
        source,
        data,
        batch_size=batch_size,
        flip=flip,
        device=device,
        rank=rank,
        world_size=world_size,
        group=group,
        breaks=breaks,
        look=look,
    )
    labels_n = np.asarray(source.labels, dtype=np.int64)[readable_n]
    report = all_pairs.all_pairs(
        embeddings_nD, labels_n, rank=rank, world_size=world_size, group=group, name=path, breaks=breaks, resamples=resamples
    )
    report.figures["unreadable"] = len(source) - len(labels_n)
    if cleaning_file:
        above = report.thresholds["threshold_at_far/1e-3"]
        found = cleaning.doubts(
            embeddings_nD, labels_n, report.best_cosine if above is None else above,
            rank=rank, world_size=world_size, group=group, name=path, breaks=breaks,
        )  # fmt: skip
        if rank == 0:
            cleaning.write(cleaning_file, found, source, readable_n, labels_n)
    return report
