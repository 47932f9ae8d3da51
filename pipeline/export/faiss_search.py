"""The nearest rows of a gallery by faiss, for `protoshard search --faiss`: exact, as the project's own (evaluation/neighbours.py)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import normalize

from dali_loaders.extras import extra

_ROWS = 1 << 14  # of the gallery, which may be a mapped file, that are added at a time


def check_faiss() -> None:
    """ValueError where faiss is not installed, before anything is embedded."""
    with extra("search"):
        import faiss  # noqa: F401


def searcher(gallery_GD: np.ndarray) -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """Holds the gallery in memory. What it returns finds, for queries float [Q, D], rows int64 [Q, k] of the gallery, the nearest first,
    and their cosines float32 [Q, k]. Rows need no unit length."""
    with extra("search"):
        import faiss
    index = faiss.IndexFlatIP(gallery_GD.shape[1])  # compares with every row
    for start in range(0, len(gallery_GD), _ROWS):
        index.add(_unit(gallery_GD[start : start + _ROWS]))

    def search(queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        cosines_Qk, rows_Qk = index.search(_unit(queries_QD), k)
        return rows_Qk, cosines_Qk

    return search


def _unit(rows_nD: np.ndarray) -> np.ndarray:
    return normalize(torch.from_numpy(np.array(rows_nD, np.float32))).numpy()
