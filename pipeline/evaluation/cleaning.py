"""What a trained network finds wrong with a set's identities: two that are one, and images that belong to another one. A CSV, and a list
for `data.subset` without them."""

from __future__ import annotations

import csv
import io
import os
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from dali_loaders.names import printable
from dali_loaders.sources import Source
from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.neighbours import neighbours
from pipeline.evaluation.tiles import unit_rows

COLUMNS = ("what", "image", "identity", "other_identity", "cosine", "own_cosine")


@dataclass(frozen=True)
class Doubt:
    what: str  # "merge" or "misplaced"
    image: int  # its number; -1 for identities to merge
    identity: int
    other: int  # the identity to merge with, or the one that the image is nearest to
    cosine: float  # mean over the pairs of their images; of the image and the centre of `other`
    own_cosine: float  # of the image and the centre of its identity's other images; NaN for a merge


def doubts(
    embeddings_ND: Tensor,
    labels_N: np.ndarray,
    above: float,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    name: str = "the evaluation set",
    breaks: Breaks | None = None,
) -> list[Doubt]:
    """Merges first, each kind with the highest cosine first; the same on every rank, all of which call it.

    embeddings float [N, D], labels int64 [N]. A centre is the normalised mean of unit embeddings. Two identities are to be merged when each
    other's centre is the nearest one, and the mean cosine of their image pairs is at least `above`. An image is misplaced when the centre
    of another identity, which its own is not to be merged with, is nearer than that of the other images of its own, with a cosine of at
    least `above`. ValueError as `neighbours`.
    """
    identities, label_N = np.unique(labels_N, return_inverse=True)
    if len(identities) < 2:
        return []
    unit_ND = unit_rows(embeddings_ND, name)
    of_image = torch.from_numpy(label_N).to(unit_ND.device)
    sum_CD = unit_ND.new_zeros(len(identities), unit_ND.shape[1]).index_add_(0, of_image, unit_ND)
    count_C = np.bincount(label_N)
    ranks = {"rank": rank, "world_size": world_size, "group": group, "breaks": breaks}

    nearest_C = neighbours(sum_CD, sum_CD, 1, excluded_Q=np.arange(len(identities)), **ranks)[0][:, 0]  # type: ignore[arg-type]
    first = np.flatnonzero((nearest_C[nearest_C] == np.arange(len(identities))) & (np.arange(len(identities)) < nearest_C))
    second = nearest_C[first]
    mean = (sum_CD[first] * sum_CD[second]).sum(dim=1).double().cpu().numpy() / (count_C[first] * count_C[second])
    found = [
        Doubt("merge", -1, int(identities[a]), int(identities[b]), float(cosine), float("nan"))
        for a, b, cosine in zip(first, second, mean, strict=True)
        if cosine >= above
    ]
    other_N1, cosine_N1 = neighbours(unit_ND, sum_CD, 1, excluded_Q=label_N, **ranks)  # type: ignore[arg-type]
    own_N = (normalize(sum_CD[of_image] - unit_ND) * unit_ND).sum(dim=1).cpu().numpy()
    partner_C = np.full(len(identities), -1)
    merged = mean >= above
    partner_C[first[merged]], partner_C[second[merged]] = second[merged], first[merged]
    elsewhere_N = (count_C[label_N] > 1) & (partner_C[label_N] != other_N1[:, 0])
    wrong = np.flatnonzero(elsewhere_N & (cosine_N1[:, 0] > own_N) & (cosine_N1[:, 0] >= above))
    found += [
        Doubt("misplaced", int(i), int(labels_N[i]), int(identities[other_N1[i, 0]]), float(cosine_N1[i, 0]), float(own_N[i]))
        for i in wrong
    ]
    return sorted(found, key=lambda doubt: (doubt.what, -doubt.cosine, doubt.image, doubt.identity))


def list_path(path: str) -> str:
    """Where the list for data.subset lies that belongs to the CSV file `path`."""
    return os.path.splitext(path)[0] + ".subset.txt"


def check_path(path: str) -> None:
    """ValueError where the CSV or its list cannot be written: before the work whose result it is to hold."""
    folder = os.path.dirname(os.path.abspath(path))
    if not path.endswith(".csv"):
        raise ValueError(f"--cleaning {path}: expected the name of a .csv file; the list for data.subset is written beside it.")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK) or os.path.isdir(path) or os.path.isdir(list_path(path)):
        raise ValueError(f"--cleaning {path}: no file can be written there; choose a path in a folder that exists and can be written to.")


def write(path: str, found: list[Doubt], source: Source, readable_n: np.ndarray, labels_n: np.ndarray) -> int:
    """Writes the CSV, whose rows name images and identities, and the list that `data.subset` reads: numbers of all readable images without
    those that are misplaced and those of the smaller of two identities to merge (of two alike the second). Returns how many it leaves out.

    readable int64 [n]: numbers in `source` of the images in `found`. ValueError where a file cannot be written."""
    out_n = np.zeros(len(readable_n), bool)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(COLUMNS)
    for doubt in found:
        image = ""
        if doubt.what == "merge":
            of_both = [labels_n == label for label in (doubt.identity, doubt.other)]
            out_n |= of_both[0] if of_both[0].sum() < of_both[1].sum() else of_both[1]
        else:
            out_n[doubt.image] = True
            image = printable(source.name(int(readable_n[doubt.image])))
        names = (printable(source.identities[label]) for label in (doubt.identity, doubt.other))
        rows.writerow([doubt.what, image, *names, f"{doubt.cosine:.6f}", "" if np.isnan(doubt.own_cosine) else f"{doubt.own_cosine:.6f}"])
    kept = "".join(f"{number}\n" for number in readable_n[~out_n].tolist())
    for name, text in ((path, table.getvalue()), (list_path(path), kept)):
        _write(name, text)
    return int(out_n.sum())


def _write(path: str, text: str) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise ValueError(f"{path}: the cleaning report cannot be written ({error.strerror}); choose a path that can.") from error
