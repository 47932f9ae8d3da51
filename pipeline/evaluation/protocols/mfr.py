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
from pipeline.evaluation.all_pairs import all_pairs
from pipeline.evaluation.cross_pairs import cross_pairs
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.protocols.registry import register
from pipeline.evaluation.report import Report

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
    resamples: draws of identities for 95 % intervals, 0 for none; by default 1000 for what has up to 2,236 images. Masks have none
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
        parts = {}
        for name, (start, stop) in self.spans.items():
            rows = np.flatnonzero((number_n >= start) & (number_n < stop))
            parts[name] = embeddings_nD[torch.from_numpy(rows).to(embeddings_nD.device)], self.labels_N[number_n[rows]]
        report = compare(parts, name=self.path, resamples=self.resamples, **embedder.ranks)
        report.figures["unreadable"] = len(self.source) - len(number_n)
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
        (masked_nD, masked_n), (unmasked_nD, unmasked_n) = parts[MASKED], parts[UNMASKED]
        names = (f"{name}, {MASKED}", f"{name}, {UNMASKED}")
        groups[MASK] = cross_pairs(masked_nD, unmasked_nD, masked_n, unmasked_n, names=names, **ranks)
    embeddings_nD, labels_n = torch.cat([parts[group][0] for group in people]), np.concatenate([parts[group][1] for group in people])
    report = all_pairs(embeddings_nD, labels_n, name=f"{name}, all groups", resamples=resamples, **ranks)
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
    if not crossed and (len(source.identities) < 2 or np.bincount(source.labels).max() < 2):
        raise ValueError(f"{path} needs two identities, and one of them two images; add images, or take the folder out.")
    return source
