"""YouTube Faces: videos compared by the mean of their frames."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dali_loaders.config import DataConfig
from dali_loaders.names import printable
from dali_loaders.regular import open_regular
from dali_loaders.sources import IMAGE_EXTENSIONS, Source
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.listed_files import ListedFiles
from pipeline.evaluation.listed_pairs import ListedPairs, list_checksum
from pipeline.evaluation.pair_lists import REMEDY, PairList
from pipeline.evaluation.protocols.registry import register
from pipeline.evaluation.report import Report

IMAGES = "aligned_images_DB"
_LINE = "split, pair, NAME/NUMBER, NAME/NUMBER, 1 or 0"
_SHOWN = 3


@register("ytf")
class Ytf:
    """YouTube Faces (splits.txt, and folders NAME/NUMBER of aligned frames): 5,000 pairs of videos, accuracy over 10 splits, TAR@FAR.

    A video is the mean of its frames' features, each with that of its mirror image added and not normalised, as InsightFace's scripts take
    the frames of a video of IJB: a frame of which the network makes a short feature counts less. Pairs are compared as those of a .bin,
    with the splits as folds. Lines of splits.txt are those that OpenBR reads (its YouTubeFacesDB plugin); the number of the pair may be
    left out. Intervals draw persons, which are the NAMEs.
    images: folder of the NAMEs; by default aligned_images_DB beside the list, or the folder of the list
    allow_missing: leave out pairs with a video that has no frames
    resamples: draws for the 95 % intervals, 0 for none; by default 1000
    """

    def __init__(
        self, path: str, data: DataConfig, *, images: str | None = None, allow_missing: bool = False, resamples: int | None = None
    ) -> None:
        listed = read_splits(path)
        beside = os.path.join(os.path.dirname(path), IMAGES)
        folder = images or (beside if os.path.isdir(beside) else os.path.dirname(path) or ".")
        frames = {video: _frames(folder, video) for video in dict.fromkeys(video for pair in listed.pairs for video in pair)}
        missing = [video for video, files in frames.items() if not files]
        there = [video for video, files in frames.items() if files]
        if missing and not (allow_missing and there):
            names = ", ".join(map(printable, missing[:_SHOWN])) + ", ..." * (len(missing) > _SHOWN)
            raise ValueError(
                f"{folder} has no frames of {len(missing)} of the {len(frames)} videos of {path} ({names}): looked for images in "
                f"{os.path.join(folder, printable(missing[0]))}; a score on fewer pairs could not be compared.{REMEDY[bool(there)]}"
            )
        self.video_N = np.repeat(np.arange(len(there)), [len(frames[video]) for video in there])
        self.pairs = ListedPairs.of(listed, path, {video: number for number, video in enumerate(there)}, os.path.dirname)
        self.source: Source = ListedFiles(folder, [file for video in there for file in frames[video]], list_checksum(listed), missing)
        self.path, self.resamples = path, resamples

    def evaluate(self, embedder: Embedder) -> Report:
        feature_nD, number_n = embedder.embed(self.source, flip=True, unit=False)
        unit_VD, number_V = means(feature_nD, self.video_N[number_n])
        scored = self.pairs.scored(unit_VD, number_V, name=self.path)
        report = scored.report(name=self.path, resamples=self.resamples)
        report.figures.update(videos=scored.compared, images=len(number_n), unreadable=len(self.source) - len(number_n))
        return report


def means(feature_nD: Tensor, video_n: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Mean features float64 [V, D] of unit length, and whose they are, rising int64 [V], of the videos that frames belong to."""
    number_V, place_n = np.unique(video_n, return_inverse=True)
    sum_VD = torch.zeros(len(number_V), feature_nD.shape[1], dtype=torch.float64)
    sum_VD.index_add_(0, torch.from_numpy(place_n), feature_nD.double().cpu())
    return normalize(sum_VD), number_V  # of unit length, a sum is a mean


def read_splits(path: str) -> PairList:
    """Pairs of videos by NAME/NUMBER, with the splits as folds. ValueError, with the line, for what is in another form."""
    try:
        with open(path, encoding="utf-8-sig", opener=open_regular) as file:
            lines = [(number, [field.strip() for field in line.split(",")]) for number, line in enumerate(file, start=1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read ({reason}); expected splits.txt of YouTube Faces, with lines of {_LINE}.") from error
    if lines and lines[0][1][0].startswith("split"):
        lines = lines[1:]  # the names of the columns
    found = []
    for number, fields in lines:
        numbers, videos, same = fields[:-3], fields[-3:-1], fields[-1]
        if len(numbers) not in (1, 2) or not all(map(str.isdecimal, numbers)) or not all(map(_inside, videos)) or same not in ("0", "1"):
            raise ValueError(f"{path}, line {number} is {', '.join(fields)!r}; expected {_LINE}.")
        found.append((int(numbers[0]), (videos[0], videos[1]), same == "1"))
    if not found:
        raise ValueError(f"{path} names no pairs; expected splits.txt of YouTube Faces, with lines of {_LINE}.")
    found.sort(key=lambda line: line[0])  # stable
    sizes = np.unique([split for split, _, _ in found], return_counts=True)[1]
    if len(set(sizes.tolist())) > 1:
        raise ValueError(f"{path} has splits of {sizes.min()} to {sizes.max()} pairs; expected as many in each, so copy the list again.")
    return PairList([pair for _, pair, _ in found], [same for _, _, same in found], len(sizes))


def _inside(video: str) -> bool:
    parts = video.split("/")
    return len(parts) == 2 and all(part not in ("", ".", "..") for part in parts)


def _frames(folder: str, video: str) -> list[str]:
    """Files of its frames, in the order of their names; none where there is no such folder."""
    try:
        names = sorted(os.listdir(os.path.join(folder, video)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ValueError(f"{os.path.join(folder, video)} cannot be listed ({error.strerror}); make it readable.") from error
    return [os.path.join(folder, video, name) for name in names if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")]
