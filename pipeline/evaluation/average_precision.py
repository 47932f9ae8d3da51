"""Mean average precision of queries in a gallery: where all mates of a query stand, and not only its nearest."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.evaluation.cross_pairs import DISTRACTOR
from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.score_bins import bins
from pipeline.evaluation.tiles import TILE, check_widths, spans, unit_rows, work_on


def mean_average_precision(
    queries_QD: Tensor,
    gallery_GD: Tensor,
    query_labels_Q: np.ndarray,
    gallery_labels_G: np.ndarray,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    names: tuple[str, str] = ("the queries", "the gallery"),
    breaks: Breaks | None = None,
) -> float | None:
    """Inputs and errors as of cross_pairs.cross. Queries without a mate do not count; None where none has one.

    The average precision of a query is the mean over its mates, from the nearest on, of the precision before and at the place of the mate,
    that is the mean of (m - 1) / (n - 1) and m / n for the m-th mate at place n, and 1 before the first place. An impostor as near as a
    mate stands before it. Source: compute_AP, which the kits of Market-1501 and TinyFace have.
    With world_size > 1 every rank passes all rows and one all-reduce of 8 bytes a genuine pair gives all the same result. Scores of
    genuine pairs are kept: 12 bytes each, on every rank.
    """
    check_widths(queries_QD, gallery_GD, names)
    query_QD, gallery_GD = unit_rows(queries_QD, names[0]), unit_rows(gallery_GD, names[1])
    order = np.argsort(gallery_labels_G, kind="stable")
    gallery_GD, gallery_labels_G = gallery_GD[torch.from_numpy(order).to(gallery_GD.device)], np.asarray(gallery_labels_G)[order]
    device = query_QD.device
    query_label_Q, gallery_label_G = (torch.from_numpy(np.asarray(labels)).to(device) for labels in (query_labels_Q, gallery_labels_G))
    blocks = spans(len(query_QD), TILE)

    def room() -> Tensor:
        return torch.empty(min(TILE, len(query_QD)) * min(TILE, len(gallery_GD)), device=device)

    def same(rows: slice, columns: slice) -> Tensor:
        return (query_label_Q[rows, None] == gallery_label_G[columns]) & (gallery_label_G[columns] != DISTRACTOR)

    # Of few blocks of the gallery, which come last, every rank finds all genuine pairs.
    genuine: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    mated = [columns for columns in spans(len(gallery_GD), TILE) if gallery_labels_G[columns.stop - 1] != DISTRACTOR]

    def find(buffer: Tensor, tile: tuple[slice, slice]) -> None:
        rows, columns = tile
        query_n, column_n = same(rows, columns).nonzero(as_tuple=True)
        bin_RM = bins(query_QD[rows], gallery_GD[columns], buffer)
        genuine[rows.start, columns.start] = query_n + rows.start, bin_RM[query_n, column_n].floor()

    work_on([(rows, columns) for columns in mated for rows in blocks], room, find, device, breaks)
    if not any(len(query_n) for query_n, _ in genuine.values()):
        return None
    query_M, bin_M = (torch.cat([part[place] for _, part in sorted(genuine.items())]) for place in (0, 1))
    # Mates in the order of their queries, those of one the nearest first.
    by_bin = torch.argsort(bin_M, descending=True, stable=True)
    by_query = by_bin[torch.argsort(query_M[by_bin], stable=True)]
    query_M, bin_M = query_M[by_query], bin_M[by_query]
    starts = torch.searchsorted(query_M, torch.arange(0, len(query_QD) + 1, device=device)).tolist()

    def compare(state: tuple[Tensor, Tensor], tile: tuple[slice, slice]) -> None:
        buffer, ahead_M = state
        rows, columns = tile
        bin_RM = bins(query_QD[rows], gallery_GD[columns], buffer)
        bin_RM.masked_fill_(same(rows, columns), 0)
        for mates in spans(starts[rows.stop] - starts[rows.start], TILE):
            at = slice(starts[rows.start] + mates.start, starts[rows.start] + mates.stop)
            ahead_M[at] += (bin_RM[query_M[at] - rows.start] >= bin_M[at, None]).sum(dim=1)

    def start() -> tuple[Tensor, Tensor]:
        return room(), torch.zeros(len(query_M), dtype=torch.int64, device=device)

    tiles = [(rows, columns) for columns in spans(len(gallery_GD), TILE) for rows in blocks]
    ahead_M = torch.stack([ahead for _, ahead in work_on(tiles[rank::world_size], start, compare, device, breaks)]).sum(dim=0)
    if world_size > 1:
        dist.all_reduce(ahead_M, group=group)
    query_m, ahead_m = query_M.cpu().numpy(), ahead_M.cpu().numpy()
    _, first, count = np.unique(query_m, return_index=True, return_counts=True)
    mate_m = np.arange(len(query_m)) - np.repeat(first, count) + 1
    place_m = mate_m + ahead_m
    before_m = np.where(place_m > 1, (mate_m - 1) / np.maximum(place_m - 1, 1), 1.0)
    precision_m = (before_m + mate_m / place_m) / 2
    return float((np.add.reduceat(precision_m, first) / count).mean())
