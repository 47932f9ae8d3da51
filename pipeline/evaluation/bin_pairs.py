"""InsightFace `.bin` pair sets (LFW, CFP-FP, AgeDB-30, ...): reading without trusting the pickle, writing, the 10-fold protocol."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dali_loaders.account import Account
from dali_loaders.config import DataConfig
from pipeline.evaluation.all_pairs import equal_error_rate
from pipeline.evaluation.embed import Breaks, embed
from pipeline.evaluation.pair_pickle import load_pairs

FOLDS = 10
INVERSE_FAR = 1000


@dataclass(frozen=True)
class BinReport:
    """The pair protocol's numbers. Distances are squared Euclidean between unit embeddings, 0..4; a pair is accepted below threshold."""

    accuracy: float  # mean over the folds
    std: float  # population standard deviation over the folds
    threshold: float  # mean over the folds of the distance chosen on the other folds
    eer: float
    tar_at_far: dict[str, float | None]  # "1e-3": mean over the folds; None: fewer than 1000 impostor pairs
    pairs: int
    genuine_pairs: int
    folds: int
    images: int
    unreadable: int
    roc: tuple[np.ndarray, np.ndarray] = field(repr=False, compare=False)  # FAR and TAR float64 [P], ascending

    @property
    def impostor_pairs(self) -> int:
        return self.pairs - self.genuine_pairs

    @property
    def best_cosine(self) -> float:
        """The threshold of the best accuracy, which is a squared distance 2 - 2 cos, as a cosine."""
        return 1.0 - self.threshold / 2.0

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; `rank1` and `identities` are null, because a pair set does not say who is in its images."""
        numbers = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "roc"}
        return numbers | {"tar_at_far": dict(self.tar_at_far), "rank1": None, "identities": None}


class MemorySource:
    """Encoded images in memory as a Source; each image is its own identity."""

    def __init__(self, path: str, images: list[bytes]) -> None:
        self.path = path
        self.images = images
        self.labels = np.arange(len(images), dtype=np.int64)
        self.identities = [str(i) for i in range(len(images))]
        self.account = Account(seen=len(images), used=len(images))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> bytes:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"{self.path}: pair {index // 2}, {('first', 'second')[index % 2]} image"


def read_bin(path: str) -> tuple[list[bytes], np.ndarray]:
    """Encoded images (2P) and whether images 2p and 2p + 1 show one identity, bool [P]. Never runs code of the file.

    Raises ValueError when the file cannot be opened, is no such pickle, asks for any other class, or its lengths do not match.
    """
    images, issame = load_pairs(path)
    if len(images) != 2 * len(issame):
        raise ValueError(f"{path}: {len(images)} images for {len(issame)} pairs; expected two images per pair, so the file is damaged.")
    return images, np.array(issame, dtype=bool)


def write_bin(path: str, images: Sequence[bytes | np.ndarray], issame: Sequence[bool] | np.ndarray) -> None:
    """Writes a set that read_bin and InsightFace's verification read: `images` holds 2P encoded files, bytes or uint8 arrays.

    The file appears when it is whole. Raises ValueError when the lengths do not match or the file cannot be written.
    """
    if len(images) != 2 * len(issame):
        raise ValueError(f"{path}: {len(images)} images were given for {len(issame)} pairs; expected two images per pair.")
    encoded = [image if isinstance(image, bytes) else np.asarray(image, dtype=np.uint8).tobytes() for image in images]
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            pickle.dump((encoded, [bool(same) for same in issame]), file, protocol=4)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        raise ValueError(f"{path}: the pair set cannot be written ({error.strerror}); choose a path that can.") from error


def evaluate_bin(
    model: Callable[[Tensor], Tensor],
    path: str,
    data: DataConfig,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    breaks: Breaks | None = None,
) -> BinReport:
    """Embeds image + mirror image and scores the pairs; all ranks of `group` call it and get the same report.

    A pair with an image that cannot be decoded is left out and named in the log. Raises ValueError as read_bin and score_pairs do.
    """
    images, issame_P = read_bin(path)
    embedding_nD, index_n = embed(
        model, MemorySource(path, images), data,
        batch_size=batch_size, flip=True, device=device, rank=rank, world_size=world_size, group=group, breaks=breaks,
    )  # fmt: skip
    row = np.full(len(images), -1)
    row[index_n] = np.arange(len(index_n))
    first_P, second_P = row.reshape(-1, 2).T
    whole_P = (first_P >= 0) & (second_P >= 0)
    unit_nD = embedding_nD.double().cpu().numpy()
    if not np.isfinite(unit_nD).all():
        raise ValueError(f"{path}: some embeddings are not finite; the model has diverged.")
    distance_P = np.square(unit_nD[first_P[whole_P]] - unit_nD[second_P[whole_P]]).sum(axis=1)
    return score_pairs(distance_P, issame_P[whole_P], unreadable=len(images) - len(index_n), name=path)


def score_pairs(distance_P: np.ndarray, issame_P: np.ndarray, *, unreadable: int = 0, name: str = "the pair set") -> BinReport:
    """The protocol of InsightFace's verification on squared distances: contiguous folds, each judged by the threshold of the others.

    The accuracy of a fold uses the distance, of 0, .01, ... 3.99, that is right most often on the other folds (the first of equals).
    TAR@FAR=1e-3 uses a grid of .001 and is linear in FAR between its points. There are 10 folds, whose sizes differ by at most one; a set
    of P < 10 pairs has P folds of one pair.
    Raises ValueError on a set without a genuine or without an impostor pair.
    """
    genuine = int(issame_P.sum())
    if genuine == 0 or genuine == len(issame_P):
        missing = "genuine" if genuine == 0 else "impostor"
        raise ValueError(f"{name}: none of its {len(issame_P)} readable pairs is a {missing} pair; expected both kinds.")
    folds = np.array_split(np.arange(len(issame_P)), min(FOLDS, len(issame_P)))
    starts = [fold[0] for fold in folds]
    sizes_F = np.array([len(fold) for fold in folds])

    threshold_T = np.arange(400) / 100
    correct_TF = np.add.reduceat((distance_P < threshold_T[:, None]) == issame_P, starts, axis=1, dtype=np.int64)
    chosen_F = (correct_TF.sum(axis=1, keepdims=True) - correct_TF).argmax(axis=0)
    accuracy_F = correct_TF[chosen_F, np.arange(len(folds))] / sizes_F

    far_P, tar_P = _roc(distance_P, issame_P)
    reached = len(issame_P) - genuine >= INVERSE_FAR
    return BinReport(
        accuracy=float(accuracy_F.mean()),
        std=float(accuracy_F.std()),
        threshold=float(threshold_T[chosen_F].mean()),
        eer=equal_error_rate(far_P, tar_P)[0],
        tar_at_far={"1e-3": _tar_at_far(distance_P, issame_P, folds) if reached else None},
        pairs=len(issame_P),
        genuine_pairs=genuine,
        folds=len(folds),
        images=2 * len(issame_P),
        unreadable=unreadable,
        roc=(far_P, tar_P),
    )


def _tar_at_far(distance_P: np.ndarray, issame_P: np.ndarray, folds: list[np.ndarray]) -> float:
    threshold_T = np.arange(4000) / 1000
    tars = []
    for fold in folds:
        others = np.delete(distance_P, fold)[~np.delete(issame_P, fold)]
        far_T = np.searchsorted(np.sort(others), threshold_T) / len(others)
        threshold = np.interp(1 / INVERSE_FAR, far_T, threshold_T)
        genuine = distance_P[fold][issame_P[fold]]
        if len(genuine):
            tars.append(float((genuine < threshold).mean()))
    return float(np.mean(tars))


def _roc(distance_P: np.ndarray, issame_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FAR and TAR below each distance, from none accepted to all; pairs of one distance are accepted together."""
    order = np.argsort(distance_P)
    last_of_tie = np.append(np.diff(distance_P[order]) > 0, True)
    tar_P = np.append(0.0, np.cumsum(issame_P[order])[last_of_tie] / issame_P.sum())
    far_P = np.append(0.0, np.cumsum(~issame_P[order])[last_of_tie] / (~issame_P).sum())
    return far_P, tar_P
