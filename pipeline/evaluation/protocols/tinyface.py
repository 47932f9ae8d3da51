"""TinyFace: faces of about 20 pixels, searched for among 150,000 others."""

from __future__ import annotations

import os

import numpy as np
import torch.distributed as dist
from torch import Tensor

from dali_loaders.config import DataConfig
from dali_loaders.names import printable
from dali_loaders.sources import IMAGE_EXTENSIONS, Source
from pipeline.evaluation.average_precision import mean_average_precision
from pipeline.evaluation.cross_pairs import DISTRACTOR, cross_pairs
from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.listed_files import ListedFiles, of_arrays
from pipeline.evaluation.protocols.registry import register
from pipeline.evaluation.report import Report

_FOLDERS = ("Probe", "Gallery_Match", "Gallery_Distractor")


@register("tinyface")
class TinyFace:
    """TinyFace's Testing_Set (Probe, Gallery_Match and Gallery_Distractor, or copies of these that are aligned): rank-k and mAP.

    Who is in an image of Probe and Gallery_Match is the number before the first _ of its name, which the .mat files of the set repeat; they
    are not read. Images of Gallery_Distractor show nobody. Each probe meets the whole gallery; TAR and curves are of these pairs.
    `map` is the mean average precision as the set's kit has it (average_precision.py).
    Source: Cheng, Zhu and Gong, Low-resolution face recognition, ACCV 2018.
    """

    def __init__(self, path: str, data: DataConfig) -> None:
        below = os.path.join(path, "Testing_Set")
        root = below if os.path.isdir(below) else path
        files, labels, beside = [], [], []
        for place, folder in enumerate(_FOLDERS):
            names, others = _images(os.path.join(root, folder))
            beside += [os.path.join(folder, name) for name in others]
            files += [os.path.join(root, folder, name) for name in names]
            labels.append(np.array([DISTRACTOR if place == 2 else _identity(root, folder, name) for name in names], np.int64))
        self.probes = len(labels[0])
        self.label_N = np.concatenate(labels)
        strangers = np.setdiff1d(labels[0], labels[1])
        if len(strangers):
            raise ValueError(
                f"{os.path.join(root, 'Probe')} has {len(strangers)} identities without an image in Gallery_Match, such as {strangers[0]}; "
                "copy both folders again."
            )
        self.source: Source = ListedFiles(root, files, of_arrays(self.label_N, np.array([self.probes])))
        for name in beside:
            self.source.account.pass_over("beside the images", printable(name))
        self.path = path

    def evaluate(self, embedder: Embedder) -> Report:
        unit_nD, number_n = embedder.embed(self.source)
        probes = int(np.searchsorted(number_n, self.probes))
        report = compare(unit_nD, self.label_N[number_n], probes, name=self.path, **embedder.ranks)
        report.figures["unreadable"] = len(self.source) - len(number_n)
        return report


def compare(
    embedding_nD: Tensor,
    label_n: np.ndarray,
    probes: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    breaks: Breaks | None = None,
    name: str = "TinyFace",
) -> Report:
    """The report on embeddings float [n, D] and labels int64 [n] of the probes and, behind them, the gallery. ValueError as of
    cross_pairs."""
    of = embedding_nD[:probes], embedding_nD[probes:], label_n[:probes], label_n[probes:]
    names = f"the probes of {name}", f"the gallery of {name}"
    report = cross_pairs(*of, rank=rank, world_size=world_size, group=group, names=names, breaks=breaks)
    report.figures["map"] = mean_average_precision(*of, rank=rank, world_size=world_size, group=group, names=names, breaks=breaks)
    return report


def _images(folder: str) -> tuple[list[str], list[str]]:
    """Names of the images, sorted, and of what else is there: folders, and what does not end like an image, such as lists."""
    try:
        found = sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed ({error.strerror}); expected TinyFace's folders {', '.join(_FOLDERS)}.") from error
    names = [name for name in found if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")]
    if not names:
        raise ValueError(f"{folder} has no images; expected TinyFace's folders {', '.join(_FOLDERS)}.")
    return names, sorted(set(found) - set(names))


def _identity(root: str, folder: str, name: str) -> int:
    number = name.partition("_")[0]
    if not number.isdecimal():
        raise ValueError(
            f"{os.path.join(root, folder, printable(name))}: expected names such as 12_3.jpg, with the number of a person first."
        )
    return int(number)
