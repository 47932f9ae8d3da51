"""All pairs of a labelled set."""

from __future__ import annotations

import numpy as np

from dali_loaders.config import DataConfig
from dali_loaders.sources import Source, open_source
from pipeline.evaluation import cleaning as cleaning_file
from pipeline.evaluation.all_pairs import all_pairs
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.protocols.registry import register
from pipeline.evaluation.report import Report


@register("all_pairs")
class AllPairs:
    """Every image of a labelled folder, .tar or .rec against every other one: EER, TAR@FAR, rank-k. The default of such sets.

    resamples: draws for the 95 % intervals, 0 for none; by default 1000, and none for more than 2,236 images
    cleaning: a .csv in which rank 0 lists what looks wrong with the identities, as `cleaning.py` says, above the threshold at FAR 1e-3 or,
        if that is unreached, at the EER
    """

    def __init__(self, path: str, data: DataConfig, *, resamples: int | None = None, cleaning: str | None = None) -> None:
        if cleaning:
            cleaning_file.check_path(cleaning)
        self.source: Source = open_source(path, data.reader if path.endswith(".rec") else "native", cache=data.cache)
        self.path, self.resamples, self.cleaning = path, resamples, cleaning

    def evaluate(self, embedder: Embedder) -> Report:
        embeddings_nD, readable_n = embedder.embed(self.source)
        if embedder.look:
            embedder.look(self.source, embeddings_nD, readable_n)
        labels_n = np.asarray(self.source.labels, dtype=np.int64)[readable_n]
        report = all_pairs(embeddings_nD, labels_n, name=self.path, resamples=self.resamples, **embedder.ranks)
        report.figures["unreadable"] = len(self.source) - len(labels_n)
        if self.cleaning:
            above = report.thresholds["threshold_at_far/1e-3"]
            threshold = report.best_cosine if above is None else above
            found = cleaning_file.doubts(embeddings_nD, labels_n, threshold, name=self.path, **embedder.ranks)
            if embedder.rank == 0:
                cleaning_file.write(self.cleaning, found, self.source, readable_n, labels_n)
        return report
