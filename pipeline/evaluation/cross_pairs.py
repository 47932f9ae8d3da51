"""Queries against a gallery: every genuine and impostor pair of the two, counted and not stored, and rank-k of each query.

A score is a float32 cosine rounded to 1.9e-6, as in all_pairs.py. Memory grows with queries and gallery, and not with pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.report import Report
from pipeline.evaluation.score_bins import FIRST, STEPS, Counts, bins, histogram, operating_points, total
from pipeline.evaluation.tiles import TILE, check_widths, spans, unit_rows, work_on

DISTRACTOR = -1  # the label of an image of the gallery that shows nobody who is looked for
RANKS = (1, 5, 10, 20)


@dataclass(frozen=True, eq=False)
class Crossing:
    """What comparing queries with a gallery found. Bins are those of score_bins.py."""

    genuine_K: np.ndarray  # int64 [BINS]: pairs of a query and a mate in the gallery
    impostor_K: np.ndarray
    mate_Q: np.ndarray  # int64 [Q]: the bin of each query's nearest mate, 0 where it has none
    impostors_QR: np.ndarray  # int64 [Q, max(RANKS)]: bins of its nearest impostors, falling, 0 where there are fewer

    def hits(self, k: int) -> np.ndarray:
        """bool [n] of the queries with a mate: fewer than k impostors equal or exceed the nearest mate."""
        mated_Q = self.mate_Q > 0
        return self.impostors_QR[mated_Q, k - 1] < self.mate_Q[mated_Q]

    def report(self, names: tuple[str, str] = ("the queries", "the gallery"), *, nearest: bool = False) -> Report:
        """`nearest`: as OperatingPoints.figures has it. ValueError without a genuine or without an impostor pair."""
        for kind, counts_K in (("genuine", self.genuine_K), ("impostor", self.impostor_K)):
            if not counts_K.any():
                raise ValueError(f"{names[0]} and {names[1]} make no {kind} pair; expected identities that are in both, and others.")
        points = operating_points(self.genuine_K, self.impostor_K)
        figures, thresholds = points.figures(nearest=nearest)
        figures |= {f"rank{k}": float(self.hits(k).mean()) for k in RANKS}
        figures |= {"queries": len(self.mate_Q), "queries_with_mate": int((self.mate_Q > 0).sum())}
        of_kinds = histogram(self.genuine_K), histogram(self.impostor_K)
        return Report(figures, thresholds, "threshold_at_eer", points.roc(), *of_kinds)


def cross_pairs(
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
) -> Report:
    """EER, TAR@FAR with thresholds, rank-k and curves of every query against every image of the gallery; as `cross`.

    Rank-k is the share of queries with a mate in the gallery of which fewer than k impostors equal or exceed the nearest mate.
    ValueError also where there is no genuine or no impostor pair."""
    of = queries_QD, gallery_GD, query_labels_Q, gallery_labels_G
    report = cross(*of, rank=rank, world_size=world_size, group=group, names=names, breaks=breaks).report(names)
    report.figures.update(gallery=len(gallery_labels_G), distractors=int((np.asarray(gallery_labels_G) == DISTRACTOR).sum()))
    return report


def cross(
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
) -> Crossing:
    """Compares by cosine; rows need not have unit length.

    float [Q, D] and [G, D] on one device; labels int64 [Q] and [G], where DISTRACTOR matches nothing. With world_size > 1 every rank of
    `group` passes all rows and computes every world_size-th tile; then all have the same result, bit for bit, on any number of ranks and
    threads. Two all-reduces (16 MiB of counts, 8 Q bytes) and an all-gather of 80 Q bytes. `breaks` may break off between tiles.
    ValueError, with `names`, for values that are not finite, other widths and nothing to compare.
    """
    check_widths(queries_QD, gallery_GD, names)
    ranks: dict[str, Any] = {"rank": rank, "world_size": world_size, "group": group, "breaks": breaks}
    return cross_units(unit_rows(queries_QD, names[0]), unit_rows(gallery_GD, names[1]), query_labels_Q, gallery_labels_G, **ranks)


def cross_units(
    query_QD: Tensor,
    gallery_GD: Tensor,
    query_labels_Q: np.ndarray,
    gallery_labels_G: np.ndarray,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    breaks: Breaks | None = None,
) -> Crossing:
    """`cross` of rows that have unit length."""
    query_order, gallery_order = (np.argsort(labels, kind="stable") for labels in (query_labels_Q, gallery_labels_G))
    query_QD, gallery_GD = _in_order(query_QD, query_order), _in_order(gallery_GD, gallery_order)
    query_labels_Q, gallery_labels_G = np.asarray(query_labels_Q)[query_order], np.asarray(gallery_labels_G)[gallery_order]
    device = query_QD.device
    query_label_Q, gallery_label_G = (torch.from_numpy(labels).to(device) for labels in (query_labels_Q, gallery_labels_G))

    def may_be_genuine(rows: slice, columns: slice) -> bool:
        """Both are in the order of their labels, so this holds for few tiles."""
        first, last = query_labels_Q[rows.start], query_labels_Q[rows.stop - 1]
        low, high = gallery_labels_G[columns.start], gallery_labels_G[columns.stop - 1]
        return bool(max(first, low, DISTRACTOR + 1) <= min(last, high))

    def work(found: _Found, tile: tuple[slice, slice]) -> None:
        rows, columns = tile
        bin_RM = bins(query_QD[rows], gallery_GD[columns], found.scores)
        if may_be_genuine(rows, columns):
            same_RM = (query_label_Q[rows, None] == gallery_label_G[columns]) & (gallery_label_G[columns] != DISTRACTOR)
            genuine_RM = bin_RM * same_RM
            found.count(0, genuine_RM)
            found.mate_Q[rows] = torch.maximum(found.mate_Q[rows], genuine_RM.amax(dim=1).floor())
            bin_RM.mul_(~same_RM)
        found.count(1, bin_RM)
        found.keep_nearest(rows, bin_RM)

    def start() -> _Found:
        return _Found(torch.empty(min(TILE, len(query_QD)) * min(TILE, len(gallery_GD)), device=device), len(query_QD))

    # All queries meet one block of the gallery before the next, so that they find their nearest impostors early.
    tiles = [(rows, columns) for columns in spans(len(gallery_GD), TILE) for rows in spans(len(query_QD), TILE)]
    states = work_on(tiles[rank::world_size], start, work, device, breaks)
    genuine_K, impostor_K = total(list(states), world_size, group)
    mate_Q = torch.stack([found.mate_Q for found in states]).amax(dim=0)
    impostors_QR = torch.cat([found.impostors_QR for found in states], dim=1).topk(max(RANKS), dim=1).values
    if world_size > 1:
        dist.all_reduce(mate_Q, op=dist.ReduceOp.MAX, group=group)
        parts = [torch.empty_like(impostors_QR) for _ in range(world_size)]
        dist.all_gather(parts, impostors_QR, group=group)
        impostors_QR = torch.cat(parts, dim=1).topk(max(RANKS), dim=1).values
    of_query = np.argsort(query_order)
    found_Q, found_QR = (_inside(bin_n.cpu().numpy())[of_query] for bin_n in (mate_Q, impostors_QR))
    return Crossing(genuine_K, impostor_K, found_Q, found_QR)


class _Found(Counts):
    """What one thread has counted, and the nearest of each query so far, as whole numbers in float32."""

    def __init__(self, scores: Tensor, queries: int) -> None:
        super().__init__(scores)
        self.mate_Q = torch.zeros(queries, device=scores.device)
        self.impostors_QR = torch.zeros(queries, max(RANKS), device=scores.device)

    def keep_nearest(self, rows: slice, bin_RM: Tensor) -> None:
        best_RR = self.impostors_QR[rows]
        near = (bin_RM.amax(dim=1) >= best_RR[:, -1] + 1).nonzero()[:, 0]  # of a long gallery, few
        if len(near):
            nearest = bin_RM[near].topk(min(max(RANKS), bin_RM.shape[1]), dim=1).values.floor()
            best_RR[near] = torch.cat([best_RR[near], nearest], dim=1).topk(max(RANKS), dim=1).values


def _in_order(rows_ND: Tensor, order: np.ndarray) -> Tensor:
    """Without a copy where they are in order already, as distractors are: 1,000,000 rows are 2 GB."""
    return rows_ND if (np.diff(order) > 0).all() else rows_ND[torch.from_numpy(order).to(rows_ND.device)]


def _inside(bin_n: np.ndarray) -> np.ndarray:
    """int64; what rounding moved beyond -1 and 1 comes back."""
    return np.where(bin_n > 0, bin_n.clip(FIRST, FIRST + STEPS), 0).astype(np.int64)
