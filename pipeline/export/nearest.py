"""The k rows of a gallery that are nearest to each query, exactly: tile by tile with torch, or by faiss where one asks for it.

evaluation/neighbours.py searches over ranks, with both matrices in memory; this one reads mapped files, of which it holds two tiles."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dali_loaders.extras import extra

QUERIES, GALLERY = 1024, 16384  # rows of a tile, 64 MiB of cosines


def nearest(gallery_GD: np.ndarray, queries_QD: np.ndarray, k: int, faiss: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Cosines float32 [Q, k], the largest first, and their gallery rows int64 [Q, k]; of equal cosines the smaller row comes first.

    Rows need not have unit length. k is at most G. Matrices may be mapped files: memory is that of two tiles, and of the result; with faiss
    that of the gallery."""
    k = min(k, len(gallery_GD))
    if faiss:
        return _by_faiss(gallery_GD, queries_QD, k)
    cosines, rows = [], []
    for start in range(0, len(queries_QD), QUERIES):
        query_qD = _unit(queries_QD[start : start + QUERIES])
        best_qk, row_qk = torch.zeros(len(query_qD), 0), torch.zeros(len(query_qD), 0, dtype=torch.int64)
        for first in range(0, len(gallery_GD), GALLERY):
            cosine_qg = query_qD @ _unit(gallery_GD[first : first + GALLERY]).T
            some_qk, at_qk = cosine_qg.topk(min(k, cosine_qg.shape[1]), dim=1)
            best_qk, row_qk = torch.cat([best_qk, some_qk], 1), torch.cat([row_qk, at_qk + first], 1)
            by_row = row_qk.argsort(dim=1)
            best_qk, row_qk = best_qk.gather(1, by_row), row_qk.gather(1, by_row)
            best_qk, order = best_qk.sort(dim=1, descending=True, stable=True)
            best_qk, row_qk = best_qk[:, :k], row_qk.gather(1, order)[:, :k]
        cosines.append(best_qk)
        rows.append(row_qk)
    return torch.cat(cosines).numpy(), torch.cat(rows).numpy()


def check_faiss() -> None:
    """ValueError where faiss is not installed, before anything is embedded."""
    with extra("search"):
        import faiss  # noqa: F401


def _by_faiss(gallery_GD: np.ndarray, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    with extra("search"):
        import faiss as library
    index = library.IndexFlatIP(gallery_GD.shape[1])  # exact
    for start in range(0, len(gallery_GD), GALLERY):
        index.add(_unit(gallery_GD[start : start + GALLERY]).numpy())
    return index.search(_unit(queries_QD).numpy(), k)


def _unit(rows_nD: np.ndarray) -> Tensor:
    return normalize(torch.from_numpy(np.array(rows_nD, np.float32)))
