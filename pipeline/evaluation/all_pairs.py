"""All genuine and impostor pairs of a labelled set: EER, TAR@FAR, rank-1, the ROC curve and score histograms.

Cosines are counted in 2^20 + 1 fine bins, so memory grows with the number of images and not with the number of pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.evaluation.embed import Breaks

# Bins are centred on multiples of 2 / STEPS = 1.9e-6: wide against float32 rounding (1e-7), and the ties that occur in practice
# (cosines -1, 0 and 1 of equal, dead or orthogonal embeddings) lie in the middle of a bin, so that rounding does not split them.
STEPS = 2**20
BLOCK = 2**22  # scores held at a time (16 MiB of float32)
COARSE = 256  # bins of the histograms in the report; STEPS is a multiple
HISTOGRAM_EDGES = np.linspace(-1.0, 1.0, COARSE + 1)
ROC_POINTS = 2000
INVERSE_FARS = {"1e-1": 10, "1e-2": 100, "1e-3": 1000, "1e-4": 10000}


@dataclass(frozen=True, eq=False)
class PairReport:
    """What all pairs of a labelled set say about its embeddings. Rates are fractions, scores are cosines, accepted when >= threshold."""

    eer: float  # where the false accept and false reject rates are equal, linear between the points of the ROC
    threshold_at_eer: float
    tar_at_far: dict[str, float | None]  # largest TAR whose FAR is at most the key; None: fewer than 1/FAR impostor pairs
    rank1: float  # share of images with a mate whose nearest other image is a mate; a tie with an impostor is a miss
    images: int
    identities: int
    genuine_pairs: int
    impostor_pairs: int
    roc: tuple[np.ndarray, np.ndarray]  # FAR and TAR float64 [P], ascending, P <= 2000 points spaced evenly in log FAR
    genuine_histogram: np.ndarray  # int64 [256], pair counts between HISTOGRAM_EDGES
    impostor_histogram: np.ndarray
    unreadable: int = 0  # images of the source that could not be decoded and are not counted in `images`
    threshold_at_far: dict[str, float | None] = field(default_factory=dict)  # the cosines of tar_at_far

    @property
    def best_cosine(self) -> float:
        """The threshold to accept pairs at: the EER's."""
        return self.threshold_at_eer

    def as_dict(self) -> dict[str, Any]:
        """The numbers of the report, without the curves, ready for JSON."""
        return {
            "eer": self.eer,
            "tar_at_far": dict(self.tar_at_far),
            "rank1": self.rank1,
            "images": self.images,
            "identities": self.identities,
            "genuine_pairs": self.genuine_pairs,
            "impostor_pairs": self.impostor_pairs,
            "threshold_at_eer": self.threshold_at_eer,
            "threshold_at_far": dict(self.threshold_at_far),
            "unreadable": self.unreadable,
        }


def all_pairs(
    embeddings_ND: Tensor,
    labels_N: np.ndarray,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    name: str = "the evaluation set",
    breaks: Breaks | None = None,
) -> PairReport:
    """Compares every image i with every image j > i by cosine; rows need not have unit length.

    embeddings float [N, D] on any device, labels int64 [N]. With world_size > 1 every rank of `group` passes all N rows, counts
    every world_size-th row block, between which `breaks` may break off, and two all-reduces (16 MiB of counts, 8 N bytes) give all ranks
    the same report.
    Pairs whose cosines share a bin of 1.9e-6 count as ties. Raises ValueError, naming `name`, on values that are not finite
    and on sets without a genuine or without an impostor pair.
    """
    identities, images_per_identity = np.unique(labels_N, return_counts=True)
    if len(identities) < 2:
        raise ValueError(f"{name}: {len(identities)} identities make no impostor pair; expected at least 2 identities.")
    if images_per_identity.max() < 2:
        raise ValueError(f"{name}: no identity has two images, so there is no genuine pair; add images of the same identities.")
    bad = int((~torch.isfinite(embeddings_ND).all(dim=1)).sum())
    if bad:
        raise ValueError(f"{name}: the embeddings of {bad} of {len(labels_N)} images are not finite; the model has diverged.")

    counts_2K, best_2N = _count_pairs(embeddings_ND, labels_N, rank, world_size, breaks)
    if breaks:
        breaks.agree()
    if world_size > 1:
        dist.all_reduce(counts_2K, group=group)
        dist.all_reduce(best_2N, op=dist.ReduceOp.MAX, group=group)
    genuine_K, impostor_K = counts_2K[:, 1:].cpu().numpy()
    genuine_pairs, impostor_pairs = int(genuine_K.sum()), int(impostor_K.sum())
    true_accepts_P, false_accepts_P, threshold_P = _operating_points(genuine_K, impostor_K)
    tar_P, far_P = true_accepts_P / genuine_pairs, false_accepts_P / impostor_pairs
    eer, at = equal_error_rate(far_P, tar_P)
    point_at = {
        key: int(np.flatnonzero(false_accepts_P * inverse <= impostor_pairs)[-1]) if impostor_pairs >= inverse else None
        for key, inverse in INVERSE_FARS.items()
    }
    best_genuine_N, best_impostor_N = best_2N
    probes_N = best_genuine_N > 0
    return PairReport(
        eer=eer,
        threshold_at_eer=float(threshold_P[at]),
        tar_at_far={key: None if at is None else float(tar_P[at]) for key, at in point_at.items()},
        threshold_at_far={key: None if at is None else min(1.0, float(threshold_P[at])) for key, at in point_at.items()},
        rank1=float((best_genuine_N > best_impostor_N)[probes_N].double().mean()),
        images=len(labels_N),
        identities=len(identities),
        genuine_pairs=genuine_pairs,
        impostor_pairs=impostor_pairs,
        roc=_thin(far_P, tar_P, impostor_pairs),
        genuine_histogram=_coarse(genuine_K),
        impostor_histogram=_coarse(impostor_K),
    )


def equal_error_rate(far_P: np.ndarray, tar_P: np.ndarray) -> tuple[float, int]:
    """EER of an ROC from (0, 0) to (1, 1), and the index of its first point whose FAR is at least its false reject rate."""
    excess_P = far_P - (1.0 - tar_P)
    at = int(np.argmax(excess_P >= 0))
    before = excess_P[at - 1]
    share = -before / (excess_P[at] - before)
    return float(far_P[at - 1] + share * (far_P[at] - far_P[at - 1])), at


def _count_pairs(
    embeddings_ND: Tensor, labels_N: np.ndarray, rank: int, world_size: int, breaks: Breaks | None = None
) -> tuple[Tensor, Tensor]:
    """Counts int64 [2, STEPS + 2] of genuine and impostor scores by bin, and each image's best genuine and impostor bin, int32 [2, N].

    Bin k >= 1 holds the cosines that round to (k - 1) * 2 / STEPS - 1; bin 0 collects matrix entries that are no pair of the kind.
    Images are sorted by label, so the genuine pairs of a row block lie in its first columns and the rest needs no comparison of labels.
    """
    device, N = embeddings_ND.device, len(labels_N)
    order = np.argsort(labels_N, kind="stable")
    label_N = torch.from_numpy(np.asarray(labels_N, dtype=np.int64)[order]).to(device)
    position_N = torch.arange(N, device=device)
    unit_ND = normalize(embeddings_ND.float()[torch.from_numpy(order).to(device)])
    counts_2K = torch.zeros(2, STEPS + 2, dtype=torch.int64, device=device)
    best_2N = torch.zeros(2, N, dtype=torch.int32, device=device)
    rows = max(1, BLOCK // N)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would blur scores by 1e-3
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for start in range(rank * rows, N, world_size * rows):
                if breaks and breaks.wanted():
                    break
                stop = min(start + rows, N)
                end = int(torch.searchsorted(label_N, label_N[stop - 1], right=True))
                bin_RM = ((STEPS / 2 * unit_ND[start:stop]) @ unit_ND[start:].T).add_(STEPS / 2 + 1.5).int().clamp_(1, STEPS + 1)
                near_RG = bin_RM[:, : end - start]
                same_RG = label_N[start:stop, None] == label_N[start:end]
                later_RG = position_N[start:stop, None] < position_N[start:end]
                genuine_RG = near_RG * (same_RG & later_RG)
                near_RG *= ~same_RG & later_RG
                for kind, block in enumerate((genuine_RG, bin_RM)):
                    counts_2K[kind] += torch.bincount(block.flatten(), minlength=STEPS + 2)
                    for span, along in ((slice(start, stop), 1), (slice(start, start + block.shape[1]), 0)):
                        best_2N[kind, span] = torch.maximum(best_2N[kind, span], block.amax(dim=along))
    finally:
        torch.set_float32_matmul_precision(precision)
    return counts_2K, best_2N


def _operating_points(genuine_K: np.ndarray, impostor_K: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True accepts, false accepts and threshold at every distinct score, from above the highest (0, 0, inf) to the lowest (all, all)."""
    bins = np.flatnonzero(genuine_K + impostor_K)[::-1]
    true_accepts = np.concatenate([[0], genuine_K[bins].cumsum()])
    false_accepts = np.concatenate([[0], impostor_K[bins].cumsum()])
    return true_accepts, false_accepts, np.concatenate([[np.inf], (bins - 0.5) * (2 / STEPS) - 1])


def _thin(far_P: np.ndarray, tar_P: np.ndarray, impostor_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """At most ROC_POINTS points of the curve: for FAR 0 and for FARs spaced evenly in log, the best TAR at no more than that FAR."""
    targets = np.concatenate([[0.0], np.geomspace(1 / impostor_pairs, 1.0, ROC_POINTS - 1)])
    targets[-1] = 1.0
    keep = np.unique(np.searchsorted(far_P, targets, side="right") - 1)
    return far_P[keep], tar_P[keep]


def _coarse(counts_K: np.ndarray) -> np.ndarray:
    coarse = counts_K[:STEPS].reshape(COARSE, -1).sum(axis=1)
    coarse[-1] += counts_K[STEPS]
    return coarse
