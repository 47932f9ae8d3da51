"""Images of people in the layouts of published sets: a pattern of 4 x 4 colours for each person, with noise; and their float64 features."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import torch

from dali_loaders import DataConfig

SIDE = 16
DATA = DataConfig(image_size=SIDE, threads=1)


def write_images(folder: Path, names: Iterable[str], person_of: Callable[[str], str], noise: float = 120) -> None:
    """FOLDER/NAME for each name; PNG, whatever the name says, so that every decoder gives the same pixels."""
    for name in names:
        pattern = np.random.default_rng(zlib.crc32(person_of(name).encode())).integers(40, 216, (4, 4, 3))
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        image = np.kron(pattern, np.ones((SIDE // 4, SIDE // 4, 1))) + rng.normal(0, noise, (SIDE, SIDE, 3))
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(cv2.imencode(".png", np.clip(image, 0, 255).astype(np.uint8))[1].tobytes())


def flat(images: torch.Tensor) -> torch.Tensor:
    """The network of these tests: its pixels."""
    return images.flatten(1)


def feature(file: Path) -> np.ndarray:
    """What `flat` makes of an image and its mirror image, float64, from the file."""
    pixels = (cv2.imread(str(file)).astype(np.float64)[..., ::-1] - 127.5) / 127.5
    return (pixels + pixels[:, ::-1]).transpose(2, 0, 1).ravel()


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared distance of the features at unit length."""
    first, second = first / np.linalg.norm(first), second / np.linalg.norm(second)
    return float(np.square(first - second).sum())


def loop_over_folds(distances: np.ndarray, same: np.ndarray, folds: np.ndarray) -> list[float]:
    """Accuracies of the folds: each judged by the first of 0, .01, ... that is right most often on the others."""
    accuracies = []
    for fold in np.unique(folds):
        rest, own = folds != fold, folds == fold
        right = [int(((distances[rest] < t / 100) == same[rest]).sum()) for t in range(400)]
        accuracies.append(float(((distances[own] < right.index(max(right)) / 100) == same[own]).mean()))
    return accuracies
