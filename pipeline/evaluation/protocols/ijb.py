"""IJB-B and IJB-C: templates of several images and videos, one against one and one against many."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dali_loaders.config import DataConfig
from dali_loaders.sources import Source
from pipeline.evaluation.aligned_crops import AlignedCrops
from pipeline.evaluation.cross_pairs import Crossing, cross
from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.listed_files import are_there, of_arrays
from pipeline.evaluation.protocols.registry import register
from pipeline.evaluation.report import Report
from pipeline.evaluation.score_bins import histogram, lower_edges, operating_points
from pipeline.evaluation.template_lists import TemplateLists, read_lists
from pipeline.evaluation.templates import count_pairs, pool

FPIRS = (0.1, 0.01)
logger = logging.getLogger(__name__)


@register("ijb")
class Ijb:
    """IJB-B or IJB-C in InsightFace's packing (a folder with loose_crop and meta): TAR@FAR of pairs of templates, and 1:N search.

    Loose crops are warped by their five landmarks when they are read, to the size of the network's images. A feature is that of the image
    plus that of its mirror image, not normalised, times the detector's score; a template is the sum over its media of the means of their
    features (templates.py).
    `tar_at_far` is at the point whose rate is nearest, as the scripts have it; `tar_at_far_conservative` never exceeds the rate.
    The group "1:N" is there where meta has the lists of galleries and probes: all probes against both galleries as one. `tpir_at_fpir`
    is the share of probes whose mate is above the n-th highest impostor similarity, n = probes x FPIR rounded up.
    Sources: InsightFace's recognition/arcface_torch/eval_ijbc.py and recognition/_evaluation_/ijb/ijb_1n.py.
    images: folder of the loose crops; by default PATH/loose_crop
    allow_missing: leave out images that are not there, and what needs their templates
    """

    def __init__(self, path: str, data: DataConfig, *, images: str | None = None, allow_missing: bool = False) -> None:
        lists = read_lists(path, allow_missing)
        folder = images or os.path.join(path, "loose_crop")
        there_N = are_there(folder, lists.names, os.path.join(path, "meta"), allow_missing)
        missing = [name for name, there in zip(lists.names, there_N.tolist(), strict=True) if not there]
        self.path, self.lists = path, lists.only(there_N) if missing else lists
        subjects = (array for part in (lists.gallery, lists.probes) if part for array in part)
        checksum = of_arrays(
            lists.template_N, lists.media_N, lists.points_N52, lists.score_N, lists.first_P, lists.second_P, lists.same_P, *subjects
        )
        files = [os.path.join(folder, name) for name in self.lists.names]
        self.source: Source = AlignedCrops(folder, files, self.lists.points_N52, data.image_size, checksum, missing)

    def evaluate(self, embedder: Embedder) -> Report:
        feature_nD, number_n = embedder.embed(self.source, flip=True, unit=False)
        report = compare(self.lists.only(number_n), feature_nD, name=self.path, **embedder.ranks)
        report.figures["unreadable"] = len(self.source) - len(number_n)
        return report


def compare(
    lists: TemplateLists,
    feature_ND: Tensor,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    breaks: Breaks | None = None,
    name: str = "the templates",
) -> Report:
    """The report on features float [N, D] of the images of `lists`, that of the mirror image added, of any length. Pairs and probes without
    a template are left out and counted. ValueError where nothing is left, or features are not finite."""
    unit_TD, id_T = pool(feature_ND, lists.score_N, lists.template_N, lists.media_N, name)
    first_P, second_P = _rows(id_T, lists.first_P), _rows(id_T, lists.second_P)
    whole_P = (first_P >= 0) & (second_P >= 0)
    left_out = len(whole_P) - int(whole_P.sum())
    same_P = lists.same_P
    if left_out:
        first_P, second_P, same_P = first_P[whole_P], second_P[whole_P], same_P[whole_P]
    for kind, count in (("genuine", int(same_P.sum())), ("impostor", len(same_P) - int(same_P.sum()))):
        if not count:
            raise ValueError(f"{name}: none of its {len(same_P)} pairs of templates with images is a {kind} pair; expected both kinds.")
    ranks: dict[str, Any] = {"rank": rank, "world_size": world_size, "group": group, "breaks": breaks}
    genuine_K, impostor_K = count_pairs(unit_TD, first_P, second_P, same_P, **ranks)
    points = operating_points(genuine_K, impostor_K)
    figures, thresholds = points.figures(nearest=True)
    named = np.unique(np.concatenate([lists.first_P, lists.second_P]))
    figures |= {"templates": len(id_T), "images": len(lists.names), "unreadable": 0, "identities": None, "rank1": None}
    figures |= {"left_out": left_out, "templates_left_out": int((_rows(id_T, named) < 0).sum())}
    if left_out and rank == 0:
        logger.warning(
            "%s: %d pairs and %d templates are left out, because images are missing", name, left_out, figures["templates_left_out"]
        )
    report = Report(figures, thresholds, "threshold_at_eer", points.roc(), histogram(genuine_K), histogram(impostor_K))
    if lists.gallery is not None and lists.probes is not None:
        probes, gallery = (_Subjects(id_T, *part) for part in (lists.probes, lists.gallery))
        other = _contradicted(len(id_T), (probes, gallery), first_P, second_P, same_P)
        if other and rank == 0:
            logger.warning("%s: the label of %d pairs is not what the subjects of the lists for 1:N say; copy the lists again", name, other)
        probes.keep(np.isin(probes.subject_n, gallery.subject_n))
        if not len(probes.row_n):
            raise ValueError(f"{name}: no probe and its mate in the gallery have images; 1:N needs one.")
        names = f"the probes of {name}", f"the galleries of {name}"
        rows = [unit_TD[torch.from_numpy(part.row_n).to(unit_TD.device)] for part in (probes, gallery)]
        found = cross(rows[0], rows[1], probes.subject_n, gallery.subject_n, names=names, **ranks)
        report.groups["1:N"] = one_to_many(found, names)
        report.groups["1:N"].figures.update(gallery=len(gallery.row_n), left_out=probes.left_out)
    return report


def one_to_many(found: Crossing, names: tuple[str, str]) -> Report:
    """Rank-k and TPIR at each FPIR of probes that have one mate each."""
    report = found.report(names, nearest=True)
    above_K = np.cumsum(found.impostor_K[::-1])[::-1]  # impostors of this bin or a higher one
    for fpir in FPIRS:
        most = math.ceil(len(found.mate_Q) * fpir)
        reached = np.flatnonzero(above_K >= most)
        threshold = lower_edges()[reached[-1] + 1] if len(reached) else None
        hits = int(found.genuine_K[reached[-1] + 1 :].sum()) if len(reached) else None
        report.figures[f"tpir_at_fpir/{fpir:g}"] = None if hits is None else hits / len(found.mate_Q)
        report.thresholds[f"threshold_at_fpir/{fpir:g}"] = None if threshold is None else float(threshold)
    return report


class _Subjects:
    """Those templates of a list that have images: their rows and subjects."""

    def __init__(self, id_T: np.ndarray, template_n: np.ndarray, subject_n: np.ndarray) -> None:
        self.row_n, self.subject_n, self._listed = _rows(id_T, template_n), subject_n, len(template_n)
        self.keep(self.row_n >= 0)

    def keep(self, which_n: np.ndarray) -> None:
        self.row_n, self.subject_n = self.row_n[which_n], self.subject_n[which_n]

    @property
    def left_out(self) -> int:
        return self._listed - len(self.row_n)


def _contradicted(templates: int, parts: tuple[_Subjects, ...], first_P: np.ndarray, second_P: np.ndarray, same_P: np.ndarray) -> int:
    """Pairs of rows that have one subject and are called two, or the other way round."""
    subject_T, known_T = np.zeros(templates, np.int64), np.zeros(templates, bool)
    for part in parts:
        subject_T[part.row_n], known_T[part.row_n] = part.subject_n, True
    same_subject_P = subject_T[first_P] == subject_T[second_P]
    return int(((same_subject_P != same_P) & known_T[first_P] & known_T[second_P]).sum())


def _rows(id_T: np.ndarray, wanted_n: np.ndarray) -> np.ndarray:
    """Where the ids are among rising `id_T`, int64 [n]; -1 for those that are not."""
    place_n = np.searchsorted(id_T, wanted_n).clip(max=len(id_T) - 1)
    return np.where(id_T[place_n] == wanted_n, place_n, -1)
