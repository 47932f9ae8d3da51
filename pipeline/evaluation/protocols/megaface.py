"""MegaFace, challenge 1: FaceScrub's probes among up to a million distractors."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dali_loaders.config import DataConfig
from dali_loaders.sources import Source
from pipeline.evaluation.cross_pairs import DISTRACTOR, RANKS, cross_units
from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.listed_files import ListedFiles, are_there, of_arrays
from pipeline.evaluation.megaface_lists import MegaFaceLists, read_lists
from pipeline.evaluation.protocols.registry import register
from pipeline.evaluation.report import Report
from pipeline.evaluation.score_bins import BINS, FIRST, STEPS, bins, histogram, operating_points
from pipeline.evaluation.tiles import check_widths, unit_rows, work_on


@register("megaface")
class MegaFace:
    """MegaFace in InsightFace's packing (a folder with facescrub_lst, megaface_lst and their images): rank-1 among distractors, TAR@FAR.

    Rank-k: for each probe, each other image of its identity is put among the distractors in turn; it is a hit if fewer than k distractors
    equal or exceed its similarity to the probe. Verification: genuine pairs are those of two probes, impostor pairs those of a probe and
    a distractor. The mirror image is always added.
    With facescrub_noises.txt and megaface_noises.txt the group "refined" is the score without noise: the feature of a noisy probe becomes
    the sum of those of its identity that are none, as remove_noises.py does it (but for noise of 1e-3 that it adds), and noisy distractors
    are left out. The two scores differ by many percent, and only like ones can be compared.
    Sources: arXiv 1512.00596; gen_megaface.py, remove_noises.py of InsightFace's recognition/_evaluation_/megaface.
    allow_missing: leave out images that are not there
    """

    def __init__(self, path: str, data: DataConfig, *, allow_missing: bool = False) -> None:
        lists = read_lists(path)
        files: list[str] = []
        missing: list[str] = []
        there = []
        for names, images, list_name in (
            (lists.probes, "facescrub_images", "facescrub_lst"),
            (lists.distractors, "megaface_images", "megaface_lst"),
        ):
            folder = os.path.join(path, images)
            there.append(are_there(folder, names, os.path.join(path, list_name), allow_missing))
            for name, is_there in zip(names, there[-1].tolist(), strict=True):
                (files if is_there else missing).append(os.path.join(folder, name))
        checksum = of_arrays(lists.identity_P, lists.noise_P, np.array([lists.clean, lists.refined]))
        self.source: Source = ListedFiles(path, files, checksum, missing)
        self.lists, self.number_n, self.path = lists, np.flatnonzero(np.concatenate(there)), path

    def evaluate(self, embedder: Embedder) -> Report:
        unit_nD, index_n = embedder.embed(self.source, flip=True)
        report = compare(self.lists, unit_nD, self.number_n[index_n], name=self.path, **embedder.ranks)
        listed = len(self.lists.probes) + len(self.lists.distractors)
        report.figures.update(unreadable=len(self.source) - len(index_n), left_out=listed - len(self.source))
        return report


def compare(
    lists: MegaFaceLists,
    embedding_nD: Tensor,
    number_n: np.ndarray,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    breaks: Breaks | None = None,
    name: str = "MegaFace",
) -> Report:
    """The report on embeddings float [n, D] of the images `number_n`, rising: of `lists`, probes first, then distractors.

    ValueError, naming the set, for values that are not finite, and where no identity has two probes or there is no distractor, without
    noise for a refined score."""
    ranks: dict[str, Any] = {"rank": rank, "world_size": world_size, "group": group, "breaks": breaks}
    first, noisy = np.searchsorted(number_n, [len(lists.probes), len(lists.probes) + lists.clean])
    probe_n = number_n[:first]
    identity_P, noise_P = lists.identity_P[probe_n], lists.noise_P[probe_n]
    names = f"the probes of {name}", f"the distractors of {name}"
    check_widths(embedding_nD[:first], embedding_nD[first:], names)
    if lists.refined and first == noisy:
        raise ValueError(f"{names[1]} are all noise, or cannot be read; expected some that are not.")
    if np.bincount(identity_P).max() < 2:
        raise ValueError(f"{names[0]}: no identity has two images, so there is no genuine pair.")
    probe_PD, clean_GD = unit_rows(embedding_nD[:first], names[0]), unit_rows(embedding_nD[first:noisy], names[1])
    noisy_GD = unit_rows(embedding_nD[noisy:], names[1])

    def against(rows_QD: Tensor, gallery_GD: Tensor) -> _Impostors:
        found = cross_units(rows_QD, gallery_GD, *(np.full(len(rows), DISTRACTOR) for rows in (rows_QD, gallery_GD)), **ranks)
        return _Impostors(found.impostor_K, found.impostors_QR)

    of_clean = against(probe_PD[torch.from_numpy(~noise_P)], clean_GD)
    of_noise = against(probe_PD[torch.from_numpy(noise_P)], clean_GD)
    of_all = of_clean.among(noise_P, of_noise).beside(against(probe_PD, noisy_GD))
    report = _report(probe_PD, identity_P, of_all, len(number_n) - int(first))
    if lists.refined:
        refined_PD = _refined(probe_PD, identity_P, noise_P, names[0])
        of_centres = against(refined_PD[torch.from_numpy(noise_P)], clean_GD)
        report.groups["refined"] = _report(refined_PD, identity_P, of_clean.among(noise_P, of_centres), len(clean_GD))
        report.groups["refined"].figures.update(noisy_probes=int(noise_P.sum()), noisy_distractors=len(noisy_GD))
    return report


def _refined(probe_PD: Tensor, identity_P: np.ndarray, noise_P: np.ndarray, name: str) -> Tensor:
    """Probes with the noisy ones replaced. ValueError where all images of one's identity that are no noise could not be read."""
    lost = np.setdiff1d(identity_P, identity_P[~noise_P])
    if len(lost):
        raise ValueError(f"{name}: {len(lost)} identities have no image that is no noise and can be read; copy their images again.")
    of_clean, identity = torch.from_numpy(~noise_P), torch.from_numpy(identity_P)
    sum_CD = torch.zeros(int(identity_P.max()) + 1, probe_PD.shape[1], dtype=torch.float64)
    sum_CD.index_add_(0, identity[of_clean], probe_PD.cpu()[of_clean].double())
    replaced = torch.where(of_clean[:, None], probe_PD.cpu().double(), sum_CD[identity])
    return unit_rows(replaced, name).to(probe_PD.device)


class _Impostors(NamedTuple):
    """Of probes against distractors, in bins of score_bins.py."""

    pairs_K: np.ndarray  # int64 [BINS]
    nearest_PR: np.ndarray  # int64 [P, max(RANKS)], falling

    def among(self, noise_P: np.ndarray, of_noise: _Impostors) -> _Impostors:
        """These are the probes that are no noise, and `of_noise` the others."""
        order = np.argsort(np.argsort(noise_P, kind="stable"), kind="stable")
        return _Impostors(self.pairs_K + of_noise.pairs_K, np.concatenate([self.nearest_PR, of_noise.nearest_PR])[order])

    def beside(self, others: _Impostors) -> _Impostors:
        """The same probes against other distractors."""
        both_PR = np.concatenate([self.nearest_PR, others.nearest_PR], axis=1)
        return _Impostors(self.pairs_K + others.pairs_K, -np.sort(-both_PR, axis=1)[:, : max(RANKS)])


def _report(probe_PD: Tensor, identity_P: np.ndarray, found: _Impostors, distractors: int) -> Report:
    genuine_K, hits, pairs = _genuine(probe_PD, identity_P, found.nearest_PR)
    points = operating_points(genuine_K, found.pairs_K)
    figures, thresholds = points.figures()
    figures |= {f"rank{k}": float(hits[k] / pairs) for k in RANKS}
    figures |= {"probes": len(identity_P), "identities": len(np.unique(identity_P)), "distractors": distractors}
    return Report(figures, thresholds, "threshold_at_eer", points.roc(), histogram(genuine_K), histogram(found.pairs_K))


def _genuine(probe_PD: Tensor, identity_P: np.ndarray, impostors_PR: np.ndarray) -> tuple[np.ndarray, dict[int, int], int]:
    """Genuine pairs by bin, int64 [BINS]; hits at each rank of all probes with each of their mates; how many these are. Every rank
    computes all, which are few."""
    order = np.argsort(identity_P, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(identity_P[order])) + 1)
    most = max(map(len, members))

    def work(state: tuple[np.ndarray, Tensor], member_M: np.ndarray) -> None:
        counts, buffer = state
        rows_MD = probe_PD[torch.from_numpy(member_M).to(probe_PD.device)]
        bin_MM = bins(rows_MD, rows_MD, buffer).cpu().numpy().astype(np.int64).clip(FIRST, FIRST + STEPS)
        others_MM = ~np.eye(len(member_M), dtype=bool)
        np.add.at(counts, bin_MM[np.triu(others_MM)], 1)
        for place, k in enumerate(RANKS):
            counts[BINS + place] += ((bin_MM > impostors_PR[member_M, k - 1, None]) & others_MM).sum()

    def start() -> tuple[np.ndarray, Tensor]:
        return np.zeros(BINS + len(RANKS), np.int64), torch.empty(most * most, device=probe_PD.device)

    counts = np.sum([state[0] for state in work_on(members, start, work, probe_PD.device)], axis=0)
    pairs = sum(len(member_M) * (len(member_M) - 1) for member_M in members)
    return counts[:BINS], dict(zip(RANKS, counts[BINS:].tolist(), strict=True)), pairs
