"""Tiles of a large matrix of cosines, on all cores. A tile is the work of one thread, so that the bits of its cosines depend on the tile
alone: not on how many threads or ranks there are, nor on which of them computes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dali_loaders.progress import progress
from pipeline.evaluation.embed import Breaks

# Rows and columns. 1024 x 1024 float32 are 4 MiB, which stay in a core's caches from the product to the last pass over them.
TILE = 1024

S = TypeVar("S")
T = TypeVar("T")


def unit_rows(embeddings_ND: Tensor, name: str) -> Tensor:
    """float32 [N, D] of unit length, from norms in float64, which no float32 row overflows; a row of zeros stays one. ValueError, naming
    the set, where values or norms are not finite."""
    unit_ND = torch.empty(embeddings_ND.shape, device=embeddings_ND.device)
    bad = 0
    with _one_thread(), torch.no_grad():
        for rows in spans(len(embeddings_ND), 8 * TILE):  # not all at once: 1,000,000 rows are 4 GB in float64
            unit_ND[rows], bad_rows = unit_tile(embeddings_ND[rows])
            bad += bad_rows
    check_finite(bad, len(embeddings_ND), name)
    return unit_ND


def check_widths(queries_QD: Tensor, gallery_GD: Tensor | np.ndarray, names: tuple[str, str]) -> None:
    """ValueError, naming both, where they cannot be compared: nothing in one of them, or other widths."""
    for name, rows in zip(names, (queries_QD, gallery_GD), strict=True):
        if not len(rows):
            raise ValueError(f"{name}: there are no embeddings to compare.")
    if queries_QD.shape[1] != gallery_GD.shape[1]:
        raise ValueError(
            f"{names[0]} have width {queries_QD.shape[1]} and {names[1]} {gallery_GD.shape[1]}; embed both with the same network."
        )


def unit_tile(rows_nD: Tensor) -> tuple[Tensor, int]:
    """The same for a few rows at a time, which the caller checks: float32 [n, D], and the number of rows that are not finite."""
    exact_nD = rows_nD.double()
    norm_n1 = exact_nD.norm(dim=1, keepdim=True)
    return (exact_nD / torch.where(norm_n1 > 0, norm_n1, 1.0)).float(), int((~torch.isfinite(norm_n1)).sum())


def check_finite(bad: int, images: int, name: str) -> None:
    if bad:
        raise ValueError(f"{name}: the embeddings of {bad} of {images} images are not finite; the model has diverged.")


def spans(number: int, size: int = 0) -> list[slice]:
    """0..number in slices of `size`, by default TILE."""
    size = size or TILE
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]


def work_on(
    tiles: Sequence[T], start: Callable[[], S], work: Callable[[S, T], None], device: torch.device, breaks: Breaks | None = None
) -> list[S]:
    """Calls `work(state, tile)` for every tile, on as many threads as torch uses, each with its own `state` from `start()`; returns the
    states. `breaks` is asked before each tile; then all ranks agree, as Breaks says. On a GPU there is one thread. Rank 0 shows how far
    its own tiles are."""
    lock, left, ended = threading.Lock(), iter(tiles), threading.Event()

    def take() -> T | None:
        with lock:
            if not ended.is_set() and breaks and breaks.wanted():
                ended.set()
            return None if ended.is_set() else next(left, None)

    def on_a_thread() -> S:
        with _one_thread(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            state = start()
            try:
                while (tile := take()) is not None:
                    work(state, tile)
                    with lock:
                        done.add()
            except BaseException:
                ended.set()
                raise
            return state

    with _full_precision(), progress("comparing, in tiles", len(tiles)) as done:
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        if threads == 1:
            states = [on_a_thread()]
        else:
            with ThreadPoolExecutor(threads) as pool:
                try:
                    states = [future.result() for future in [pool.submit(on_a_thread) for _ in range(threads)]]
                finally:
                    ended.set()  # also after Ctrl-C, which reaches this thread alone
            torch.set_num_threads(threads)  # what threads to come begin with; it was changed for all by those of the pool
    if breaks:
        breaks.agree()
    return states


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch's operations of this thread use no other one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _full_precision() -> Iterator[None]:
    """TF32 would blur cosines by 1e-3."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
