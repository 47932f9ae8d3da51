"""CFP, frontal against profile, in the layout of its authors."""

from __future__ import annotations

import os

from dali_loaders.config import DataConfig
from dali_loaders.regular import open_regular
from dali_loaders.sources import Source
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.listed_files import ListedFiles
from pipeline.evaluation.listed_pairs import ListedPairs, list_checksum
from pipeline.evaluation.pair_lists import PairList, find
from pipeline.evaluation.protocols.registry import register
from pipeline.evaluation.report import Report

FOLDS = 10
_LISTS = ("F", "P")  # frontal and profile images, the first and the second of a pair


@register("cfp_fp")
class CfpFp:
    """CFP's folder (Protocol/Split/FP/01 to 10, Protocol/Pair_list_F.txt and Pair_list_P.txt, Data/Images): frontal against profile images,
    accuracy over its 10 folds, TAR@FAR.

    The layout is that of the set's Readme.txt: a line of same.txt and diff.txt is "i,j", numbers of a frontal and of a profile image, whose
    paths, from the folder of the list on, are in the lines "i PATH" of Pair_list_F.txt and Pair_list_P.txt. Figures are those of a .bin.
    The mirror image is always added. Folders of images are persons, which intervals draw.
    images: another folder with Data/Images below it, such as one of aligned copies; by default that of the set
    allow_missing: leave out pairs without an image
    resamples: draws for the 95 % intervals, 0 for none; by default 1000
    """

    def __init__(
        self, path: str, data: DataConfig, *, images: str | None = None, allow_missing: bool = False, resamples: int | None = None
    ) -> None:
        listed = _read(path)
        found = find(listed, os.path.join(path, "Protocol"), images or path, allow_missing)
        files = list(found.values())
        self.pairs = ListedPairs.of(listed, path, {name: number for number, name in enumerate(found)}, person_of)
        missing = {name for pair in listed.pairs for name in pair} - found.keys()
        self.source: Source = ListedFiles(images or path, files, list_checksum(listed), sorted(missing))
        self.path, self.resamples = path, resamples

    def evaluate(self, embedder: Embedder) -> Report:
        unit_nD, number_n = embedder.embed(self.source, flip=True)
        return self.pairs.scored(unit_nD, number_n, name=self.path).report(name=self.path, resamples=self.resamples)


def person_of(name: str) -> str:
    """Of Data/Images/001/frontal/01.jpg: Data/Images/001."""
    return os.path.dirname(os.path.dirname(name))


def _read(path: str) -> PairList:
    """ValueError, with file and line, for what is not in that layout."""
    names = [_numbered(os.path.join(path, "Protocol", f"Pair_list_{kind}.txt")) for kind in _LISTS]
    pairs: list[tuple[str, str]] = []
    issame: list[bool] = []
    for fold in range(1, FOLDS + 1):
        size = len(pairs)
        for file, same in (("same.txt", True), ("diff.txt", False)):
            list_path = os.path.join(path, "Protocol", "Split", "FP", f"{fold:02d}", file)
            for line, text in _lines(list_path):
                numbers = [field.strip() for field in text.split(",")]
                if len(numbers) != 2 or any(number not in known for number, known in zip(numbers, names, strict=True)):
                    raise ValueError(f"{list_path}, line {line} is {text!r}; expected i,j with numbers of the lists Pair_list_F and _P.")
                pairs.append((names[0][numbers[0]], names[1][numbers[1]]))
                issame.append(same)
        size = len(pairs) - size
        if size == 0 or len(pairs) != fold * size:
            raise ValueError(f"{path}: fold {fold} of Protocol/Split/FP has {size} pairs; expected as many in each fold, so copy it again.")
    return PairList(pairs, issame, FOLDS)


def _numbered(path: str) -> dict[str, str]:
    """Paths, from the folder of the set on, by number."""
    found = {}
    for line, text in _lines(path):
        fields = text.split()
        if len(fields) != 2 or not fields[0].isdecimal():
            raise ValueError(f"{path}, line {line} is {text!r}; expected a number and a path.")
        found[fields[0]] = os.path.normpath(os.path.join("Protocol", fields[1]))
    return found


def _lines(path: str) -> list[tuple[int, str]]:
    try:
        with open(path, encoding="utf-8-sig", opener=open_regular) as file:
            return [(number, line.strip()) for number, line in enumerate(file, start=1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read ({reason}); expected the folder of CFP, with Protocol and Data.") from error
