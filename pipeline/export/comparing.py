"""`protoshard match` and `protoshard search`: images, sets and files of embeddings compared by cosine."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from dali_loaders.config import DataConfig
from dali_loaders.names import printable
from dali_loaders.skipped import Skipped
from pipeline.export import embedding_files
from pipeline.export.embedding_files import Embeddings
from pipeline.export.images import is_image, open_images
from pipeline.export.loading import Model
from pipeline.export.nearest import check_faiss, nearest


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
    there, asked = embeddings_of(gallery, model, remarks), embeddings_of(queries, model, remarks)
    check_comparable(there, asked)
    cosines_Qk, rows_Qk = nearest(there.embedding_nD, asked.embedding_nD, k, faiss)
    for query, (cosines, rows) in enumerate(zip(cosines_Qk.tolist(), rows_Qk.tolist(), strict=True)):
        for place, (cosine, row) in enumerate(zip(cosines, rows, strict=True), start=1):
            yield {
                "query": printable(asked.names[query]),
                "query_identity": printable(asked.identities[query]),
                "place": place,
                "name": printable(there.names[row]),
                "identity": printable(there.identities[row]),
                "cosine": round(cosine, 6),
            }


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
    cannot be decoded."""
    if os.path.isfile(path) and embedding_files.is_embeddings(path):
        found = embedding_files.read(path)
        if model is not None and found.model not in (None, model.description.weights):
            raise ValueError(f"{path} was made by another model than {model.path}: their cosines mean nothing")
        return found
    if path.endswith(".npy"):
        raise ValueError(f"{path} does not exist")
    if model is None:
        raise ValueError(f"{path} is no file of embeddings, and images need the model that embeds them: name it with --model FOLDER")
    from pipeline.export import decoding

    data = DataConfig(image_size=model.description.image_size)
    source = open_images(path, data)
    if is_image(path):
        remarks += decoding.remarks_on(path, model.description)
    skipped = Skipped(source, None)
    device = next(model.network.parameters()).device
    parts, numbers = [], []
    for batch in decoding.batches(source, data, np.arange(len(source)), model.description.batch_size, skipped):
        parts.append(model(batch.images.to(device)).cpu().numpy())
        numbers.append(batch.indices)
    if not parts:
        raise ValueError(f"{path}: no image can be decoded ({skipped.why()})")
    if len(skipped):
        remarks.append(f"{path}: {len(skipped)} of {len(source)} images cannot be decoded and are left out: {skipped.why()}")
    embedding_nD, index_n = np.concatenate(parts), np.concatenate(numbers).tolist()
    bad = np.flatnonzero(~np.isfinite(embedding_nD).all(axis=1))
    if len(bad):
        raise ValueError(f"{model.path} gives an embedding that is not finite for {source.name(index_n[bad[0]])}")
    identities = [source.identities[source.labels[index]] for index in index_n]
    return Embeddings(path, embedding_nD, [source.name(index) for index in index_n], identities, model.description.weights)


def check_comparable(a: Embeddings, b: Embeddings) -> None:
    """ValueError for embeddings of two widths, or of two models."""
    widths = [found.embedding_nD.shape[1] for found in (a, b)]
    if widths[0] != widths[1]:
        raise ValueError(f"{a.path} has {widths[0]} numbers for each image and {b.path} {widths[1]}: they are of different models")
    if None not in (a.model, b.model) and a.model != b.model:
        raise ValueError(f"{a.path} and {b.path} were made by different models: their cosines mean nothing")


def _centre(found: Embeddings) -> np.ndarray:
    """float64 [D] of unit length. ValueError where the mean is zero."""
    rows_nD = np.asarray(found.embedding_nD, np.float64)
    lengths_n1 = np.linalg.norm(rows_nD, axis=1, keepdims=True)
    mean_D = (rows_nD / np.where(lengths_n1 > 0, lengths_n1, 1)).mean(axis=0)
    length = np.linalg.norm(mean_D)
    if not length > 0:
        raise ValueError(f"the embeddings of {found.path} have a mean of zero, which has no cosine with anything")
    return mean_D / length
