"""All genuine and impostor pairs of a labelled set: EER, TAR@FAR with thresholds, rank-k, the ROC curve and score histograms.

A score is a float32 cosine rounded to 1.9e-6. Scores are counted and not stored: memory grows with images, and not with pairs."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.intervals import Pairs, bootstrap
from pipeline.evaluation.opis import consistency
from pipeline.evaluation.report import Report
from pipeline.evaluation.score_bins import FIRST, STEPS, Counts, bins, histogram, lower_edges, operating_points, total
from pipeline.evaluation.tiles import TILE, spans, unit_rows, work_on

RANKS = (1, 5, 10)
KEPT = 2_500_000  # pairs (2,236 images) up to which scores are kept, for intervals and consistency of thresholds
MOST_KEPT = 50_000_000  # the same where intervals are asked for: 600 MB, and minutes


def all_pairs(
    embeddings_ND: Tensor,
    labels_N: np.ndarray,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    name: str = "the evaluation set",
    breaks: Breaks | None = None,
    resamples: int | None = None,
) -> Report:
    """Compares every image i with every image j > i by cosine; rows need not have unit length.

    embeddings float [N, D] on any device, labels int64 [N]. With world_size > 1 every rank of `group` passes all N rows and computes
    every world_size-th tile; `breaks` may break off between tiles. Three all-reduces (4 N, 8 N bytes, and 16 MiB of counts) give all ranks
    the same report, which has the same bits on any number of ranks and threads of one kind of processor.
    Rank-k is the share of images with a mate that fewer than k impostors equal or exceed in similarity to the nearest mate.
    `resamples`: draws for the intervals; None: 1000 for sets of at most KEPT pairs, none for larger ones.
    Raises ValueError, naming `name`, on values that are not finite, on sets without a genuine or without an impostor pair, and where
    intervals are asked for of more than MOST_KEPT pairs.
    """
    identities, images_per_identity = np.unique(labels_N, return_counts=True)
    if len(identities) < 2:
        raise ValueError(f"{name}: {len(identities)} identities make no impostor pair; expected at least 2 identities.")
    if images_per_identity.max() < 2:
        raise ValueError(f"{name}: no identity has two images, so there is no genuine pair; add images of the same identities.")
    pairs = len(labels_N) * (len(labels_N) - 1) // 2
    if resamples and pairs > MOST_KEPT:
        raise ValueError(f"{name}: intervals of {pairs:,} pairs would take hours; ask for them of at most {MOST_KEPT:,} pairs.")
    order = np.argsort(labels_N, kind="stable")
    unit_ND = unit_rows(embeddings_ND, name)[torch.from_numpy(order).to(embeddings_ND.device)]
    set_ = _Sorted(unit_ND, np.searchsorted(identities, labels_N[order]))
    best_N = _best_mates(set_, rank, world_size, group, breaks)
    genuine_K, impostor_K, beaten_N = _count(set_, best_N, rank, world_size, group, breaks)

    points = operating_points(genuine_K, impostor_K)
    figures, thresholds = points.figures()
    probes_N = (best_N > 0).cpu().numpy()
    hits = {f"rank{k}": beaten_N[probes_N] < k for k in RANKS}
    figures |= {name: float(hit_n.mean()) for name, hit_n in hits.items()}
    figures |= {"images": len(labels_N), "identities": len(identities), "unreadable": 0}
    report = Report(figures, thresholds, "threshold_at_eer", points.roc(), histogram(genuine_K), histogram(impostor_K))
    if pairs > KEPT and not resamples:
        return report
    kept = _keep(set_, breaks)
    label_n = set_.labels_N[probes_N]
    shares = {name: (hit_n, label_n) for name, hit_n in hits.items()}
    report.intervals.update(bootstrap(kept, points, shares, 1000 if resamples is None else resamples, breaks=breaks))
    more_figures, table = consistency(kept, points)
    report.figures.update(more_figures)
    report.tables.update(table)
    return report


class _Sorted:
    """Images in the order of their labels, so that genuine pairs lie in the few tiles near the diagonal."""

    def __init__(self, unit_ND: Tensor, labels_N: np.ndarray) -> None:
        self.unit_ND, self.labels_N = unit_ND, labels_N  # labels are int64, 0..C-1, rising
        self.label_N = torch.from_numpy(labels_N).to(unit_ND.device)

    def tiles(self, genuine_only: bool = False) -> list[tuple[slice, slice]]:
        """Rows and columns of the tiles on and above the diagonal, or of those that may hold a genuine pair."""
        blocks = spans(len(self.labels_N), TILE)
        pairs = [(rows, columns) for at, rows in enumerate(blocks) for columns in blocks[at:]]
        return [tile for tile in pairs if self._may_be_genuine(*tile)] if genuine_only else pairs

    def buffer(self) -> Tensor:
        """Room for one tile."""
        return torch.empty(min(TILE, len(self.labels_N)) ** 2, device=self.unit_ND.device)

    def _may_be_genuine(self, rows: slice, columns: slice) -> bool:
        return bool(self.labels_N[columns.start] <= self.labels_N[rows.stop - 1])

    def bins(self, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """float32 [R, M] whose integer part is the bin of a pair's cosine, in the memory of `out`."""
        return bins(self.unit_ND[rows], self.unit_ND[columns], out)

    def masks(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | None:
        """bool [R, M]: which entries are a genuine pair, which an impostor pair. None where all are impostor pairs."""
        if not self._may_be_genuine(rows, columns):
            return None
        same_RM = self.label_N[rows, None] == self.label_N[columns]
        if rows.start != columns.start:
            return same_RM, ~same_RM
        later_RM = torch.ones_like(same_RM).triu(1)
        return same_RM & later_RM, ~same_RM & later_RM


def _best_mates(set_: _Sorted, rank: int, world_size: int, group: dist.ProcessGroup | None, breaks: Breaks | None) -> Tensor:
    """int32 [N]: the bin of each image's nearest mate, 0 where it has none."""
    device = set_.unit_ND.device

    def start() -> tuple[Tensor, Tensor]:
        return torch.zeros(len(set_.labels_N), dtype=torch.int32, device=device), set_.buffer()

    def work(state: tuple[Tensor, Tensor], tile: tuple[slice, slice]) -> None:
        best_N, buffer = state
        masks = set_.masks(*tile)
        assert masks is not None
        genuine_RM = set_.bins(*tile, buffer).masked_fill_(~masks[0], 0)
        for span, along in zip(tile, (1, 0), strict=True):
            best_N[span] = torch.maximum(best_N[span], genuine_RM.amax(dim=along).int())

    states = work_on(set_.tiles(genuine_only=True)[rank::world_size], start, work, device, breaks)
    best_N = torch.stack([best_N for best_N, _ in states]).amax(dim=0)
    if world_size > 1:
        dist.all_reduce(best_N, op=dist.ReduceOp.MAX, group=group)
    return best_N


class _Counter(Counts):
    """What one thread has counted: pairs, and for each image the impostors that reach its nearest mate."""

    def __init__(self, scores: Tensor, best_N: Tensor) -> None:
        super().__init__(scores)
        self.goal_N = torch.where(best_N > 0, best_N.float(), torch.inf)  # what an impostor must reach to count
        self.beaten_N = torch.zeros(len(best_N), dtype=torch.int64, device=scores.device)

    def beat(self, span: slice, bin_RM: Tensor) -> None:
        """Rows of the images `span`, columns their impostors. An image that max(RANKS) of them have reached needs no more counting."""
        goal_R, beaten_R = self.goal_N[span], self.beaten_N[span]
        reached = (bin_RM.amax(dim=1) >= goal_R).nonzero()[:, 0]
        if len(reached):
            beaten_R[reached] += (bin_RM[reached] >= goal_R[reached, None]).sum(dim=1)
            goal_R[beaten_R >= max(RANKS)] = torch.inf


def _count(
    set_: _Sorted, best_N: Tensor, rank: int, world_size: int, group: dist.ProcessGroup | None, breaks: Breaks | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Genuine and impostor pairs by bin, int64 [BINS] each; impostors that come as near to an image as its nearest mate, int64 [N], exact
    below max(RANKS)."""

    def work(counter: _Counter, tile: tuple[slice, slice]) -> None:
        bin_RM = set_.bins(*tile, counter.scores)
        if masks := set_.masks(*tile):
            counter.count(0, bin_RM * masks[0])
            bin_RM.mul_(masks[1])
        counter.count(1, bin_RM)
        counter.beat(tile[0], bin_RM)
        counter.beat(tile[1], bin_RM.T)

    counters = work_on(set_.tiles()[rank::world_size], lambda: _Counter(set_.buffer(), best_N), work, best_N.device, breaks)
    genuine_K, impostor_K = total(list(counters), world_size, group)
    beaten_N = torch.stack([counter.beaten_N for counter in counters]).sum(dim=0)
    if world_size > 1:
        dist.all_reduce(beaten_N, group=group)
    return genuine_K, impostor_K, beaten_N.cpu().numpy()


def _keep(set_: _Sorted, breaks: Breaks | None) -> Pairs:
    """All pairs of a small set with their scores, on every rank."""
    tiles, parts = set_.tiles(), {}

    def work(buffer: Tensor, at: int) -> None:
        rows, columns = tiles[at]
        bin_RM = set_.bins(rows, columns, buffer).int().cpu().numpy()
        i_n, j_n = np.triu_indices_from(bin_RM, 1) if rows == columns else (part.ravel() for part in np.indices(bin_RM.shape))
        parts[at] = bin_RM[i_n, j_n], set_.labels_N[rows][i_n], set_.labels_N[columns][j_n]

    work_on(range(len(tiles)), set_.buffer, work, set_.unit_ND.device, breaks)
    bin_P, first_P, second_P = (np.concatenate(part) for part in zip(*(parts[at] for at in range(len(tiles))), strict=True))
    score_P = lower_edges()[bin_P.clip(FIRST, FIRST + STEPS)]
    return Pairs(score_P, first_P == second_P, first_P, second_P, int(set_.labels_N[-1]) + 1)
