"""`protoshard match` and `protoshard search`: images, sets and files of embeddings compared by cosine."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

import numpy as np
import torch

from dali_loaders.config import DataConfig
from dali_loaders.names import printable
from pipeline.evaluation.neighbours import MOST, neighbours
from pipeline.export import embedding_files
from pipeline.export.embed_images import embed_images
from pipeline.export.embedding_files import Embeddings
from pipeline.export.faiss_search import check_faiss, searcher
from pipeline.export.images import open_images
from pipeline.export.loading import Model

QUERIES = 1 << 14  # that go through the gallery together


@dataclass(frozen=True)
class Match:
    """threshold, decision: at the FAR that was asked for; None where none was."""

    cosine: float
    images: tuple[int, int]
    far: str | None
    threshold: float | None
    decision: bool | None
    set: str | None  # on which the threshold was measured
    remarks: Sequence[str]


def match(first: str, second: str, model: Model | None, far: str | None = None) -> Match:
    """Compares two images, or two sets of images of one identity each, of which the mean of the unit embeddings counts; each may also be a
    file of embeddings. ValueError where the model has no threshold at `far`, or the two are of different models or widths."""
    threshold = None
    if far is not None:
        if model is None:
            raise ValueError(f"--far {far} asks for a decision, and thresholds are those of a model: name it with --model FOLDER")
        threshold = model.description.named_threshold(far, model.path)  # first, because embedding takes longer
    remarks: list[str] = []
    a, b = (embeddings_of(path, model, remarks) for path in (first, second))
    check_comparable(a, b)
    for found in (a, b):
        if (people := len(set(found.identities))) > 1:
            remarks.append(f"{found.path} holds {people} identities, and their mean is compared as if they were one")
    centre_2D = np.stack([_centre(a), _centre(b)])
    cosine = float(centre_2D[0] @ centre_2D[1])
    decision = None if threshold is None else cosine >= threshold
    thresholds = model.description.thresholds if model else None
    measured_on = thresholds.set if thresholds and far is not None else None
    return Match(cosine, (len(a.names), len(b.names)), far, threshold, decision, measured_on, remarks)


def search(gallery: str, queries: str, model: Model | None, k: int, faiss: bool, remarks: list[str]) -> Iterator[dict[str, Any]]:
    """The k nearest images of the gallery for each query, the nearest first."""
    if k < 1:
        raise ValueError(f"--top is {k}, but must be at least 1")
    if faiss:
        check_faiss()
    elif k > MOST:
        raise ValueError(f"--top is {k}, but must be at most {MOST}; more are found with --faiss")
    there, asked = embeddings_of(gallery, model, remarks), embeddings_of(queries, model, remarks)
    check_comparable(there, asked)
    k = min(k, len(there.names))
    nearest = searcher(there.embedding_nD) if faiss else partial(_neighbours, there.embedding_nD)
    for start in range(0, len(asked.names), QUERIES):
        rows_qk, cosines_qk = nearest(asked.embedding_nD[start : start + QUERIES], k)
        for query, (rows, cosines) in enumerate(zip(rows_qk.tolist(), cosines_qk.tolist(), strict=True), start):
            for place, (row, cosine) in enumerate(zip(rows, cosines, strict=True), start=1):
                yield {
                    "query": printable(asked.names[query]),
                    "query_identity": printable(asked.identities[query]),
                    "place": place,
                    "name": printable(there.names[row]),
                    "identity": printable(there.identities[row]),
                    "cosine": round(cosine, 6),
                }


def _neighbours(gallery_GD: np.ndarray, queries_qD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    return neighbours(torch.from_numpy(np.array(queries_qD)), gallery_GD, k)


def write_csv(found: Iterator[dict[str, Any]], file: TextIO) -> int:
    """The number of lines."""
    table = csv.DictWriter(file, ["query", "query_identity", "place", "name", "identity", "cosine"])
    table.writeheader()
    count = 0
    for row in found:
        table.writerow(row)
        count += 1
    return count


def embeddings_of(path: str, model: Model | None, remarks: list[str]) -> Embeddings:
    """What a file of embeddings holds, or those that the model makes of images, decoded without DALI. `remarks` gets lines on images that
    cannot be decoded or are stretched, and on a file whose model is unknown."""
    if os.path.isfile(path) and embedding_files.is_embeddings(path):
        found = embedding_files.read(path)
        if model is not None:
            _check_maker(found, model, remarks)
        return found
    if path.endswith(".npy"):
        raise ValueError(f"{path} does not exist")
    if model is None:
        raise ValueError(f"{path} is no file of embeddings, and images need the model that embeds them: name it with --model FOLDER")
    about = model.description
    source = open_images(path, DataConfig(image_size=about.image_size))
    part = embed_images(model, source, np.arange(len(source)), about.flip, uses_dali=False)
    if not len(part.index_n):
        raise ValueError(f"{path}: no image can be decoded ({part.unreadable[0][1]})")
    if part.unreadable:
        reasons = Counter(reason for _, reason in part.unreadable)
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3)) + (", ..." if len(reasons) > 3 else "")
        remarks.append(f"{path}: {len(part.unreadable)} of {len(source)} images cannot be decoded and are left out: {why}")
    if remark := part.stretched.remark(path, len(part.index_n), about):
        remarks.append(remark)
    numbers = part.index_n.tolist()
    identities = [source.identities[source.labels[index]] for index in numbers]
    return Embeddings(path, part.embedding_nD, [source.name(index) for index in numbers], identities, about.weights, about.flip)


def _check_maker(found: Embeddings, model: Model, remarks: list[str]) -> None:
    about = model.description
    if found.model not in (None, about.weights):
        raise ValueError(f"{found.path} was made by another model than {model.path}: their cosines mean nothing")
    width = found.embedding_nD.shape[1]
    if width != about.backbone.width:
        raise ValueError(
            f"{found.path} has {width} numbers for each image and {model.path} gives {about.backbone.width}: it is another model's"
        )
    if found.flip not in (None, about.flip):
        made, gives = ("with" if flip else "without" for flip in (found.flip, about.flip))
        raise ValueError(
            f"{found.path} was made {made} the mirror image, but {model.path} embeds {gives} it, and its thresholds are for that: embed "
            f"again{' without --no-flip' if about.flip else ''}"
        )
    if found.model is None:
        remarks.append(f"{found.path} does not say which model made it: what is said here holds only if that is {model.path}")


def check_comparable(a: Embeddings, b: Embeddings) -> None:
    """ValueError for embeddings of two widths, or of two models, or with and without the mirror image."""
    widths = [found.embedding_nD.shape[1] for found in (a, b)]
    if widths[0] != widths[1]:
        raise ValueError(f"{a.path} has {widths[0]} numbers for each image and {b.path} {widths[1]}: they are of different models")
    if None not in (a.model, b.model) and a.model != b.model:
        raise ValueError(f"{a.path} and {b.path} were made by different models: their cosines mean nothing")
    if None not in (a.flip, b.flip) and a.flip != b.flip:
        raise ValueError(f"one of {a.path} and {b.path} was made with the mirror image and the other without it: embed both alike")


def _centre(found: Embeddings) -> np.ndarray:
    """float64 [D] of unit length. ValueError where the mean is zero."""
    rows_nD = np.asarray(found.embedding_nD, np.float64)
    lengths_n1 = np.linalg.norm(rows_nD, axis=1, keepdims=True)
    mean_D = (rows_nD / np.where(lengths_n1 > 0, lengths_n1, 1)).mean(axis=0)
    length = np.linalg.norm(mean_D)
    if not length > 0:
        raise ValueError(f"the embeddings of {found.path} have a mean of zero, which has no cosine with anything")
    return mean_D / length
