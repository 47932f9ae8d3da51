"""What the prototypes of a run look like, measured at its evaluations: how long they are, how near each other, how many never moved."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from partial_fc import PartialFC
from partial_fc.optimizers import RowOptimizer

CLASSES = 1024  # whose nearest other prototype is looked for, evenly spaced over all
BINS = 64


class Counted(NamedTuple):
    counts_k: np.ndarray  # int64 [BINS]
    edges: np.ndarray  # float64 [BINS + 1]


def prototype_figures(classifier: PartialFC, optimizer: RowOptimizer) -> tuple[dict[str, float], dict[str, Counted]]:
    """Numbers and histograms, equal on every rank, by the names of metrics.

    prototypes/norm            mean length
    prototypes/nearest_cosine  mean over up to CLASSES classes of the cosine of a prototype and the nearest other one
    prototypes/never_sampled   with a sample rate below 1, the share of classes whose prototype no step has moved: momentum (AdamW: mean
                               gradient) is 0 in every element. Left out where that tells nothing: with optimizer.momentum = 0, and with
                               unsampled=lazy, which moves all of them

    Every rank calls it. Reads the prototypes twice and multiplies them with CLASSES of them; waits for the device. Communicates 3
    all-reduces of some numbers, 1 of CLASSES D floats, and what `classifier.cosines` says of CLASSES samples. Numbers that are not finite
    are left out of histograms."""
    with torch.no_grad():
        norm_S = torch.linalg.vector_norm(classifier.prototypes.detach(), dim=1, dtype=torch.float32)
        never_S = _never_moved(classifier, optimizer)
        never = -1.0 if never_S is None else float(never_S.sum())
        total, unmoved, count = _sum([float(norm_S.double().sum()), never, float(len(norm_S))], norm_S.device)
        values = {"prototypes/norm": total / count}
        if never_S is not None:
            values["prototypes/never_sampled"] = unmoved / count
        histograms = {"prototypes/norms": _histogram(norm_S)}
        if classifier.shard.num_classes > 1:
            nearest_m = _nearest_cosines(classifier)
            values["prototypes/nearest_cosine"] = float(nearest_m.mean())
            counts, edges = np.histogram(nearest_m[nearest_m.isfinite()].cpu().numpy(), bins=BINS, range=(-1, 1))
            histograms["prototypes/nearest_cosines"] = Counted(counts, edges)
    return values, histograms


def _never_moved(classifier: PartialFC, optimizer: RowOptimizer) -> Tensor | None:
    """bool [S]"""
    state = optimizer.state[classifier.prototypes]
    average_SD = state.get("momentum_buffer", state.get("exp_avg"))
    is_kept = average_SD is not None and optimizer.param_groups[0].get("momentum", 1) > 0
    if classifier.config.sample_rate == 1 or optimizer.is_lazy or not is_kept:
        return None
    return ~average_SD.any(dim=1)


def _nearest_cosines(classifier: PartialFC) -> Tensor:
    """float32 [m], m <= CLASSES"""
    prototypes_SD, shard = classifier.prototypes.detach(), classifier.shard
    rank, ranks = classifier.made
    m = min(CLASSES, shard.num_classes)
    id_m = torch.linspace(0, shard.num_classes - 1, m, dtype=torch.float64).round().long().to(prototypes_SD.device)
    id_m = torch.cat([id_m, id_m[:1].expand(-m % ranks)])  # every rank brings as many
    is_mine_m = (id_m >= shard.first) & (id_m < shard.first + shard.rows)
    rows_mD = torch.zeros(len(id_m), classifier.width, device=prototypes_SD.device)
    rows_mD[is_mine_m] = normalize(prototypes_SD[id_m[is_mine_m] - shard.first].float())
    if ranks > 1:
        dist.all_reduce(rows_mD, group=classifier.group)
    share = len(id_m) // ranks
    mine = slice(rank * share, (rank + 1) * share)
    return classifier.cosines(rows_mD[mine], id_m[mine])[1][:m]


def _histogram(value_S: Tensor) -> Counted:
    """Of the values of all ranks."""
    value_S = value_S[value_S.isfinite()]
    none = float("-inf")
    ends = torch.tensor([float(value_S.max()), -float(value_S.min())] if len(value_S) else [none, none], device=value_S.device)
    if dist.is_initialized():
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    high, low = float(ends[0]), -float(ends[1])
    if low > high:  # no finite number anywhere
        return Counted(np.zeros(BINS, np.int64), np.linspace(0, 1, BINS + 1))
    low, high = (low, high) if high - low > 1e-6 * abs(high) else (low - 1e-3, high + 1e-3)
    counts = torch.histc(value_S, BINS, low, high)
    return Counted(np.array(_sum(counts.tolist(), value_S.device)).astype(np.int64), np.linspace(low, high, BINS + 1))


def _sum(numbers: list[float], device: torch.device) -> list[float]:
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()
