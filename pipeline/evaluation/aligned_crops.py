"""Loose crops of faces as a source: each is brought to its place by five landmarks when it is read, and not encoded lossily again."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from dali_loaders.account import ReadError
from pipeline.evaluation.listed_files import ListedFiles


class AlignedCrops(ListedFiles):
    """`files` with `points` float [n, 5, 2], x and y in pixels in the order of ArcFace's template, as PNG of side x side pixels.

    The warp is that of InsightFace's scripts for IJB: a similarity, bilinear sampling, black outside."""

    def __init__(
        self, folder: str, files: Sequence[str], points_n52: np.ndarray, side: int, lists: str = "", missing: Collection[str] = ()
    ) -> None:
        super().__init__(folder, files, lists, missing)
        self.points_n52, self.side = points_n52, side

    def read(self, index: int) -> bytes:
        from dali_loaders.packing import pixels  # here, because lists are read without OpenCV

        image_HW3 = pixels.decode(super().read(index))
        try:
            return pixels.lossless(pixels.warp(image_HW3, self.points_n52[index], self.side))
        except ValueError as error:
            raise ReadError(str(error)) from error
