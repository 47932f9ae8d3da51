"""Published lists of pairs over folders of images."""

from __future__ import annotations

import os

from dali_loaders.config import DataConfig
from dali_loaders.sources import Source
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.listed_files import ListedFiles
from pipeline.evaluation.listed_pairs import ListedPairs, list_checksum
from pipeline.evaluation.pair_lists import find, read_list
from pipeline.evaluation.protocols.registry import register
from pipeline.evaluation.report import Report


@register("pairs_list")
class PairsList:
    """A list of pairs, LFW's pairs.txt or the lists of CALFW and CPLFW, and a folder of aligned images: accuracy over folds, TAR@FAR.

    Figures are those of a .bin, with the folds of the list; a list without folds is cut into ten. The mirror image is always added. Who is
    in an image is told by its name without the number at its end, so that intervals draw persons.
    images: folder of the images, FOLDER/NAME/NAME_0001.jpg or FOLDER/NAME_0001.jpg; by default that of the list
    allow_missing: leave out pairs without an image
    resamples: draws for the 95 % intervals, 0 for none; by default 1000
    """

    def __init__(
        self, path: str, data: DataConfig, *, images: str | None = None, allow_missing: bool = False, resamples: int | None = None
    ) -> None:
        listed = read_list(path)
        folder = images or os.path.dirname(path) or "."
        found = find(listed, path, folder, allow_missing)
        files = list(dict.fromkeys(found.values()))
        number = {file: place for place, file in enumerate(files)}
        self.pairs = ListedPairs.of(listed, path, {name: number[file] for name, file in found.items()}, person_of)
        missing = {name for pair in listed.pairs for name in pair} - found.keys()
        self.source: Source = ListedFiles(folder, files, list_checksum(listed), sorted(missing))
        self.path, self.resamples = path, resamples

    def evaluate(self, embedder: Embedder) -> Report:
        unit_nD, number_n = embedder.embed(self.source, flip=True)
        return self.pairs.scored(unit_nD, number_n, name=self.path).report(name=self.path, resamples=self.resamples)


def person_of(name: str) -> str:
    """Of Ann_Lee_0001.jpg, or Ann_Lee_0001: Ann_Lee."""
    return os.path.basename(name).rpartition("_")[0]
