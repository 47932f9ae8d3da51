"""RFW: the same protocol for four groups of people, and how far apart they are."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import Tensor

from dali_loaders.config import DataConfig
from dali_loaders.identities import checksum
from dali_loaders.sources import Source
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.intervals import Pairs, draws, percentiles
from pipeline.evaluation.listed_files import ListedFiles
from pipeline.evaluation.listed_pairs import ListedPairs, Scored, list_checksum
from pipeline.evaluation.opis import stability
from pipeline.evaluation.pair_lists import find, read_list
from pipeline.evaluation.protocols.pairs_list import person_of
from pipeline.evaluation.protocols.registry import register
from pipeline.evaluation.report import HISTOGRAM_EDGES, OperatingPoints, Report

GROUPS = ("African", "Asian", "Caucasian", "Indian")


@register("rfw")
class Rfw:
    """RFW's folder (test/txts/RACE/RACE_pairs.txt, test/data/RACE/IDENTITY/IMAGE) of African, Asian, Caucasian and Indian faces: the ten
    folds of each group, the mean accuracy, and the spread between groups.

    Each group is compared as LFW is (`pairs_list`). `accuracy` is the mean of the groups' accuracies, `spread` the difference of the
    largest and the smallest, `spread_std` their population standard deviation. The other figures are of all pairs together. `threshold` is
    the one that is right on most of all pairs; `far_at_common`, `tar_at_common` and `accuracy_at_common` are what it means to a group.
    Layout of the pairs: LFW's, without a first line, 10 times 300 genuine and 300 impostor pairs.
    images: folder of the RACEs, such as one of aligned copies; by default test/data
    allow_missing: leave out pairs without an image
    resamples: draws of persons for the 95 % intervals, 0 for none; by default 1000
    """

    def __init__(
        self, path: str, data: DataConfig, *, images: str | None = None, allow_missing: bool = False, resamples: int | None = None
    ) -> None:
        root = os.path.join(path, "test") if os.path.isdir(os.path.join(path, "test")) else path
        folder = images or os.path.join(root, "data")
        if not os.path.isdir(os.path.join(root, "txts")):
            raise ValueError(f"{root} has no folder txts; expected RFW's folder, with test/txts/RACE/RACE_pairs.txt and test/data/RACE.")
        self.groups: dict[str, ListedPairs] = {}
        files: list[str] = []
        missing: list[str] = []
        sums = []
        for group in GROUPS:
            list_path = os.path.join(root, "txts", group, f"{group}_pairs.txt")
            listed = read_list(list_path)
            found = find(listed, list_path, os.path.join(folder, group), allow_missing)
            number = {name: len(files) + place for place, name in enumerate(found)}
            files += found.values()
            missing += sorted({f"{group}/{name}" for pair in listed.pairs for name in pair if name not in found})
            self.groups[group] = ListedPairs.of(listed, list_path, number, person_of)
            sums.append(list_checksum(listed))
        self.source: Source = ListedFiles(folder, files, checksum(sums), missing)
        self.path, self.resamples = path, resamples

    def evaluate(self, embedder: Embedder) -> Report:
        unit_nD, number_n = embedder.embed(self.source, flip=True)
        return compare(self.groups, unit_nD, number_n, name=self.path, resamples=self.resamples)


def compare(groups: dict[str, ListedPairs], unit_nD: Tensor, number_n: np.ndarray, *, name: str, resamples: int | None = None) -> Report:
    """The report on embeddings float [n, D] of unit length of the images `number_n`. ValueError as `ListedPairs.scored` and `score_pairs`
    have it."""
    scored = {group: pairs.scored(unit_nD, number_n, name=f"{name}, {group}") for group, pairs in groups.items()}
    reports = {group: of_group.report(name=f"{name}, {group}", resamples=resamples) for group, of_group in scored.items()}
    scores = {group: (1 - of_group.distance_P / 2, of_group.same_P) for group, of_group in scored.items()}
    score_P, same_P = (np.concatenate(parts) for parts in zip(*scores.values(), strict=True))
    points = OperatingPoints.of_scores(score_P, same_P)
    figures = _spread(np.array([report.accuracy for report in reports.values()]))
    of_all, thresholds = points.figures()
    right_K = points.true_accepts_P + points.impostor_pairs - points.false_accepts_P
    threshold = float(points.threshold_P[1 + right_K[1:].argmax()])
    for group, report in reports.items():
        score_n, same_n = scores[group]
        accepted_n = score_n >= threshold
        report.figures.update(
            accuracy_at_common=float((accepted_n == same_n).mean()),
            far_at_common=float(accepted_n[~same_n].mean()),
            tar_at_common=float(accepted_n[same_n].mean()),
        )
    figures |= {"accuracy_at_common": float(((score_P >= threshold) == same_P).mean()), **of_all}
    for key in ("pairs", "images", "identities", "left_out", "unreadable"):
        counts = [report.figures[key] for report in reports.values()]
        figures[key] = None if None in counts else sum(count for count in counts if count is not None)
    genuine_histogram, impostor_histogram = (np.histogram(score_P[kind].clip(-1, 1), HISTOGRAM_EDGES)[0] for kind in (same_P, ~same_P))
    thresholds = {"threshold": threshold, **thresholds}
    report = Report(figures, thresholds, "threshold", points.roc(), genuine_histogram, impostor_histogram, groups=reports)
    report.tables["thresholds"] = stability(scores, threshold)
    number = 1000 if resamples is None else resamples
    report.intervals.update(percentiles(_drawn(scored, score_P, points, number), number))
    return report


def _spread(accuracy_G: np.ndarray) -> dict[str, Any]:
    """Of the groups' accuracies [G], or of those of R draws, [G, R]."""
    spread = accuracy_G.max(axis=0) - accuracy_G.min(axis=0)
    return {"accuracy": accuracy_G.mean(axis=0), "spread": spread, "spread_std": accuracy_G.std(axis=0)}


def _drawn(groups: dict[str, Scored], score_P: np.ndarray, points: OperatingPoints, resamples: int) -> dict[str, np.ndarray]:
    """Figures of draws of the persons of all groups together; of pairs, where the lists do not say who is who."""
    parts, shares, units = [], {}, 0
    known = all(of_group.person_P2 is not None for of_group in groups.values())
    for group, of_group in groups.items():
        pairs = len(of_group.same_P)
        own_P2 = of_group.person_P2 if known and of_group.person_P2 is not None else np.arange(pairs)[:, None].repeat(2, axis=1)
        parts.append(units + own_P2)
        units += int(own_P2.max()) + 1
        shares[group] = (of_group.is_right, parts[-1])
    first_P, second_P = np.concatenate(parts).T
    same_P = np.concatenate([of_group.same_P for of_group in groups.values()])
    drawn = draws(Pairs(score_P, same_P, first_P, second_P, units), points, shares, resamples)
    return drawn | _spread(np.stack([drawn.pop(group) for group in groups])) if drawn else {}
