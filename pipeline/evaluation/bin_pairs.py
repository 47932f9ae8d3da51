"""InsightFace `.bin` pair sets (LFW, CFP-FP, AgeDB-30, ...): reading without trusting the pickle, writing, the 10-fold protocol."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Sequence

import numpy as np

from dali_loaders.account import Account
from pipeline.evaluation.intervals import Pairs, bootstrap
from pipeline.evaluation.pair_pickle import load_pairs
from pipeline.evaluation.report import HISTOGRAM_EDGES, OperatingPoints, Report

FOLDS = 10
INVERSE_FAR = 1000


class MemorySource:
    """Encoded images in memory as a Source; each image is its own identity. `lists`: as in `source.py`."""

    def __init__(self, path: str, images: list[bytes], lists: str = "") -> None:
        self.path, self.lists = path, lists
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


def score_pairs(
    distance_P: np.ndarray,
    issame_P: np.ndarray,
    *,
    fold_P: np.ndarray | None = None,
    person_P2: np.ndarray | None = None,
    unreadable: int = 0,
    name: str = "the pair set",
    resamples: int | None = None,
) -> Report:
    """The protocol of InsightFace's verification on squared distances 2 - 2 cos: contiguous folds, judged by the threshold of the others.

    `accuracy` of a fold uses the distance, of 0, .01, ... 3.99, that is right most often on the other folds (the first of equals); a pair
    is accepted below it. `threshold` is the mean of these as a cosine, `threshold_distance` as they are; `std` is the population standard
    deviation of the accuracies. Folds are those of `fold_P`, rising numbers, which may skip some. Otherwise, and where it has one number
    only, there are 10, whose sizes differ by at most one; a set of P < 10 pairs has P folds of one pair.
    `tar_at_far/1e-3` is the protocol's: a grid of .001, linear in FAR between its points, mean over the folds. Every other rate is of all
    pairs together, as `OperatingPoints.at_far` has it.
    Intervals draw the persons of `person_P2`, int64 from 0; without it pairs, because the set does not say who is in its images: too narrow
    where people come in many pairs. `resamples`: draws, by default 1000. Raises ValueError on a set without a genuine or without an
    impostor pair.
    """
    pairs, genuine = len(issame_P), int(issame_P.sum())
    if genuine == 0 or genuine == pairs:
        missing = "genuine" if genuine == 0 else "impostor"
        raise ValueError(f"{name}: none of its {pairs} readable pairs is a {missing} pair; expected both kinds.")
    fold_P = np.unique(np.zeros(pairs) if fold_P is None else fold_P, return_inverse=True)[1]
    if fold_P[-1] == 0:
        fold_P = np.repeat(np.arange(min(FOLDS, pairs)), [len(part) for part in np.array_split(issame_P, min(FOLDS, pairs))])
    unit_P2 = np.arange(pairs)[:, None].repeat(2, axis=1) if person_P2 is None else person_P2
    chosen_F = chosen_distances(distance_P, issame_P, fold_P)
    correct_P = (distance_P < chosen_F[fold_P]) == issame_P
    accuracy_F = np.bincount(fold_P, correct_P) / np.bincount(fold_P)
    cosine_P = 1 - distance_P / 2
    points = OperatingPoints.of_scores(cosine_P, issame_P)
    figures, thresholds = points.figures()
    shares = {"accuracy": (correct_P, unit_P2)}
    if points.impostor_pairs >= INVERSE_FAR:
        accepted_P = distance_P < _thresholds_at_far(distance_P, issame_P, fold_P)[fold_P]
        figures["tar_at_far/1e-3"] = float(
            np.mean([accepted_P[(fold_P == fold) & issame_P].mean() for fold in np.unique(fold_P[issame_P])])
        )
        shares["tar_at_far/1e-3"] = (accepted_P[issame_P], unit_P2[issame_P])
    figures = {"accuracy": float(accuracy_F.mean()), "std": float(accuracy_F.std()), **figures}
    figures |= {"threshold_distance": float(chosen_F.mean()), "threshold_std": float(chosen_F.std() / 2)}
    figures |= {"pairs": pairs, "folds": len(chosen_F), "images": 2 * pairs, "unreadable": unreadable, "rank1": None, "identities": None}
    thresholds = {"threshold": float(1 - chosen_F.mean() / 2), **thresholds}
    units = Pairs(cosine_P, issame_P, unit_P2[:, 0], unit_P2[:, 1], int(unit_P2.max()) + 1)
    genuine_histogram, impostor_histogram = (np.histogram(cosine_P[kind].clip(-1, 1), HISTOGRAM_EDGES)[0] for kind in (issame_P, ~issame_P))
    report = Report(figures, thresholds, "threshold", points.roc(), genuine_histogram, impostor_histogram)
    report.intervals.update(bootstrap(units, points, shares, 1000 if resamples is None else resamples))
    report.tables["thresholds"] = [
        {"group": f"fold {fold + 1}", "threshold": float(1 - chosen / 2), "accuracy": float(accuracy)}
        for fold, (chosen, accuracy) in enumerate(zip(chosen_F, accuracy_F, strict=True))
    ]
    return report


def chosen_distances(distance_P: np.ndarray, issame_P: np.ndarray, fold_P: np.ndarray) -> np.ndarray:
    """Of each fold, float64 [F], the distance that is right most often on the others."""
    threshold_T = np.arange(400) / 100
    starts = np.searchsorted(fold_P, np.arange(fold_P[-1] + 1))
    correct_TF = np.add.reduceat((distance_P < threshold_T[:, None]) == issame_P, starts, axis=1, dtype=np.int64)
    return threshold_T[(correct_TF.sum(axis=1, keepdims=True) - correct_TF).argmax(axis=0)]


def _thresholds_at_far(distance_P: np.ndarray, issame_P: np.ndarray, fold_P: np.ndarray) -> np.ndarray:
    """Of each fold, float64 [F], the distance at which the others have a FAR of 1 / INVERSE_FAR."""
    threshold_T = np.arange(4000) / 1000
    found = []
    for fold in range(fold_P[-1] + 1):
        others = np.sort(distance_P[(fold_P != fold) & ~issame_P])
        found.append(np.interp(1 / INVERSE_FAR, np.searchsorted(others, threshold_T) / max(1, len(others)), threshold_T))
    return np.array(found)
