"""The form of MFR-Ongoing, for people of one's own: groups, children, masks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dali_loaders.config import DataConfig
from dali_loaders.names import printable
from dali_loaders.sources import FolderSource, Source
from dali_loaders.sources.several import SeveralSources
from pipeline.evaluation.all_pairs import KEPT, MOST_KEPT, all_pairs
from pipeline.evaluation.cross_pairs import cross_pairs
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.intervals import Pairs, bootstrap
from pipeline.evaluation.protocols.registry import register
from pipeline.evaluation.report import OperatingPoints, Report
from pipeline.evaluation.tiles import unit_rows

CHILDREN, MASK = "children", "mask"
MASKED, UNMASKED = f"{MASK}/masked", f"{MASK}/unmasked"
FAR, FAR_OF_OTHERS = "1e-6", "1e-4"  # of groups of people and of all of them; of children and masks
ALL_SHARE, MASK_SHARE = 0.75, 0.25  # by which MFR-Ongoing orders models


@register("mfr")
class Mfr:
    """A folder in the form of MFR-Ongoing: GROUP/IDENTITY/IMAGE for each group of people, children/IDENTITY/IMAGE, and mask/masked and
    mask/unmasked with the same IDENTITY/IMAGE. All pairs of each group, of all groups together (MR-All), masked against unmasked.

    Definitions: challenges/mfr/README.md of InsightFace, whose own images are not public. Groups are African, Caucasian, South Asian and
    East Asian there; any names will do, and `children` and `mask` may be missing. The figures are those of MR-All, where each identity of
    each group is one of its own, and below them those of each group. `mfr` is .25 TAR@FAR 1e-4 of masks + .75 TAR@FAR 1e-6 of MR-All. Rates
    are conservative ("FAR less than"). The table `groups` has the figure of each group that the README asks for.
    resamples: draws of identities for 95 % intervals, 0 for none; by default 1000 for each part of up to 2.5 million pairs
    """

    def __init__(self, path: str, data: DataConfig, *, resamples: int | None = None) -> None:
        names, beside = _groups(path)
        sources = {name: _people(os.path.join(path, name), crossed=name in (MASKED, UNMASKED)) for name in names}
        self.source: Source = SeveralSources(path, list(sources.values()), names)
        for name in beside:
            self.source.account.pass_over("beside the folders of groups", printable(name))
        self.spans = {part.name: (part.start, part.stop) for part in self.source.parts}
        self.labels_N = self.source.labels.copy()
        if MASKED in sources:
            self._join_masks(path, sources[MASKED], sources[UNMASKED])
        self.path, self.resamples = path, resamples

    def evaluate(self, embedder: Embedder) -> Report:
        embeddings_nD, number_n = embedder.embed(self.source)
        parts, unreadable = {}, dict.fromkeys((*self.spans, MASK), 0)
        for name, (start, stop) in self.spans.items():
            rows = np.flatnonzero((number_n >= start) & (number_n < stop))
            parts[name] = embeddings_nD[torch.from_numpy(rows).to(embeddings_nD.device)], self.labels_N[number_n[rows]]
            unreadable[MASK if name in (MASKED, UNMASKED) else name] += stop - start - len(rows)
        report = compare(parts, name=self.path, resamples=self.resamples, **embedder.ranks)
        report.figures["unreadable"] = sum(unreadable[name] for name in self.spans if name in report.groups and name != CHILDREN)
        for name, of_group in report.groups.items():
            of_group.figures["unreadable"] = unreadable[name]
        return report

    def _join_masks(self, path: str, masked: FolderSource, unmasked: FolderSource) -> None:
        """Gives the identities of masked images the labels of the unmasked ones of the same name. ValueError where there are none."""
        labels_N = self.source.labels
        of_masked, of_unmasked = (slice(*self.spans[name]) for name in (MASKED, UNMASKED))
        label_of = dict(zip((unmasked.identities[label] for label in unmasked.labels), labels_N[of_unmasked], strict=True))
        names = [masked.identities[label] for label in masked.labels]
        if len(label_of) < 2 or label_of.keys().isdisjoint(names):
            both = f"{os.path.join(path, MASKED)} and {UNMASKED}"
            raise ValueError(f"{both} have too few identities in common; expected one of the same name, and another in {UNMASKED}.")
        self.labels_N[of_masked] = [label_of.get(name, own) for name, own in zip(names, labels_N[of_masked], strict=True)]


def compare(parts: Mapping[str, tuple[Tensor, np.ndarray]], *, name: str, resamples: int | None = None, **ranks: Any) -> Report:
    """The report on embeddings float [n, D] and labels int64 [n] of each part: groups of people, CHILDREN, MASKED and UNMASKED. Labels are
    numbers of identities over all parts. `ranks`, ValueError: as `all_pairs` and `cross_pairs` have them."""
    groups: dict[str, Report] = {}
    people = [group for group in parts if group not in (CHILDREN, MASKED, UNMASKED)]
    for group in [*people, *([CHILDREN] if CHILDREN in parts else [])]:
        groups[group] = all_pairs(*parts[group], name=f"{name}, {group}", resamples=resamples, **ranks)
    if MASKED in parts:
        groups[MASK] = _across(parts[MASKED], parts[UNMASKED], (f"{name}, {MASKED}", f"{name}, {UNMASKED}"), resamples, **ranks)
    embeddings_nD, labels_n = torch.cat([parts[group][0] for group in people]), np.concatenate([parts[group][1] for group in people])
    report = all_pairs(embeddings_nD, labels_n, name=f"{name}, all groups", resamples=resamples, **ranks)
    taken = {figure.partition("/")[0] for figure in report.numbers()} | {"mfr", "intervals", "tables"}
    if called := sorted(taken.intersection(groups)):
        raise ValueError(f"{name}: a group is called {called[0]}, as a figure of reports is; give its folder another name.")
    far_of = {group: FAR_OF_OTHERS if group in (CHILDREN, MASK) else FAR for group in groups}
    tar_of = {group: of_group.tar_at_far[far_of[group]] for group, of_group in groups.items()}
    tar_of_all = report.tar_at_far[FAR]
    if MASK in groups:
        unreached = tar_of[MASK] is None or tar_of_all is None
        report.figures["mfr"] = None if unreached else MASK_SHARE * tar_of[MASK] + ALL_SHARE * tar_of_all
    report.tables["groups"] = [
        *({"group": group, "far": far_of[group], "tar": tar_of[group]} for group in groups),
        {"group": "MR-All", "far": FAR, "tar": tar_of_all},
    ]
    report.groups.update(groups)
    return report


def _across(
    masked: tuple[Tensor, np.ndarray], unmasked: tuple[Tensor, np.ndarray], names: tuple[str, str], resamples: int | None, **ranks: Any
) -> Report:
    """Every masked image against every unmasked one; with intervals where `all_pairs` would have them of as many pairs."""
    (masked_QD, masked_Q), (unmasked_GD, unmasked_G) = masked, unmasked
    pairs = len(masked_Q) * len(unmasked_G)
    if resamples and pairs > MOST_KEPT:
        raise ValueError(f"{names[0]}: intervals of {pairs:,} pairs would take hours; ask for them of at most {MOST_KEPT:,} pairs.")
    report = cross_pairs(masked_QD, unmasked_GD, masked_Q, unmasked_G, names=names, **ranks)
    identity = np.unique(np.concatenate([masked_Q, unmasked_G]), return_inverse=True)[1]
    report.figures.update(images=len(identity), identities=int(identity.max()) + 1)
    if resamples == 0 or (pairs > KEPT and not resamples):
        return report
    cosine_QG = unit_rows(masked_QD, names[0]).double() @ unit_rows(unmasked_GD, names[1]).double().T
    score_P = cosine_QG.cpu().numpy().ravel().round(6)  # so that equal ones are
    first_P = identity[: len(masked_Q)].repeat(len(unmasked_G))
    second_P = np.tile(identity[len(masked_Q) :], len(masked_Q))
    same_P = first_P == second_P
    kept = Pairs(score_P, same_P, first_P, second_P, int(identity.max()) + 1)
    report.intervals.update(bootstrap(kept, OperatingPoints.of_scores(score_P, same_P), {}, resamples or 1000, breaks=ranks.get("breaks")))
    return report


def _groups(path: str) -> tuple[list[str], list[str]]:
    """Names of the folders of images, and of what lies beside them. ValueError where `path` is in another form."""
    form = f"expected GROUP/IDENTITY/IMAGE for each group of people, and maybe {CHILDREN}/IDENTITY/IMAGE, {MASKED} and {UNMASKED}"
    try:
        names = sorted(os.listdir(path))
        folders = [name for name in names if os.path.isdir(os.path.join(path, name)) and not name.startswith(".")]
        beside = [name for name in names if name not in folders]
        masks = sorted(f"{MASK}/{name}" for name in os.listdir(os.path.join(path, MASK))) if MASK in folders else []
    except OSError as error:
        raise ValueError(f"{path} cannot be listed ({error.strerror}); {form}.") from error
    people = [name for name in folders if name not in (CHILDREN, MASK)]
    if not people:
        raise ValueError(f"{path} has no folder of a group of people; {form}.")
    for name in people:
        if name.lower() in (CHILDREN, MASK, "masked", "unmasked"):
            raise ValueError(f"{os.path.join(path, printable(name))} would be a group of people by its name; {form}.")
    for name in (MASKED, UNMASKED):
        if MASK in folders and not os.path.isdir(os.path.join(path, name)):
            raise ValueError(f"{path} has a folder {MASK}, but no {name}; {form}.")
    crossed = [MASKED, UNMASKED] if masks else []
    return [*people, *([CHILDREN] if CHILDREN in folders else []), *crossed], [*beside, *sorted(set(masks) - set(crossed))]


def _people(path: str, crossed: bool) -> FolderSource:
    """A folder of identities. ValueError where they make no genuine or no impostor pair; `crossed` ones are compared with others."""
    source = FolderSource(path)
    if deeper := [identity for identity in source.identities if "/" in identity]:
        raise ValueError(
            f"{path} has folders of images inside folders, such as {printable(deeper[0])}; expected GROUP/IDENTITY/IMAGE, so the set may "
            "lie one folder further down, or up."
        )
    if not crossed and (len(source.identities) < 2 or np.bincount(source.labels).max() < 2):
        raise ValueError(f"{path} needs two identities, and one of them two images; add images, or take the folder out.")
    return source
