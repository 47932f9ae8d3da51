"""The k nearest rows of a gallery for each query, by cosine, streamed in tiles over ranks and cores. Equal cosines: the lower row first."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.tiles import TILE, check_finite, check_widths, spans, unit_rows, unit_tile, work_on

MOST = 1000  # neighbours of a query; each tile gives at most TILE
STEPS = 2**19  # a cosine is rounded to a multiple of 1 / STEPS, as in all_pairs.py, so that equal images tie, whatever tile they are in
_ROWS = 2**32  # above the number of a row: a neighbour is one integer, rounded cosine x _ROWS + (_ROWS - 1 - row)


def neighbours(
    queries_QD: Tensor,
    gallery_GD: Tensor | np.ndarray,
    k: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    excluded_Q: np.ndarray | None = None,
    names: tuple[str, str] = ("the queries", "the gallery"),
    breaks: Breaks | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 [Q, k] of the gallery, the nearest first, and their cosines float32 [Q, k], rounded to 1.9e-6.

    Both are float [n, D] and need no unit length. Of the gallery, which may be a mapped file, a tile is held at a time; each is read once.
    `excluded_Q`: a row of the gallery for each query that is not to be found, as the query itself. With world_size > 1 every rank passes
    all rows and searches every world_size-th tile of the gallery; one all-reduce of 8 bytes and one all-gather of 8 Q k give all ranks the
    same result, bit for bit. Memory: 8 Q k bytes a thread, and the queries at unit length.
    ValueError for other widths, values that are not finite, and a gallery of fewer than k rows, without the excluded one.
    """
    check_widths(queries_QD, gallery_GD, names)
    there = len(gallery_GD) - (excluded_Q is not None)
    if not 1 <= k <= min(there, MOST):
        raise ValueError(f"{names[1]}: {k} neighbours were asked for, of {there} rows; ask for 1 to {min(there, MOST)}.")
    device = queries_QD.device
    queries_QD = unit_rows(queries_QD, names[0])
    excluded = None if excluded_Q is None else torch.from_numpy(np.asarray(excluded_Q, np.int64)).to(device)
    # Whole tiles of the gallery for one thread, whose queries then find most of their neighbours early.
    queries = spans(len(queries_QD), TILE)

    def start() -> tuple[Tensor, Tensor, Tensor, list[int]]:
        best_Qk = torch.full((len(queries_QD), k), -(2**62), dtype=torch.int64, device=device)
        return best_Qk, torch.full((len(queries_QD),), -torch.inf, device=device), torch.empty(TILE * TILE, device=device), []

    def work(state: tuple[Tensor, Tensor, Tensor, list[int]], columns: slice) -> None:
        best_Qk, worst_Q, buffer, bad = state
        rows_MD = gallery_GD[columns]
        if isinstance(rows_MD, np.ndarray):
            rows_MD = torch.from_numpy(np.array(rows_MD))  # a copy, since mapped files are not to be written
        block_MD, bad_rows = unit_tile(rows_MD.to(device))
        bad.append(bad_rows)
        block_MD *= STEPS
        for rows in queries:
            cosine_RM = buffer[: (rows.stop - rows.start) * len(block_MD)].view(rows.stop - rows.start, -1)
            torch.mm(queries_QD[rows], block_MD.T, out=cosine_RM)
            if excluded is not None:
                inside = ((excluded[rows] >= columns.start) & (excluded[rows] < columns.stop)).nonzero()[:, 0]
                cosine_RM[inside, excluded[rows][inside] - columns.start] = -torch.inf
            # Only rows with something that rounds to at least their k-th so far: of a long gallery, few.
            near = (cosine_RM.amax(dim=1) >= worst_Q[rows] - 0.5).nonzero()[:, 0]
            if len(near):
                best_Qk[rows][near] = merged = _merge(best_Qk[rows][near], cosine_RM[near], columns.start)
                worst_Q[rows][near] = (merged[:, -1] >> 32).float()

    states = work_on(spans(len(gallery_GD), TILE)[rank::world_size], start, work, device, breaks)
    best_Qk = torch.cat([best for best, _, _, _ in states], dim=1).topk(k, dim=1).values
    bad_1 = torch.tensor([sum(sum(bad) for _, _, _, bad in states)], device=device)
    if world_size > 1:
        dist.all_reduce(bad_1, group=group)
    check_finite(int(bad_1), len(gallery_GD), names[1])
    if world_size > 1:
        parts = [torch.empty_like(best_Qk) for _ in range(world_size)]
        dist.all_gather(parts, best_Qk, group=group)
        best_Qk = torch.cat(parts, dim=1).topk(k, dim=1).values
    rows_Qk = _ROWS - 1 - (best_Qk & (_ROWS - 1))
    return rows_Qk.cpu().numpy(), ((best_Qk >> 32).double() / STEPS).float().cpu().numpy()


def _merge(best_nk: Tensor, cosine_nM: Tensor, first: int) -> Tensor:
    """int64 [n, k]: the largest of the neighbours so far and those of a block that begins at row `first` of the gallery."""
    k, width = best_nk.shape[1], cosine_nM.shape[1]
    rounded_nM = cosine_nM.clamp(-2.0 * STEPS, 2.0 * STEPS).round().long()
    key_nM = rounded_nM * _ROWS + (_ROWS - 1 - first - torch.arange(width, device=best_nk.device))
    return torch.cat([best_nk, key_nM.topk(min(k, width), dim=1).values], dim=1).topk(k, dim=1).values
