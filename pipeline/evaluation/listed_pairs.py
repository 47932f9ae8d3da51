"""Pairs that a list names, by numbers of what they compare (images, or videos), and their figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dali_loaders.identities import checksum
from dali_loaders.names import printable
from pipeline.evaluation.bin_pairs import chosen_distances, score_pairs
from pipeline.evaluation.pair_lists import PairList, balanced
from pipeline.evaluation.report import Report


@dataclass(frozen=True, eq=False)
class Scored:
    """The pairs of a list that were compared."""

    distance_P: np.ndarray  # float64, squared distances of unit vectors
    same_P: np.ndarray  # bool
    fold_P: np.ndarray  # int64, from 0, rising, no number left out
    person_P2: np.ndarray | None  # int64, from 0, no number left out; None: the list does not say who is in the images
    compared: int  # images, or videos
    unreadable: int  # of these, those without an embedding
    left_out: int  # pairs with a missing image

    @property
    def is_right(self) -> np.ndarray:
        """Of each pair, bool [P]: whether the threshold of the other folds is right."""
        chosen_F = chosen_distances(self.distance_P, self.same_P, self.fold_P)
        return (self.distance_P < chosen_F[self.fold_P]) == self.same_P

    def report(self, *, name: str, resamples: int | None = None) -> Report:
        """What `score_pairs` finds."""
        report = score_pairs(
            self.distance_P, self.same_P, fold_P=self.fold_P, person_P2=self.person_P2,
            unreadable=self.unreadable, name=name, resamples=resamples,
        )  # fmt: skip
        identities = None if self.person_P2 is None else int(self.person_P2.max()) + 1
        report.figures.update(images=self.compared, identities=identities, left_out=self.left_out)
        return report


@dataclass(frozen=True, eq=False)
class ListedPairs:
    """Those pairs of a list that have both images."""

    pair_P2: np.ndarray  # int64, numbers of what is compared
    same_P: np.ndarray  # bool
    fold_P: np.ndarray  # int64, rising
    person_P2: np.ndarray | None  # int64, numbers of persons; None: the list does not say who is in the images
    left_out: int  # pairs with a missing image

    @classmethod
    def of(cls, listed: PairList, path: str, number_of: Mapping[str, int], person_of: Callable[[str], str]) -> ListedPairs:
        """`number_of` has the names that are there. A list with one fold is cut into ten, as `balanced` has it. `person_of` gives who is in
        an image by its name; it is not believed where that contradicts the list. ValueError, naming `path`, where one kind of pairs is
        missing, and for a pair that is said to be of both kinds."""
        kind_of: dict[tuple[str, ...], bool] = {}
        for pair, is_same in zip(listed.pairs, listed.issame, strict=True):
            if kind_of.setdefault(tuple(sorted(pair)), is_same) != is_same:
                raise ValueError(f"{path} names {' and '.join(map(printable, pair))} as one person and as two; copy the list again.")
        order = balanced(listed) if listed.folds == 1 else range(len(listed.pairs))
        folds = listed.folds if listed.folds > 1 else min(10, len(order))
        there = [place for place in range(len(order)) if all(name in number_of for name in listed.pairs[order[place]])]
        pairs = [listed.pairs[order[place]] for place in there]
        person: dict[str, int] = {}
        person_P2 = [[person.setdefault(person_of(name), len(person)) for name in pair] for pair in pairs]
        same = [listed.issame[order[place]] for place in there]
        if len(set(same)) < 2:
            kind = "genuine" if True not in same else "impostor"
            raise ValueError(f"{path}: no {kind} pair is among its {len(same)} pairs with both images; expected both kinds.")
        known = [one == other for one, other in person_P2] == same
        return cls(
            np.array([[number_of[name] for name in pair] for pair in pairs], np.int64).reshape(-1, 2),
            np.array(same, bool),
            np.array([place * folds // len(order) for place in there], np.int64),
            np.array(person_P2, np.int64).reshape(-1, 2) if known else None,
            len(order) - len(there),
        )

    def scored(self, embedding_nD: Tensor, number_n: np.ndarray, *, name: str) -> Scored:
        """Embeddings are of unit length, `number_n` says whose they are. A pair without them is left out. ValueError, naming `name`, for
        embeddings that are not finite."""
        row = np.full(max(self.pair_P2.max(initial=0), number_n.max(initial=0)) + 1, -1)
        row[number_n] = np.arange(len(number_n))
        row_P2 = row[self.pair_P2]
        whole_P = (row_P2 >= 0).all(axis=1)
        unit_nD = embedding_nD.double().cpu().numpy()
        bad = int((~np.isfinite(unit_nD).all(axis=1)).sum())
        if bad:
            raise ValueError(f"{name}: {bad} of {len(unit_nD)} embeddings are not finite; the model has diverged.")
        first_P, second_P = row_P2[whole_P].T
        return Scored(
            np.square(unit_nD[first_P] - unit_nD[second_P]).sum(axis=1),
            self.same_P[whole_P],
            _from_zero(self.fold_P[whole_P]),
            None if self.person_P2 is None else _from_zero(self.person_P2[whole_P]),
            len(np.unique(row_P2[whole_P])),
            int((row[np.unique(self.pair_P2)] < 0).sum()),
            self.left_out,
        )


def list_checksum(listed: PairList) -> str:
    """By which two lists can be told apart."""
    pairs = zip(listed.pairs, listed.issame, strict=True)
    return checksum([str(listed.folds), *(f"{first}\t{second}\t{same:d}" for (first, second), same in pairs)])


def _from_zero(number: np.ndarray) -> np.ndarray:
    """The same order without gaps."""
    return np.unique(number, return_inverse=True)[1].reshape(number.shape)
