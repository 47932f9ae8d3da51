"""Templates: what is known of a person's face by several images and videos, as one vector; and the cosines of listed pairs of them."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dali_loaders.progress import progress
from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.score_bins import Counts, bins, total
from pipeline.evaluation.tiles import TILE, check_finite, spans, unit_rows, work_on

_ROWS = 8192  # features in float64 at a time


def pool(feature_ND: Tensor, weight_N: np.ndarray, template_N: np.ndarray, media_N: np.ndarray, name: str) -> tuple[Tensor, np.ndarray]:
    """Templates float32 [T, D] of unit length, in the order of their ids, and these, rising int64 [T].

    A media (a still, or the frames of one video) is the mean of its images' features times `weight_N`; a template is the sum of its media.
    Features are not normalised, so that an image of which the network makes a short one counts less. Sums are in float64, in the order of
    the images. Ids are any int64 [N]. ValueError, naming `name`, where features are not finite.
    Source: image2template_feature of InsightFace's eval_ijbc.py.
    """
    ids_T, place_N = np.unique(template_N, return_inverse=True)
    _, media_place_N, count_M = np.unique(np.stack([place_N, media_N]), axis=1, return_inverse=True, return_counts=True)
    share_N = np.asarray(weight_N, np.float64) / count_M[media_place_N.reshape(-1)]
    order = np.argsort(place_N, kind="stable")
    sum_TD = np.zeros((len(ids_T), feature_ND.shape[1]))
    bad = 0
    with progress("pooling templates", len(order)) as done:
        for rows in spans(len(order), _ROWS):
            which = order[rows]
            weighted_nD = feature_ND[torch.from_numpy(which).to(feature_ND.device)].double().cpu().numpy() * share_N[which, None]
            bad += int((~np.isfinite(weighted_nD).all(axis=1)).sum())
            of, starts = np.unique(place_N[which], return_index=True)
            sum_TD[of] += np.add.reduceat(weighted_nD, starts, axis=0)
            done.add(len(which))
    check_finite(bad, len(order), name)
    return unit_rows(torch.from_numpy(sum_TD).to(feature_ND.device), name), ids_T


def count_pairs(
    unit_TD: Tensor,
    first_P: np.ndarray,
    second_P: np.ndarray,
    same_P: np.ndarray,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    breaks: Breaks | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Genuine and impostor pairs by bin (score_bins.py), int64 [BINS] each, of P pairs of rows of unit length; `same_P` bool.

    Pairs are looked up in tiles of the whole matrix of cosines, which of a twentieth of all pairs is faster than a product for each pair.
    With world_size > 1 every rank passes all rows and pairs and computes every world_size-th tile; all have the same result."""
    device, blocks = unit_TD.device, -(-len(unit_TD) // TILE)
    low_P, high_P = np.minimum(first_P, second_P), np.maximum(first_P, second_P)
    tile_P = (low_P // TILE).astype(np.int64) * blocks + high_P // TILE
    order = np.argsort(tile_P.astype(np.uint16) if blocks < 256 else tile_P, kind="stable")  # of 16 bits, a radix sort
    used, starts = np.unique(tile_P[order], return_index=True)
    place_P = ((low_P % TILE) * TILE + high_P % TILE).astype(np.int32)[order]
    same_P = same_P[order]
    tiles = list(zip(used.tolist(), starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True))
    rows_of = [unit_TD[rows] for rows in spans(len(unit_TD), TILE)]

    def work(counts: Counts, tile: tuple[int, int, int]) -> None:
        number, start, stop = tile
        rows, columns = (rows_of[place] for place in divmod(number, blocks))
        bin_RM = bins(rows, columns, counts.scores)
        place_n = torch.from_numpy(place_P[start:stop]).to(device).long()
        bin_n = bin_RM[place_n // TILE, place_n % TILE]
        same_n = torch.from_numpy(same_P[start:stop]).to(device)
        for at in spans(stop - start, counts.scores.numel()):  # a list may name a pair more than once
            counts.count(0, bin_n[at] * same_n[at])
            counts.count(1, bin_n[at] * ~same_n[at])

    states = work_on(tiles[rank::world_size], lambda: Counts(torch.empty(TILE * TILE, device=device)), work, device, breaks)
    return total(states, world_size, group)
