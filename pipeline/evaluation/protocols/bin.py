"""InsightFace's `.bin` pair sets."""

from __future__ import annotations

import numpy as np

from dali_loaders.config import DataConfig
from dali_loaders.identities import checksum
from dali_loaders.sources import Source
from pipeline.evaluation.bin_pairs import MemorySource, read_bin, score_pairs
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.protocols.registry import register
from pipeline.evaluation.report import Report


@register("bin")
class Bin:
    """InsightFace's .bin pair sets (LFW, CFP-FP, AgeDB-30, CALFW, CPLFW): accuracy over 10 folds, TAR@FAR. The default of such files.

    The mirror image is always added. A pair with an image that cannot be decoded is left out and named in the log.
    resamples: draws for the 95 % intervals, 0 for none; by default 1000
    """

    def __init__(self, path: str, data: DataConfig, *, resamples: int | None = None) -> None:
        images, self.issame_P = read_bin(path)
        self.source: Source = MemorySource(path, images, checksum([str(int(same)) for same in self.issame_P]))
        self.resamples = resamples

    def evaluate(self, embedder: Embedder) -> Report:
        embedding_nD, index_n = embedder.embed(self.source, flip=True)
        row = np.full(len(self.source), -1)
        row[index_n] = np.arange(len(index_n))
        first_P, second_P = row.reshape(-1, 2).T
        whole_P = (first_P >= 0) & (second_P >= 0)
        unit_nD = embedding_nD.double().cpu().numpy()
        if not np.isfinite(unit_nD).all():
            raise ValueError(f"{self.source.path}: some embeddings are not finite; the model has diverged.")
        distance_P = np.square(unit_nD[first_P[whole_P]] - unit_nD[second_P[whole_P]]).sum(axis=1)
        unreadable = len(self.source) - len(index_n)
        return score_pairs(distance_P, self.issame_P[whole_P], unreadable=unreadable, name=self.source.path, resamples=self.resamples)
