"""Random genuine and impostor pairs of a labelled set, in folds that share no identity if it is large enough. No pair comes twice."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

import numpy as np

_ENUMERATED = 200_000  # impostor pairs of a set that are listed before some are drawn; larger sets are drawn from until there are enough
_BY_IDENTITY = 20  # draws of identities before images are drawn, which finds pairs however uneven the identities are


@dataclass(frozen=True)
class RandomPairs:
    """Folds one after the other; in each genuine and impostor pairs take turns, so that any part of it has both."""

    pairs: np.ndarray  # int64 [2 x each x folds, 2], numbers of images
    issame: np.ndarray  # bool [2 x each x folds]
    disjoint: bool  # whether no identity is in two folds


def random_pairs(labels_N: np.ndarray, folds: int, each: int, seed: int, name: str) -> RandomPairs:
    """`each` genuine and as many impostor pairs in each of `folds` folds; the same arguments give the same pairs.

    Genuine pairs are spread evenly over identities, impostors over pairs of them. ValueError, naming the set, where it has too few."""
    rng = np.random.default_rng(seed)
    identities = [images for images in _by_identity(labels_N) if len(images)]
    dealt = _deal(identities, folds, rng)
    disjoint = all(min(_genuine_pairs(fold), _impostor_pairs(fold)) >= each for fold in dealt)
    if disjoint:
        drawn = [(_draw_genuine(fold, each, rng), _draw_impostors(fold, each, rng)) for fold in dealt]
        genuine, impostors = (np.concatenate(kind) for kind in zip(*drawn, strict=True))
    else:
        for kind, there in (("genuine", _genuine_pairs(identities)), ("impostor", _impostor_pairs(identities))):
            if there < each * folds:
                raise ValueError(
                    f"{name} has {there} {kind} pairs, but {folds} folds with {each} of each kind need {each * folds}: take fewer with "
                    "--pairs or --folds, or a larger set."
                )
        genuine, impostors = _draw_genuine(identities, each * folds, rng), _draw_impostors(identities, each * folds, rng)
    pairs = np.stack([genuine, impostors], axis=1).reshape(-1, 2)
    return RandomPairs(pairs, np.arange(len(pairs)) % 2 == 0, disjoint)


def _by_identity(labels_N: np.ndarray) -> list[np.ndarray]:
    """Numbers of the images of each identity."""
    order = np.argsort(labels_N, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels_N[order])) + 1)


def _deal(identities: list[np.ndarray], folds: int, rng: np.random.Generator) -> list[list[np.ndarray]]:
    """The identities in `folds` groups with about as many genuine pairs each: the next largest goes to the smallest group."""
    shuffled = [identities[at] for at in rng.permutation(len(identities))]
    heap: list[tuple[int, int, int]] = [(0, 0, fold) for fold in range(folds)]  # genuine pairs, images, number
    dealt: list[list[np.ndarray]] = [[] for _ in range(folds)]
    for images in sorted(shuffled, key=len, reverse=True):
        pairs, held, fold = heap[0]
        dealt[fold].append(images)
        heapq.heapreplace(heap, (pairs + len(images) * (len(images) - 1) // 2, held + len(images), fold))
    return dealt


def _genuine_pairs(identities: list[np.ndarray]) -> int:
    return sum(len(images) * (len(images) - 1) // 2 for images in identities)


def _impostor_pairs(identities: list[np.ndarray]) -> int:
    sizes = [len(images) for images in identities]
    return (sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2


def _draw_genuine(identities: list[np.ndarray], number: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [number, 2]. One pair of every identity in turn, then a second one of those that have it, and so on."""
    left = [(images, _some_pairs(len(images), number, rng)) for images in (identities[at] for at in rng.permutation(len(identities)))]
    drawn: list[np.ndarray] = []
    for turn in itertools.count():
        left = [(images, pairs) for images, pairs in left if len(pairs) > turn]
        for images, pairs in left:
            drawn.append(images[pairs[turn]])
            if len(drawn) == number:
                return np.array(drawn)
        assert left
    raise AssertionError


def _some_pairs(images: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [min(number, all), 2]: different pairs i < j of numbers below `images`, in random order."""
    there = images * (images - 1) // 2
    place = rng.choice(there, min(number, there), replace=False) if there else np.zeros(0, np.int64)
    # Pair (i, j) stands at place j (j - 1) / 2 + i. The root is exact enough below 2^52 places.
    j = ((1 + np.sqrt(1 + 8 * place)) / 2).astype(np.int64)
    return np.stack([place - j * (j - 1) // 2, j], axis=1)


def _draw_impostors(identities: list[np.ndarray], number: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [number, 2]."""
    images = np.concatenate(identities)
    of_image = np.repeat(np.arange(len(identities)), [len(part) for part in identities])
    if len(images) ** 2 // 2 <= _ENUMERATED:
        first, second = np.triu_indices(len(images), 1)
        different = np.flatnonzero(of_image[first] != of_image[second])
        chosen = rng.choice(different, number, replace=False)
        return images[np.stack([first[chosen], second[chosen]], axis=1)]
    starts = np.searchsorted(of_image, np.arange(len(identities)))
    sizes = np.array([len(part) for part in identities])
    drawn: dict[tuple[int, int], None] = {}
    for draw in itertools.count():
        if draw < _BY_IDENTITY:
            who = rng.integers(len(identities), size=(number, 2))
            places = starts[who] + (rng.random((number, 2)) * sizes[who]).astype(np.int64)
        else:
            places = rng.integers(len(images), size=(number, 2))
        for a, b in places[of_image[places[:, 0]] != of_image[places[:, 1]]].tolist():
            drawn.setdefault((min(a, b), max(a, b)))
        if len(drawn) >= number:
            return images[np.array(list(drawn)[:number])]
    raise AssertionError
