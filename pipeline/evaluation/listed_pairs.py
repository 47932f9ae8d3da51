"""Pairs that a list names, by numbers of what they compare (images, or videos), and their figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dali_loaders.identities import checksum
from pipeline.evaluation.bin_pairs import score_pairs
from pipeline.evaluation.pair_lists import PairList, balanced
from pipeline.evaluation.report import Report


@dataclass(frozen=True, eq=False)
class ListedPairs:
    """Those pairs of a list that have both images."""

    pair_P2: np.ndarray  # int64, numbers of what is compared
    same_P: np.ndarray  # bool
    fold_P: np.ndarray  # int64, rising
    person_P2: np.ndarray | None  # int64, numbers of persons; None: the list does not say who is in the images
    left_out: int  # pairs with a missing image

    @classmethod
    def of(cls, listed: PairList, number_of: Mapping[str, int], person_of: Callable[[str], str]) -> ListedPairs:
        """`number_of` has the names that are there. A list with one fold is cut into ten, as `balanced` has it. `person_of` gives who is in
        an image by its name; it is not believed where that contradicts the list."""
        order = balanced(listed) if listed.folds == 1 else range(len(listed.pairs))
        folds = listed.folds if listed.folds > 1 else min(10, len(order))
        there = [place for place in range(len(order)) if all(name in number_of for name in listed.pairs[order[place]])]
        pairs = [listed.pairs[order[place]] for place in there]
        person: dict[str, int] = {}
        person_P2 = [[person.setdefault(person_of(name), len(person)) for name in pair] for pair in pairs]
        same = [listed.issame[order[place]] for place in there]
        known = [one == other for one, other in person_P2] == same
        return cls(
            np.array([[number_of[name] for name in pair] for pair in pairs], np.int64).reshape(-1, 2),
            np.array(same, bool),
            np.array([place * folds // len(order) for place in there], np.int64),
            np.array(person_P2, np.int64).reshape(-1, 2) if known else None,
            len(order) - len(there),
        )

    def report(
        self, embedding_nD: Tensor, number_n: np.ndarray, *, name: str, unreadable: int = 0, resamples: int | None = None
    ) -> Report:
        """What `score_pairs` finds. Embeddings are of unit length, `number_n` says whose they are. A pair without them is left out.
        ValueError, naming `name`, for embeddings that are not finite, and as `score_pairs` has it."""
        row = np.full(max(self.pair_P2.max(initial=0), number_n.max(initial=0)) + 1, -1)
        row[number_n] = np.arange(len(number_n))
        row_P2 = row[self.pair_P2]
        whole_P = (row_P2 >= 0).all(axis=1)
        unit_nD = embedding_nD.double().cpu().numpy()
        bad = int((~np.isfinite(unit_nD).all(axis=1)).sum())
        if bad:
            raise ValueError(f"{name}: {bad} of {len(unit_nD)} embeddings are not finite; the model has diverged.")
        first_P, second_P = row_P2[whole_P].T
        distance_P = np.square(unit_nD[first_P] - unit_nD[second_P]).sum(axis=1)
        persons = None if self.person_P2 is None else np.unique(self.person_P2[whole_P], return_inverse=True)[1].reshape(-1, 2)
        report = score_pairs(
            distance_P, self.same_P[whole_P], fold_P=self.fold_P[whole_P], person_P2=persons,
            unreadable=unreadable, name=name, resamples=resamples,
        )  # fmt: skip
        report.figures |= {
            "images": len(np.unique(row_P2[whole_P])),
            "identities": None if persons is None else int(persons.max()) + 1,
            "left_out": self.left_out,
        }
        return report


def list_checksum(listed: PairList) -> str:
    """By which two lists can be told apart."""
    pairs = zip(listed.pairs, listed.issame, strict=True)
    return checksum([str(listed.folds), *(f"{first}\t{second}\t{same:d}" for (first, second), same in pairs)])
